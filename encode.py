"""Images to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                        # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos     # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/   # several GPUs or hosts share the shards

Interrupted? Run the same command again: finished shards are kept, the one in flight is made anew. When it is
done, look at latents/reconstructions.png: originals, each with what its latent decodes to at its right.
"""
import argparse, hashlib, json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

VAE = "black-forest-labs/FLUX.2-klein-4B"             # Apache-2.0; the VAE is in its folder vae/
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".mpo")
RANK, WORLD = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))   # torchrun's

# ---------------------------------------------------------------- faults, files, devices
class Stop(Exception):
    """Stop(line, status=2): a fault that one line explains; exit status 2 for bad usage, 1 for a fault on the way."""

def need(condition, line, status=2):
    if not condition:
        raise Stop(line, status)

def run(main):
    """Calls main(); a foreseeable fault becomes one line on stderr and an exit status, not a traceback."""
    try:
        return main()
    except Stop as e:
        line, status = (*e.args, 2)[:2]
    except KeyboardInterrupt:
        line, status = "interrupted; what was finished is kept", 130
    except (MemoryError, torch.OutOfMemoryError):
        line, status = "out of memory; lower --batch (encode.py, fid.py) or --micro-batch (jlt.py)", 1
    except OSError as e:                              # disk full, no permission, a network drive gone
        line, status = f"{e.filename or 'writing'}: {e.strerror or e}; what was finished is kept", 1
    print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)

def make_parser(doc):
    """An argparse parser whose complaints are one line, without the usage before them."""
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, not {text!r}")
    return int(text)

@contextmanager
def atomic(path):
    """Yields a temporary name, renamed to `path` on success: readers find the old file or all of the new one."""
    tmp = Path(path).with_name(f".tmp.{Path(path).name}")
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file)                            # after a power cut, too
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

def write_json(path, value):
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1))

def pick_device(name=None):
    """"cuda", "cuda:1", "mps", "cpu" or None, the best there is; under torchrun every rank has its own GPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = (name or best).partition(":")
    index = int(index if index.isdecimal() else os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else 0
    need(kind == "cpu" or kind == best and index < max(1, torch.cuda.device_count()),
         f"--device {name or f'cuda:{index}'}: not on this machine, which has {best}")
    if kind == "cuda":
        torch.cuda.set_device(index)
    return torch.device(f"cuda:{index}" if kind == "cuda" else kind)

# ---------------------------------------------------------------- images
def list_images(folder):
    """Sorted paths, relative to `folder`, of the image files in it and below it (known by extension)."""
    return sorted(os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(folder)
                  for file in files if file.lower().endswith(EXTENSIONS))

def open_rgb(path):
    """Any image file as RGB: its first frame, alpha dropped, not rotated by EXIF (ImageNet's convention). 16-bit
    grayscale is scaled to 8 bits; Pillow's convert alone would make it white."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        image.info.pop("transparency", None)          # of a palette: Pillow would warn, and refuse to save the result
        return image.convert("RGB")

def center_crop(image, size):
    """PIL image -> size x size. ADM's crop (guided-diffusion): halve with a box filter while the short side is at
    least 2 * size, bicubic until it is `size`, cut out the centre. ValueError for endless strips."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    width, height = (round(side * (size / min(image.size))) for side in image.size)
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:   # a 1 x 5000 strip would become 256 x 1,280,000
        raise ValueError(f"{image.width} x {image.height} is too long for a square crop")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))

def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def save_grid(path, images, columns):
    """Writes uint8 images (N, 3, H, W), N a multiple of `columns`, as one PNG, row by row, without gaps."""
    sheet = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    with atomic(path) as tmp:
        Image.fromarray(sheet.cpu().numpy()).save(tmp, "PNG")

# ---------------------------------------------------------------- the VAE
def load_vae(name=VAE, device="cpu"):
    """The frozen AutoencoderKLFlux2 of a hub repository or local folder (there, or in its vae/), or the digits' codec.
    Raises Stop where there is none, or where the weights are another model's."""
    if str(name).endswith("codec.safetensors"):
        return load_file(name)
    from diffusers import AutoencoderKLFlux2, logging  # here: the import takes seconds
    logging.set_verbosity_error()
    for subfolder in ("vae", None):
        try:
            vae, report = AutoencoderKLFlux2.from_pretrained(name, subfolder=subfolder, output_loading_info=True)
            if not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")):
                return vae.eval().requires_grad_(False).to(device)
            reason = "other weights than an AutoencoderKLFlux2 has"
        except Exception as e:                        # of many kinds: the hub's, diffusers', safetensors'
            reason = str(e)[:160]
    raise Stop(f"--vae {name}: cannot be loaded ({reason}); give a folder with an AutoencoderKLFlux2, such as flux2 after: "
               f"hf download {VAE} --include 'vae/*' --local-dir flux2")

def normalization(vae):
    """Mean and std (1, 128, 1, 1) of the VAE's own BatchNorm, which diffusers leaves to its caller."""
    mean, var = (s.float().view(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (var + vae.config.batch_norm_eps).sqrt()

@torch.no_grad()
def encode(vae, images):
    """Images (B, 3, H, W) in [-1, 1] -> normalised latents (B, 128, H/16, W/16), float32: the posterior's mode,
    2x2 pixels to channels (c*4 + row*2 + column), BatchNorm statistics."""
    if isinstance(vae, dict):                         # the digits' codec, below
        return torch.einsum("bchw,cd->bdhw", F.pixel_unshuffle(images, 16) - vae["mean"], vae["basis"]) / vae["scale"]
    mean, std = normalization(vae)
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().float()   # (B, 32, H/8, W/8)
    return (F.pixel_unshuffle(latents, 2) - mean) / std

@torch.no_grad()
def decode(vae, latents):
    """The inverse: normalised latents (B, 128, h, w) -> images (B, 3, 16h, 16w), float32."""
    if isinstance(vae, dict):
        patches = torch.einsum("bdhw,cd->bchw", latents.cpu().float() * vae["scale"], vae["basis"]) + vae["mean"]
        return F.pixel_shuffle(patches, 16)
    mean, std = normalization(vae)
    need(latents.shape[1] == len(mean[0]), f"this VAE decodes {len(mean[0])} channels, the latents have {latents.shape[1]}")
    latents = F.pixel_shuffle(latents.to(vae.device).float() * std + mean, 2)           # (B, 32, 2h, 2w)
    return vae.decode(latents.to(vae.dtype)).sample.float()

# ---------------------------------------------------------------- the built-in data: digits, and a codec for them
STROKES = ("50 20 13 16 29 59 86 83 50 20", "22 50 59", "12 30 60 82 74 19 89", "11 40 70 82 64 44 64 86 78 49 18",
           "60 16 86 66 60 69", "80 20 14 54 86 78 49 18", "70 32 15 18 49 78 86 65 35 16", "10 80 39",
           "54 22 20 60 82 54 16 18 49 79 86 54", "29 67 84 81 50 21 13 34 64 83")      # 0 to 9: pen paths, "xy" each

def draw_digits(n, seed):
    """Images uint8 (n, 3, 32, 32) and labels (n,) of classes 0, 1, ..., 9, 0, ...: bright strokes on dark paper, of
    random colour, thickness, shape, slant, rotation, size and position. A pixel is ink by its distance to the path."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)
    paths = torch.tensor([[int(xy[0]) + 1j * int(xy[1]) for xy in (s.split() + 12 * [s[-2:]])[:12]] for s in STROKES])
    labels = torch.arange(n) % 10
    p = paths[labels] / 9 - (0.5 + 0.5j) + 0.012 * torch.complex(*torch.randn(2, n, 12, generator=g))    # (n, 12)
    p = 0.75 * p.real + uniform(-0.15, 0.15, 1) * p.imag + 1j * p.imag
    p = p * torch.polar(uniform(20, 24, 1), uniform(-0.12, 0.12, 1)) + torch.complex(*uniform(14.5, 17.5, 2, 1).unbind(1))
    pixels = (torch.arange(32) + 0.5 + 1j * (torch.arange(32)[:, None] + 0.5)).flatten()                 # (1024,)
    width, ink, paper, images = uniform(2.2, 3.6), uniform(0.6, 1, 3, 1), uniform(0, 0.3, 3, 1), []
    for k in torch.arange(n).split(500):
        start, way = p[k, :-1, None], p[k].diff()[..., None]                                             # (k, 11, 1)
        along = ((pixels - start) * way.conj()).real / way.abs().square().clamp(min=1e-6)                # (k, 11, 1024)
        distance = (pixels - start - along.clamp(0, 1) * way).abs().amin(1)                              # (k, 1024)
        cover = (width[k, None] / 2 - distance + 0.5).clamp(0, 1)[:, None]
        images.append(((paper[k] + (ink[k] - paper[k]) * cover) * 255).round().to(torch.uint8).view(-1, 3, 32, 32))
    return torch.cat(images), labels

def cache_digits(folder, n=10_000):
    """Writes n digits as a cache like any other, unless they are there, with their codec, FLUX.2's VAE in miniature: a
    16x16x3 patch becomes its 128 principal components, all over one scale, so that low variances stay low."""
    if not (folder / "meta.json").exists():
        images = draw_digits(n, seed=1)[0] / 127.5 - 1
        patches = F.pixel_unshuffle(images, 16).movedim(1, -1).flatten(0, 2)                             # (4n, 768)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))                                        # ascending
        codec = {"mean": patches.mean(0)[:, None, None], "basis": vectors[:, -128:].flip(1).contiguous(),
                 "scale": values[-128:].mean().sqrt()}
        z, meta = encode(codec, images), {"vae": str(folder / "codec.safetensors"), "classes": [*"0123456789"]}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "codec.safetensors").write_bytes(save(codec))
        save_shard(folder / "latents_00000.safetensors", z, z, torch.arange(n) % 10)    # a mirrored 3 is no digit
        write_json(folder / "meta.json", meta)        # last: it says that all is there

# ---------------------------------------------------------------- the cache
def save_shard(path, latents, flipped, labels, **header):
    tensors = {"latents": latents.half().contiguous(), "latents_flip": flipped.half().contiguous(), "labels": labels.int()}
    with atomic(path) as tmp:                         # one key: safetensors writes several in random order
        tmp.write_bytes(save(tensors, {"encode": json.dumps(header)}))

def open_shard(path):
    """-> header (dict), tensors by name: mapped from disk, not read. Raises Stop if damaged."""
    try:
        with safe_open(path, "pt") as file:
            shard = {key: file.get_tensor(key) for key in file.keys()}
            header = json.loads((file.metadata() or {}).get("encode", "{}"))
        n, _, _, _ = shape = shard["latents"].shape
        need(shard["labels"].shape == (n,) and shard.get("latents_flip", shard["latents"]).shape == shape, "lengths differ")
    except (SafetensorError, OSError, KeyError, ValueError, Stop) as e:
        raise Stop(f"{path}: no shard of latents (N, C, H, W) and labels (N,): {e}; delete it, encode again", 1) from None
    return header, shard

class LatentDataset(torch.utils.data.Dataset):
    """A folder of cached latents, memory-mapped: item i is (latent (C, H, W) float32, label), item(i, True) that of
    the mirrored image. Shards of the paper's code, which have no meta.json, are read as well. Raises Stop for a
    cache that is missing, unfinished, damaged or mixed."""
    def __init__(self, folder):
        files, meta = sorted(Path(folder).glob("latents_*.safetensors")), Path(folder, "meta.json")
        need(files, f"{folder}: holds no latents_*.safetensors; make them: python encode.py IMAGES --out {folder}")
        self.headers, self.shards = zip(*map(open_shard, files))
        want = self.headers[0].get("shards", len(files))
        need(want == len(files), f"{folder}: {len(files)} of {want} shards; the same encode.py command finishes it")
        self.meta = json.loads(meta.read_text()) if meta.exists() else {}
        self.ends = np.cumsum([len(shard["labels"]) for shard in self.shards])
        self.labels = torch.cat([shard["labels"] for shard in self.shards]).long()
        self.shape, *other = {tuple(shard["latents"].shape[1:]) for shard in self.shards}         # (C, H, W)
        need(not other, f"{folder}: mixes latents {self.shape} and {other}; keep one cache in a folder")
        low, high = (int(f(self.labels)) for f in (torch.amin, torch.amax)) if len(self) else (-1, -1)
        self.num_classes = len(self.meta.get("classes", range(high + 1)))
        need(0 <= low <= high < self.num_classes,
             f"{folder}: no latents, or labels ({low} to {high}) outside its {self.num_classes} classes")

    def __len__(self):
        return len(self.labels)

    def item(self, i, flip=False):
        i = range(len(self))[i]
        return self.rows([i], [flip])[0].float(), int(self.labels[i])
    __getitem__ = item

    def rows(self, indices, flips):
        """Latents (B, C, H, W) as stored; where there are no mirrored ones, the plain ones."""
        where = zip(indices, np.searchsorted(self.ends, indices, side="right"), flips)
        return torch.stack([self.shards[k]["latents_flip" if flip and "latents_flip" in self.shards[k] else "latents"]
                            [i - self.ends[k]] for i, k, flip in where])              # rows counted from the shard's end

# ---------------------------------------------------------------- the command
class Photos(torch.utils.data.Dataset):
    """File number i -> i, its crop uint8 (S, S, 3), why it could not be read. Runs in the DataLoader's processes."""
    def __init__(self, root, names, size):
        self.root, self.names, self.size = root, names, size

    def __getitem__(self, i):
        try:
            return i, np.array(center_crop(open_rgb(os.path.join(self.root, self.names[i])), self.size)), ""
        except Exception as e:                        # Pillow raises whatever the file's bytes lead it to
            return i, np.zeros((self.size, self.size, 3), np.uint8), " ".join(str(e).split()) or type(e).__name__

def scan(folder):
    """-> root, class names, file names, labels; the classes are the sorted folders of `folder`[/train]."""
    root = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else folder
    need(os.path.isdir(root), f"{root}: not a folder; give the one that holds the class folders")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = [(os.path.join(c, f), label) for label, c in enumerate(classes) for f in list_images(os.path.join(root, c))]
    need(files, f"{root}: no images in class folders; arrange them as {os.path.join(root, 'CLASS', 'image.jpg')}")
    return root, classes, *map(list, zip(*files))

def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", help="folder of class folders; its train/ is used where it exists")
    add("--out", default="latents", type=Path, help="folder of the cache (%(default)s)")
    add("--vae", default=VAE, help="hub repository or folder of an AutoencoderKLFlux2 (%(default)s)")
    add("--size", default=256, type=positive, help="side of the square crop in pixels (%(default)s)")
    add("--batch", default=32, type=positive, help="images at a time, each encoded as it is and mirrored (%(default)s)")
    add("--shard", default=1024, type=positive, help="images in a file, the most that a kill can cost (%(default)s)")
    add("--workers", default=os.cpu_count(), type=positive, help="processes that decode images (%(default)s)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    args = parser.parse_args()
    need(args.size % 16 == 0, f"--size {args.size}: the latent grid needs a multiple of 16")
    out, device, (root, classes, names, labels) = args.out, pick_device(args.device), scan(args.images)
    vae = load_vae(args.vae, device)

    # What all shards of a cache have in common, in meta.json. (The decoder may be replaced by another.)
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    weights = b"".join(v.cpu().numpy().tobytes() for k, v in vae.state_dict().items() if "decoder" not in k and "post" not in k)
    parts = [range(k, min(k + args.shard, len(names))) for k in range(0, len(names), args.shard)]
    meta = {"vae": args.vae, "encoder": digest(weights), "files": digest(os.fsencode("\0".join(names + classes))), "size": args.size,
            "shard": args.shard, "classes": classes}
    out.mkdir(parents=True, exist_ok=True)
    paths, meta_path = [out / f"latents_{k:05d}.safetensors" for k in range(len(parts))], out / "meta.json"
    need(meta_path.exists() or not any(out.glob("latents_*")), f"{out}: holds latents of another origin; give another --out")
    if RANK == 0 and not meta_path.exists():
        write_json(meta_path, meta)
    old = json.loads(meta_path.read_text()) if meta_path.exists() else meta
    for key in ("encoder", "size", "files", "shard"):
        need(old.get(key) == meta[key], f"{out}: made with other {key} ({old.get(key)}, now {meta[key]}); give another --out")
    todo = [k for k in range(RANK, len(parts), WORLD) if not paths[k].exists()]
    print(f"{out}: {len(names):,} files of {len(classes)} classes; {sum(p.exists() for p in paths)} of {len(parts)} shards "
          "were there already", file=sys.stderr)

    batches = [parts[k][b:b + args.batch] for k in todo for b in range(0, len(parts[k]), args.batch)]
    loader = iter(torch.utils.data.DataLoader(Photos(root, names, args.size), batch_sampler=batches, num_workers=args.workers,
                                              pin_memory=device.type == "cuda"))
    with ThreadPoolExecutor(1) as writer, tqdm(total=sum(map(len, batches)), unit="image") as bar:
        writing = writer.submit(int)                  # a shard is written while the GPU is at the next
        for k in todo:
            latents, kept, skipped = [torch.zeros(2, 0, 128, args.size // 16, args.size // 16).half()], [], []
            for _ in range(0, len(parts[k]), args.batch):
                index, images, why = next(loader)     # (B,), uint8 (B, S, S, 3), reasons
                for i, reason in zip(index.tolist(), why):
                    if reason:
                        skipped.append([names[i], reason])
                        bar.write(f"skipped {ascii(names[i])}: {reason}", file=sys.stderr)
                good = torch.tensor([not reason for reason in why])
                x = images[good].to(device, non_blocking=True).permute(0, 3, 1, 2) / 127.5 - 1      # (B, 3, S, S)
                if good.any():
                    latents.append(encode(vae, torch.cat([x, x.flip(-1)])).half().cpu().unflatten(0, (2, -1)))
                kept += index[good].tolist()
                bar.update(len(why))
            writing.result()                          # raises what went wrong there
            writing = writer.submit(save_shard, paths[k], *torch.cat(latents, 1), torch.tensor([labels[i] for i in kept]),
                                    vae=args.vae, size=args.size, shard=k, shards=len(parts), skipped=skipped)
        writing.result()
    if RANK:
        return                                        # the first process waits for the others and completes the cache
    while not all(path.exists() for path in paths):
        time.sleep(1)
    data = LatentDataset(out)
    skipped = sum((header["skipped"] for header in data.headers), [])
    write_json(meta_path, meta | {"images": len(data), "skipped": skipped})
    unreadable, some = {name for name, _ in skipped}, range(0, len(data), -(-len(data) // 512))
    photos = Photos(root, [name for name in names if name not in unreadable], args.size)
    std, mean = torch.std_mean(torch.stack([data[i][0] for i in some]), (0, 2, 3))
    pairs = [image for i in some[::-(-len(some) // 8)] for image in (
        torch.from_numpy(photos[i][1]).permute(2, 0, 1), to_uint8(decode(vae, data[i][0][None]))[0].cpu())]
    save_grid(out / "reconstructions.png", torch.stack(pairs), columns=2 if len(pairs) % 4 else 4)
    print(f"{out}: {len(data):,} images, each with its mirror image, in {len(parts)} shards; {len(skipped)} files skipped; channel "
          f"means {mean.min():.2f} to {mean.max():.2f}, stds {std.min():.2f} to {std.max():.2f} (FLUX.2's VAE: about 0 and 1)")

if __name__ == "__main__":
    run(main)
