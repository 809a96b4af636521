"""Images to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                        # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos     # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/   # several GPUs or hosts share the shards

Look at latents/reconstructions.png first: originals, each with what its latent decodes to at its right. Interrupted?
Run the same command again: finished shards are kept, the one in flight is made anew.
"""
import argparse, hashlib, json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fid import LOCAL, PARSER, RANK, WORLD, atomic, conv, list_images, need, open_rgb, reading, run

VAE = "black-forest-labs/FLUX.2-klein-4B"             # Apache-2.0; the VAE is in its folder vae/

# ---------------------------------------------------------------- devices and images
def pick_device(name=None):
    """"cuda", "cuda:1", "mps", "cpu" or None, the best there is; under torchrun every process has its own GPU."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if (name or best) == "cuda" else name or best
    with reading(f"--device {name}", f"not on this machine, which has {best}"):
        name.startswith("cuda") and torch.cuda.set_device(name)
        torch.ones(1, device=name).item()             # "meta" is a device, too, but computes nothing
        return torch.device(name)

def center_crop(image, size):
    """PIL image -> size x size. ADM's crop (guided-diffusion): halve with a box filter while the short side is at
    least 2 * size, bicubic until it is `size`, cut out the centre. Raises Stop for endless strips."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    width, height = (round(side * (size / min(image.size))) for side in image.size)
    need(width * height < 2 * Image.MAX_IMAGE_PIXELS, f"{image.width} x {image.height} is too long a strip for a square crop")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))

def to_uint8(images):                                 # any shape, in [-1, 1]
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
    with reading(f"--vae {name}", f"no AutoencoderKLFlux2 there; try: hf download {VAE} --include 'vae/*' --local-dir flux2"):
        if str(name).endswith("codec.safetensors"):
            return load_file(name)
        from diffusers import AutoencoderKLFlux2, logging               # here: the import takes seconds
        from huggingface_hub import snapshot_download
        logging.set_verbosity_error()
        files = ["vae/*", "config.json", "diffusion_pytorch_model.safetensors"]
        root = Path(name if Path(name).is_dir() else snapshot_download(str(name), allow_patterns=files))
        folder = root / "vae" if (root / "vae").is_dir() else root
        vae, report = AutoencoderKLFlux2.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        need(not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), f"--vae {name}: other weights")
    vae = vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    for module in (vae.encoder, vae.decoder) if vae.device.type == "cuda" else ():      # vae.encode skips a compiled vae
        module.compile(dynamic=False)
    return vae

@torch.no_grad()
def encode(vae, images):
    """Images (B, 3, H, W) in [-1, 1] -> normalised latents (B, 128, H/16, W/16), float32: the posterior's mode, 2x2 pixels
    to channels (c*4 + row*2 + column), and the VAE's own BatchNorm statistics, which diffusers leaves to its caller."""
    if isinstance(vae, dict):                         # the digits' codec, below
        return torch.einsum("bchw,cd->bdhw", F.pixel_unshuffle(images, 16) - vae["mean"], vae["basis"]) / vae["scale"]
    latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode().float()   # (B, 32, H/8, W/8)
    return F.batch_norm(F.pixel_unshuffle(latents, 2), vae.bn.running_mean, vae.bn.running_var, eps=vae.config.batch_norm_eps)

@torch.no_grad()
def decode(vae, latents):
    """The inverse: normalised latents (B, 128, h, w) -> images (B, 3, 16h, 16w), float32."""
    if isinstance(vae, dict):
        latents = latents.cpu().float() * vae["scale"]
        return F.pixel_shuffle(torch.einsum("bdhw,cd->bchw", latents, vae["basis"]) + vae["mean"], 16)
    mean, var = vae.bn.running_mean.view(-1, 1, 1), vae.bn.running_var.view(-1, 1, 1)
    need(latents.shape[1] == len(mean), f"this VAE decodes {len(mean)} channels, the latents have {latents.shape[1]}")
    latents = F.pixel_shuffle(latents.to(vae.device).float() * (var + vae.config.batch_norm_eps).sqrt() + mean, 2)
    return vae.decode(latents.to(vae.dtype)).sample.float()                             # of (B, 32, 2h, 2w)

# ---------------------------------------------------------------- the built-in data: digits, and a codec for them
STROKES = ("50 20 13 16 29 59 86 83 50 20", "22 50 59", "12 30 60 82 74 19 89", "11 40 70 82 64 44 64 86 78 49 18",
           "60 16 86 66 60 69", "80 20 14 54 86 78 49 18", "70 32 15 18 49 78 86 65 35 16", "10 80 39",
           "54 22 20 60 82 54 16 18 49 79 86 54", "29 67 84 81 50 21 13 34 64 83")      # 0 to 9: pen paths, "xy" each

def draw_digits(n, seed):
    """Images uint8 (n, 3, 32, 32) and labels (n,) of classes 0, 1, ..., 9, 0, ...: bright strokes on dark paper, of
    random colour, thickness, shape, slant, rotation, size and position. A pixel is ink by its distance to the path."""
    g, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 10
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=g)
    paths = torch.tensor([[int(xy[0]) + 1j * int(xy[1]) for xy in (s.split() + 12 * [s[-2:]])[:12]] for s in STROKES])    # x + iy
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
    codec_file, shard = folder / "codec.safetensors", folder / "latents_00000.safetensors"
    if not shard.exists():
        images, labels = draw_digits(n, seed=1)
        patches = F.pixel_unshuffle(images / 127.5 - 1, 16).movedim(1, -1).flatten(0, 2)                 # (4n, 768)
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))                                        # ascending
        codec = {"mean": patches.mean(0)[:, None, None], "basis": vectors[:, -128:].flip(1).contiguous(),
                 "scale": values[-128:].mean().sqrt()}
        z = encode(codec, images / 127.5 - 1)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(codec_file) as tmp:
            tmp.write_bytes(save(codec))
        save_shard(shard, z, z, labels, vae=str(codec_file.resolve()))              # a mirrored 3 is no digit

def digit_judge(images, labels, steps=250):
    """The demo's Inception, trained in seconds on these digits: images (B, 3, 32, 32) in [-1, 1] -> logits (B, 10)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(conv(3, 16, "3x3/2"), conv(16, 32, "3x3/2"), conv(32, 64, "3x3/2"), nn.Flatten(),
                            nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, 10))
        order = torch.randint(len(images), (steps, 128))
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for batch in order:
        F.cross_entropy(net(images[batch] / 127.5 - 1), labels[batch]).backward()
        opt.step()
        opt.zero_grad()
    return net.eval().requires_grad_(False)

# ---------------------------------------------------------------- the cache
def save_shard(path, latents, flipped, labels, **header):
    tensors = {"latents": latents.half().contiguous(), "latents_flip": flipped.half().contiguous(), "labels": labels.int()}
    with atomic(path) as tmp:                         # one key: safetensors writes several in random order
        tmp.write_bytes(save(tensors, {"encode": json.dumps(header)}))

def open_shard(path):
    """-> header (dict), tensors by name, mapped from disk rather than read. Raises Stop if damaged."""
    advice = "no shard of latents (N, C, H, W) and labels (N,); delete it and encode again"
    with reading(path, advice, 1), safe_open(path if path.is_file() else "", "pt") as file:              # a pipe would block
        shard = {key: file.get_tensor(key) for key in file.keys()}
        (n, c, h, w), y, flipped = (x := shard["latents"]).shape, shard["labels"], shard.get("latents_flip", x)
        need(c and h == w > 0 and (flipped.shape, y.shape) == (x.shape, (n,)) and not y.is_floating_point(), f"{path}: {advice}", 1)
        return dict(json.loads((file.metadata() or {}).get("encode", "{}"))), shard

class LatentDataset(Dataset):
    """A folder of cached latents, memory-mapped: item(i) is (latent (C, H, W) float32, label), item(i, True) that of the
    mirrored image, if there. Raises Stop for a cache (also the paper's) that is missing, unfinished, damaged or mixed."""
    def __init__(self, folder):
        files = sorted(Path(folder).glob("latents_*.safetensors"))
        need(files, f"{folder}: holds no latents_*.safetensors; make them: python encode.py IMAGES --out {folder}")
        self.headers, self.shards = zip(*map(open_shard, files))
        there, n, want = [h.get("number", k) for k, h in enumerate(self.headers)], len(files), self.headers[0].get("shards", len(files))
        need([n, *there] == [want, *range(n)], f"{folder}: {n} of {want} shards; the same encode.py command finishes it")
        self.ends = np.cumsum([len(shard["labels"]) for shard in self.shards])
        self.labels = torch.cat([shard["labels"] for shard in self.shards]).long()
        kinds = {(tuple(s["latents"].shape[1:]), str(h.get("encoder")), str(h.get("files"))) for s, h in zip(self.shards, self.headers)}
        need(len(kinds) == 1, f"{folder}: mixes latents of different shape or origin {kinds}; keep one cache in a folder")
        self.shape, *self.origin = kinds.pop()        # (C, H, W); digests of the encoder and of the file names
        low, high = map(int, self.labels.aminmax()) if len(self) else (-1, -1)
        self.num_classes = self.headers[0].get("classes", high + 1)
        need(isinstance(self.num_classes, int) and 0 <= low <= high < self.num_classes,
             f"{folder}: holds no latents (was no image readable?), or labels ({low} to {high}) of {self.num_classes} classes")

    def item(self, i, flip=False):
        i = range(len(self))[i]
        shard = self.shards[k := np.searchsorted(self.ends, i, side="right")]
        latents = shard["latents_flip" if flip and "latents_flip" in shard else "latents"]
        return latents[i - self.ends[k]].float(), int(self.labels[i])                   # counted from the shard's end
    __getitem__, __len__ = item, lambda self: len(self.labels)

# ---------------------------------------------------------------- the command
class Photos(Dataset):
    """The images of a folder[/train] of class folders: item i is a crop, uint8 (3, S, S), and why it could not be read."""
    def __init__(self, folder, size):
        root = os.path.join(folder, "train") if os.path.isdir(os.path.join(folder, "train")) else folder
        need(os.path.isdir(root), f"{root}: not a folder; give the one that holds the class folders")
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        files = [(os.path.join(c, f), y) for y, c in enumerate(self.classes) for f in list_images(os.path.join(root, c))]
        need(files, f"{root}: no images in class folders; arrange them as {os.path.join(root, 'CLASS', 'image.jpg')}")
        self.root, self.size, self.names, self.labels = root, size, [f for f, _ in files], torch.tensor([y for _, y in files])

    def __getitem__(self, i):                         # runs in the DataLoader's processes
        try:
            image, why = np.array(center_crop(open_rgb(os.path.join(self.root, self.names[i])), self.size)), ""
        except Exception as e:                        # Pillow raises whatever the file's bytes lead it to
            image, why = np.zeros((self.size, self.size, 3), np.uint8), " ".join(str(e).split()) or type(e).__name__
        return torch.from_numpy(image).permute(2, 0, 1), why

def encode_shards(vae, photos, shards, args, header):
    """Encodes the photos of every shard {path: range of file numbers} and writes it."""
    batches = [part[b:b + args.batch] for part in shards.values() for b in range(0, len(part), args.batch)]
    loader = iter(DataLoader(photos, batch_sampler=batches, num_workers=min(args.workers, len(batches)),
                             pin_memory=vae.device.type == "cuda"))
    with ThreadPoolExecutor(1) as writer, tqdm(total=sum(map(len, batches)), unit="image") as bar:
        writing = writer.submit(int)                  # a shard is written while the GPU is at the next
        for path, part in shards.items():
            latents, reasons = [], []
            for _ in range(0, len(part), args.batch):
                images, why = next(loader)            # uint8 (B, 3, S, S)
                x = images.to(vae.device, non_blocking=True) / 127.5 - 1
                latents.append(encode(vae, torch.cat([x, x.flip(-1)])).half().cpu().unflatten(0, (2, -1)))
                reasons += why
                bar.update(len(why))
            skipped = [(photos.names[i], why) for i, why in zip(part, reasons) if why]
            for name, why in skipped:
                bar.write(f"skipped {ascii(name)}: {why}", file=sys.stderr)
            good = torch.tensor([not why for why in reasons])
            writing.result()                          # raises what went wrong there
            writing = writer.submit(save_shard, path, *torch.cat(latents, 1)[:, good], photos.labels[part][good],
                                    number=part.start // args.shard, skipped=skipped, **header)
        writing.result()

def main():
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    add = parser.add_argument
    add("images", help="folder of class folders; its train/ is used where it exists")
    add("--out", default="latents", type=Path, help="folder of the cache (%(default)s)")
    add("--vae", default=VAE, help="hub repository or folder of an AutoencoderKLFlux2 (%(default)s)")
    add("--size", default=256, type=int, help="side of the square crop in pixels (%(default)s)")
    add("--batch", default=32, type=int, help="images at a time, each encoded as it is and mirrored (%(default)s)")
    add("--shard", default=1024, type=int, help="images in a file; a kill can cost two of them (%(default)s)")
    add("--workers", default=-(-os.cpu_count() // LOCAL), type=int, help="processes that decode images (%(default)s)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    args = parser.parse_args()
    for flag, unit in {"size": 16, "batch": 1, "shard": 1, "workers": 1}.items():
        need((x := getattr(args, flag)) > 0 and x % unit == 0, f"--{flag} {x}: needs a positive multiple of {unit}")
    out, photos, device = args.out, Photos(args.images, args.size), pick_device(args.device)
    vae, n = load_vae(args.vae, device), len(photos.names)
    need(not isinstance(vae, dict), f"--vae {args.vae}: a codec for the demo's digits; photographs need an AutoencoderKLFlux2")
    # What all shards of a cache have in common, in each one's header. (The decoder may be replaced by another.)
    digest = lambda data: hashlib.sha256(data).hexdigest()[:16]
    weights = b"".join(v.cpu().numpy().tobytes() for k, v in vae.state_dict().items() if "decoder" not in k and "post" not in k)
    origin = {"encoder": digest(weights), "files": digest(os.fsencode("\0".join(photos.names + photos.classes))),
              "classes": len(photos.classes), "size": args.size, "shard": args.shard, "shards": -(-n // args.shard)}
    shards = {out / f"latents_{k:05d}.safetensors": range(first, min(first + args.shard, n))
              for k, first in enumerate(range(0, n, args.shard))}
    out.mkdir(parents=True, exist_ok=True)
    for path in (done := sorted(out.glob("latents_*.safetensors"))):
        (was, _), now = open_shard(path), origin | {"number": shards.get(path, range(0)).start // args.shard}
        other = [f"{key} {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key]]
        need(not other, f"{path}: of another origin ({'; '.join(other)}); give another --out")
    print(f"{out}: {n:,} files, {len(photos.classes)} classes; {len(done)} of {len(shards)} shards there already", file=sys.stderr)
    if RANK == 0:
        few = torch.stack([image for image, why in (photos[i] for i in range(0, n, -(-n // 8))) if not why] or [photos[0][0]])
        decoded = to_uint8(decode(vae, encode(vae, few / 127.5 - 1))).cpu()
        save_grid(out / "reconstructions.png", torch.stack([few, decoded], 1).flatten(0, 1), columns=2 if len(few) % 2 else 4)
    mine = {path: part for path, part in list(shards.items())[RANK::WORLD] if not path.exists()}
    encode_shards(vae, photos, mine, args, {"vae": os.path.realpath(args.vae) if os.path.isdir(args.vae) else args.vae} | origin)
    if RANK == 0:                                     # waits for the other processes and completes the cache
        while not all(path.exists() for path in shards):
            time.sleep(1)
        data = LatentDataset(out)
        skipped = [pair for header in data.headers for pair in header["skipped"]]
        with atomic(out / "meta.json") as tmp:
            tmp.write_text(json.dumps(origin | {"classes": photos.classes, "images": len(data), "skipped": skipped}, indent=1))
        std, mean = torch.std_mean(torch.stack([data[i][0] for i in range(0, len(data), -(-len(data) // 512))]), (0, 2, 3), False)
        print(f"{out}: {len(data):,} images and mirror images in {len(shards)} shards; {len(skipped)} files skipped; channel means "
              f"{mean.min():.2f} to {mean.max():.2f}, stds {std.min():.2f} to {std.max():.2f} (FLUX.2's: about 0 and 1)")

if __name__ == "__main__":
    run(main)
