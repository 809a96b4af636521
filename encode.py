"""Images to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                        # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos     # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/   # several GPUs or hosts share the shards

Interrupted? Run the same command again: finished shards are kept, the one in flight is made anew.
When it is done, look at latents/reconstructions.png: originals, each with its decoded latent at its right.
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
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

VAE = "black-forest-labs/FLUX.2-klein-4B"             # Apache-2.0; the VAE is in its folder vae/
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".mpo")

# ---------------------------------------------------------------- faults, files, devices
class Stop(Exception):
    """A fault that one line explains. status is the exit status: 2 for bad usage, 1 for a fault on the way."""
    def __init__(self, line, status=2):
        super().__init__(line)
        self.status = status

def run(main):
    """Calls main(); a foreseeable fault becomes one line on stderr and an exit status, not a traceback."""
    try:
        return main()
    except Stop as e:
        line, status = str(e), e.status
    except KeyboardInterrupt:
        line, status = "interrupted; the same command continues from what was finished", 130
    except (MemoryError, torch.OutOfMemoryError):
        line, status = "out of memory; lower --batch (encode.py, fid.py) or --micro-batch (jlt.py)", 1
    except OSError as e:                              # disk full, no permission, a network drive gone
        line, status = f"{e.filename or 'writing'}: {e.strerror or e}; what was finished before is kept", 1
    print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)

def make_parser(doc):
    """An argparse parser whose complaints are one line, like all others."""
    def error(message):
        raise Stop(f"{message}; see --help")
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    return parser

def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, not {text!r}")
    return int(text)

@contextmanager
def atomic(path):
    """Yields a temporary name beside `path`, renamed onto it on success and removed on failure: whoever
    reads `path` finds the old file or all of the new one, after a power cut too."""
    tmp = Path(path).with_name(f".tmp.{Path(path).name}")
    try:
        yield tmp
        with open(tmp, "rb+") as file:
            os.fsync(file)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

def pick_device(name=None):
    """"cuda", "cuda:1", "mps", "cpu", or None for the best there is; under torchrun every rank has its own GPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = (name or best).partition(":")
    index = int(index if index.isdecimal() else os.environ.get("LOCAL_RANK", 0))
    if kind not in ("cpu", best) or kind == "cuda" and index >= torch.cuda.device_count():
        raise Stop(f"--device {name or f'cuda:{index}'}: not on this machine, which has {best}")
    return torch.device(kind, index) if kind == "cuda" else torch.device(kind)

# ---------------------------------------------------------------- images
def list_images(folder):
    """Sorted paths, relative to `folder`, of the image files in it and below it (known by extension)."""
    return sorted(os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(folder)
                  for file in files if file.lower().endswith(EXTENSIONS))

def open_rgb(path):
    """Any image file as RGB: its first frame, alpha dropped, not rotated by EXIF (ImageNet's convention).
    16-bit grayscale is scaled to 8 bits; Pillow's convert alone would make it white."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        return image.convert("RGB")

def center_crop(image, size):
    """PIL image -> size x size. ADM's crop (guided-diffusion): halve with a box filter while the short side
    is at least 2 * size, bicubic until it is `size`, cut out the centre. ValueError for endless strips."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > 2 * Image.MAX_IMAGE_PIXELS:   # a 1 x 5000 strip would become 256 x 1,280,000
        raise ValueError(f"{image.width} x {image.height} is too long for a square crop")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))

def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def save_grid(path, images, columns, gap=0):
    """Writes uint8 images (N, 3, H, W) as one PNG, row by row, `gap` white pixels apart."""
    n, _, h, w = images.shape
    tiles = torch.full((-(-n // columns) * columns, 3, h + gap, w + gap), 255, dtype=torch.uint8)
    tiles[:n, :, :h, :w] = images
    sheet = tiles.view(-1, columns, *tiles.shape[1:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    with atomic(path) as tmp:
        Image.fromarray(sheet[:len(sheet) - gap, :sheet.shape[1] - gap].numpy()).save(tmp, "PNG")

# ---------------------------------------------------------------- the VAE
def load_vae(name=VAE, device="cpu"):
    """The frozen AutoencoderKLFlux2 of a hub repository or local folder (there, or in its vae/).
    Raises Stop where there is none or where the weights are another model's."""
    from diffusers import AutoencoderKLFlux2, logging  # here: the import takes seconds
    logging.set_verbosity_error()
    for subfolder in ("vae", None):
        try:
            vae, report = AutoencoderKLFlux2.from_pretrained(name, subfolder=subfolder, output_loading_info=True)
        except Exception as e:                        # of many kinds: the hub's, diffusers', safetensors'
            reason = " ".join(str(e).split())[:160]
        else:
            if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
                raise Stop(f"--vae {name}: the weights there are not an AutoencoderKLFlux2's")
            return vae.eval().requires_grad_(False).to(device)
    raise Stop(f"--vae {name}: cannot be loaded ({reason}); give a folder with an AutoencoderKLFlux2, "
               f"such as: hf download {VAE} --include 'vae/*' --local-dir flux2")

def normalization(vae):
    """Mean and std (1, 128, 1, 1) of the VAE's own BatchNorm, which diffusers leaves to its caller."""
    mean, var = (s.float().view(1, -1, 1, 1) for s in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (var + vae.config.batch_norm_eps).sqrt()

@torch.no_grad()
def encode(vae, images):
    """Images (B, 3, H, W) in [-1, 1] -> normalised latents (B, 128, H/16, W/16), float32: the posterior's
    mode, 2x2 pixels to channels (c*4 + row*2 + column), BatchNorm statistics."""
    mean, std = normalization(vae)
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().float()   # (B, 32, H/8, W/8)
    return (F.pixel_unshuffle(latents, 2) - mean) / std

@torch.no_grad()
def decode(vae, latents):
    """The inverse: normalised latents (B, 128, h, w) -> images (B, 3, 16h, 16w), float32."""
    mean, std = normalization(vae)
    latents = F.pixel_shuffle(latents.to(vae.device).float() * std + mean, 2)           # (B, 32, 2h, 2w)
    return vae.decode(latents.to(vae.dtype)).sample.float()

# ---------------------------------------------------------------- the cache
def open_shard(path):
    """-> header (dict), tensors by name, mapped from disk rather than read. Stop if damaged."""
    try:
        with safe_open(path, "pt") as file:
            shard = {key: file.get_tensor(key) for key in file.keys()}
            header = json.loads((file.metadata() or {}).get("encode", "{}"))
        n, _, _, _ = shard["latents"].shape
        if shard["labels"].shape != (n,) or shard.get("latents_flip", shard["latents"]).shape != shard["latents"].shape:
            raise ValueError("tensors of different lengths")
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise Stop(f"{path}: no shard of latents (N, C, H, W) and labels (N,): {e}; delete it, encode again", 1) from None
    return header, shard

class LatentDataset(torch.utils.data.Dataset):
    """A folder of cached latents, memory-mapped: item i is (latent (C, H, W) float32, label), item(i, True)
    that of the mirrored image. Shards of the paper's code, which have no meta.json, are read as well.
    Raises Stop for a cache that is missing, unfinished, damaged or mixed."""
    def __init__(self, folder):
        files = sorted(Path(folder).glob("latents_*.safetensors"))
        if not files:
            raise Stop(f"{folder}: holds no latents_*.safetensors; make them: python encode.py IMAGES --out {folder}")
        headers, self.shards = zip(*map(open_shard, files))
        meta, want = Path(folder, "meta.json"), headers[0].get("shards")
        if want and (len(files) != want or not meta.exists()):
            raise Stop(f"{folder}: {len(files)} of {want} shards; finish it with the same encode.py command")
        shapes = {shard["latents"].shape[1:] for shard in self.shards}
        if len(shapes) > 1 or len({header.get("encoder") for header in headers}) > 1:
            raise Stop(f"{folder}: mixes latents of several kinds; keep one cache in a folder")
        self.shape = tuple(shapes.pop())              # (C, H, W)
        self.labels = torch.cat([shard["labels"] for shard in self.shards]).long()
        self.ends = np.cumsum([len(shard["labels"]) for shard in self.shards])
        self.meta = json.loads(meta.read_text()) if meta.exists() else {}
        self.num_classes = len(self.meta["classes"]) if self.meta else int(self.labels.max()) + 1 if len(self.labels) else 0
        if not len(self.labels) or self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise Stop(f"{folder}: no latents, or labels outside its {self.num_classes} classes")

    def __len__(self):
        return len(self.labels)

    def item(self, i, flip=False):
        return self.rows([i], [flip])[0].float(), int(self.labels[i])

    def rows(self, indices, flips):
        """Latents (B, C, H, W) as stored; a cache without mirrored latents gives the plain ones."""
        rows = []
        for i, flip in zip(indices, flips):
            k = int(np.searchsorted(self.ends, i, side="right"))
            name = "latents_flip" if flip and "latents_flip" in self.shards[k] else "latents"
            rows.append(self.shards[k][name][i - self.ends[k]])                         # counted from the shard's end
        return torch.stack(rows)

    def __getitem__(self, i):
        return self.item(range(len(self))[i])

# ---------------------------------------------------------------- the command
class Photos(torch.utils.data.Dataset):
    """Decodes and crops in the DataLoader's processes. Item: a list of indices -> those that could be read,
    their images (B, 3, S, S) uint8, and [name, reason] of the others."""
    def __init__(self, root, names, size):
        self.root, self.names, self.size = root, names, size

    def __getitem__(self, indices):
        good, images, bad = [], np.empty((len(indices), self.size, self.size, 3), np.uint8), []
        for i in indices:
            try:
                images[len(good)] = center_crop(open_rgb(os.path.join(self.root, self.names[i])), self.size)
                good.append(i)
            except Exception as e:                    # Pillow raises whatever the file's bytes lead it to
                bad.append([self.names[i], " ".join(str(e).split()) or type(e).__name__])
        return good, torch.from_numpy(images[:len(good)]).permute(0, 3, 1, 2), bad

def scan(folder):
    """-> root, class names, file names, labels; the classes are the sorted folders of `folder`[/train]."""
    root = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else folder
    if not os.path.isdir(root):
        raise Stop(f"{root}: not a folder; give the one that holds the class folders")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    files = [(os.path.join(c, f), label) for label, c in enumerate(classes) for f in list_images(os.path.join(root, c))]
    if not files:
        raise Stop(f"{root}: no images in class folders; arrange them as {os.path.join(root, 'CLASS', 'image.jpg')}")
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
    if args.size % 16:
        raise Stop(f"--size {args.size}: the latent grid needs a multiple of 16")
    device, rank, world = pick_device(args.device), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    root, classes, names, labels = scan(args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    vae = load_vae(args.vae, device)

    # What the shards of one cache have in common; each header says it. Any decoder may be used later.
    weights = b"".join(v.cpu().numpy().tobytes() for k, v in vae.state_dict().items() if "decoder" not in k and "post" not in k)
    parts = [range(k, min(k + args.shard, len(names))) for k in range(0, len(names), args.shard)]
    common = {"size": args.size, "encoder": hashlib.sha256(weights).hexdigest()[:16], "shards": len(parts),
              "files": hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()[:16]}

    def finished():
        """Headers by shard number."""
        headers = {}
        for path in sorted(args.out.glob("latents_*.safetensors")):
            header, _ = open_shard(path)
            for key in common:
                if header.get(key) != common[key]:
                    raise Stop(f"{path}: made with another {key} ({header.get(key)}, now {common[key]}); use another --out")
            headers[header["shard"]] = header
        return headers

    def write(k, latents, kept, skipped):
        """Shard k under its final name; called in a thread, while the GPU is at the next shard."""
        both = torch.cat(latents, 1)                  # (2, N, 128, h, w): as it is, mirrored
        tensors = {"latents": both[0], "latents_flip": both[1], "labels": torch.tensor([labels[i] for i in kept]).int()}
        header = common | {"vae": args.vae, "shard": k, "skipped": skipped}
        with atomic(args.out / f"latents_{k:05d}.safetensors") as tmp:
            tmp.write_bytes(safetensors_bytes({k: v.contiguous() for k, v in tensors.items()}, {"encode": json.dumps(header)}))

    done = finished()
    todo = [k for k in range(rank, len(parts), world) if k not in done]
    print(f"{args.out}: {len(done)} of {len(parts)} shards were there already" if done else
          f"{args.out}: {len(names):,} images of {len(classes)} classes to encode", file=sys.stderr)
    batches = [parts[k][b:b + args.batch] for k in todo for b in range(0, len(parts[k]), args.batch)]
    loader = iter(torch.utils.data.DataLoader(Photos(root, names, args.size), batch_size=None, sampler=batches,
                                              num_workers=args.workers, pin_memory=device.type == "cuda"))
    with ThreadPoolExecutor(1) as writer, tqdm(total=sum(map(len, batches)), unit="image") as bar:
        writing = writer.submit(int)
        for k in todo:
            latents, kept, skipped = [], [], []
            for _ in range(0, len(parts[k]), args.batch):
                good, images, bad = next(loader)
                x = images.to(device, non_blocking=True) / 127.5 - 1                    # (B, 3, S, S)
                latents.append(encode(vae, torch.cat([x, x.flip(-1)])).half().cpu().unflatten(0, (2, -1)))
                kept, skipped = kept + good, skipped + bad
                for name, why in bad:
                    bar.write(f"skipped {ascii(name)}: {why}", file=sys.stderr)
                bar.update(len(good) + len(bad))
            writing.result()                          # raises what went wrong there
            writing = writer.submit(write, k, latents, kept, skipped)
        writing.result()

    if rank:
        return                                        # the first process completes the cache
    while len(list(args.out.glob("latents_*.safetensors"))) < len(parts):
        time.sleep(1)                                 # for the others
    done = finished()
    skipped = sum((done[k]["skipped"] for k in sorted(done)), [])
    unreadable = {name for name, _ in skipped}
    names = [name for name in names if name not in unreadable]
    with atomic(args.out / "meta.json") as tmp:
        tmp.write_text(json.dumps({"vae": args.vae, "size": args.size, "images": len(names), "classes": classes,
                                   "skipped": skipped}, indent=1))
    data = LatentDataset(args.out)                    # read back what training will see
    some = range(0, len(data), -(-len(data) // 512))
    std, mean = torch.std_mean(torch.stack([data[i][0] for i in some]), (0, 2, 3))
    pairs = [x for i in some[::-(-len(some) // 8)] for x in (
        Photos(root, names, args.size)[[i]][1][0], to_uint8(decode(vae, data[i][0][None]))[0].cpu())]
    save_grid(args.out / "reconstructions.png", torch.stack(pairs), columns=4)
    print(f"{args.out}: {len(data):,} images and their mirror images, {len(classes)} classes, {len(parts)} shards; "
          f"{len(skipped)} files skipped; channel means {mean.min():.2f} to {mean.max():.2f}, stds {std.min():.2f} "
          f"to {std.max():.2f} over {len(some)} of them (about 0 and 1 for FLUX.2's own VAE)")

if __name__ == "__main__":
    run(main)
