"""Pictures to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                         # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos      # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/    # several GPUs share the work

Look at latents/reconstructions.png first: originals, and below each of them what its latent decodes
to. Interrupted? The same command continues: finished shards stay.

This file is also the ground that jlt.py and fid.py stand on. From top to bottom: mistakes, files
and folders; pictures; the VAE; the cache; the command; and, for jlt.py's demo alone, drawn digits.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# The default VAE, under the Apache-2.0 licence, in the folder vae/ of this repository of the
# Hugging Face hub.
VAE = "black-forest-labs/FLUX.2-klein-4B"


# =============================================================== mistakes, files and folders
class Stop(ValueError):
    """A mistake that one line explains."""

    def __init__(self, line):
        # A DataLoader hands on what its reader processes raise as a traceback with the line at
        # its end.
        super().__init__(line.rpartition("encode.Stop: ")[2])


def require(condition, line):
    """Raises Stop with this line unless the condition holds."""
    if not condition:
        raise Stop(line)


@contextlib.contextmanager
def explaining(what, advice):
    """Makes a Stop of whatever goes wrong inside: Pillow, safetensors, torch.load and the hub each
    have errors of their own."""
    try:
        yield
    except (Stop, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).split(". ")[0][:200] or type(error).__name__
        raise Stop(f"{what}: {advice} ({reason})") from None


def run_command(main):
    """Calls main(). A mistake or Ctrl-C becomes one line and exit status 1."""
    # A terminal may lack the letters of a path; printing it must not end the program.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        line = "interrupted"
    except torch.OutOfMemoryError:
        line = "out of memory; lower --batch (encode.py) or --micro-batch (jlt.py)"
    except (ConnectionError, EOFError):
        line = "a process that reads was killed; fewer --workers need less memory"
    except (Stop, OSError) as error:
        line = " ".join(str(error).split())
    sys.exit(f"{Path(sys.argv[0]).name}: {line}")


def make_parser(description, parents=()):
    """-> an ArgumentParser with the flags of others that prints a program's docstring as it is."""
    return argparse.ArgumentParser(
        description=description,
        parents=parents,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive(text):
    """The type of a flag: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def processes():
    """-> this process's number and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores():
    """-> how many cores this process may use; a container or a scheduler may allow a few only."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def pick_device(name=""):
    """cuda, cuda:1, mps, cpu, or "" for the best there is -> torch.device. Under torchrun every
    process has a GPU of its own. Raises Stop for a device that is not there."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with explaining(f"--device {name}", f"not on this machine, which has {best}"):
        device = torch.device(name or best)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.ones(1, device=device)
    return device


def ignore_interrupts(worker):
    """For the reader processes of a DataLoader: Ctrl-C reaches them, too, and the main process
    alone is to speak of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A reader that is handing over a batch loses its connection, which a thread would report.
    sys.excepthook = lambda *error: None


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name that becomes `path` once the file is written: whoever reads `path`
    finds what was there before or all of the new file, also after a power cut. One process at a
    time may write a path."""
    temporary = path.with_name(f".tmp.{path.name}")
    yield temporary
    with open(temporary, "rb+") as file:
        os.fsync(file)
    os.replace(temporary, path)


def wait_for_files(paths):
    """Until the other processes have written theirs."""
    for path in paths:
        while not path.exists():
            time.sleep(0.1)


def refuse_other_settings(folder, settings, defaults=None):
    """Makes a folder that says in settings.json what its files are made with, before the first of
    them is there. Later commands must have the same settings, whatever else is in it, so that
    nothing is mixed or overwritten: raises Stop, naming what differs. A setting that an older
    version did not write down counts as its default."""
    path = folder / "settings.json"
    if processes()[0] == 0 and not path.exists():
        foreign = any(folder.glob("[!.]*"))
        require(not foreign, f"{folder}: has files, but no settings.json; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    wait_for_files([path])
    old = (defaults or {}) | read_settings(folder)
    changes = [
        f"{name} {old.get(name)!s:.200} (now {value!s:.200})"
        for name, value in settings.items()
        if old.get(name) != value
    ]
    line = f"{folder}: made with other settings: {', '.join(changes)}; give another --out"
    require(not changes, line)


def read_settings(folder):
    """-> what settings.json in a folder says; {} where there is none."""
    path = folder / "settings.json"
    return json.loads(path.read_text()) if path.exists() else {}


# =============================================================== pictures
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".mpo",
)
# Pillow refuses text and colour profiles above 1 MB in a PNG, whose pixels may be fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def list_images(folder, above=()):
    """Sorted paths, relative to `folder`, of the image files in it and below it. Links to folders
    are followed, unless they lead back to one of the folders `above`. Left out are folders of this
    project's own files, such as a cache: they have a settings.json."""
    place = os.path.realpath(folder)
    if place in above or not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        # Left behind by editors, notebooks, network drives and Macs: nobody's pictures.
        if path.name.startswith((".", "@eaDir", "__MACOSX")):
            continue
        if path.name.lower().endswith(EXTENSIONS):
            found.append(path.name)
        elif not (path / "settings.json").exists():
            found += [os.path.join(path.name, name) for name in list_images(path, (*above, place))]
    return sorted(found)


def open_rgb(path, upright=False):
    """Any image file as an RGB PIL image: its first frame, transparency dropped, 16-bit grayscale
    scaled to 8 bits. `upright` turns it as its EXIF data asks. Raises Stop for other depths,
    of which nothing says what is white."""
    with Image.open(path) as image:
        image.load()
        # Mode I of a PNG or PGM has 16 bits, that of a TIFF 32, or signs.
        known = image.format != "TIFF" or image.mode not in ("I", "F")
        require(known, "has float, signed or 32-bit pixels; convert it to 8 or 16 bits")
        if upright:
            # Damaged EXIF data costs the turn, not the picture.
            with contextlib.suppress(Exception):
                image = ImageOps.exif_transpose(image)
        if "I" in image.mode:
            # Pillow's convert would clip 16 bits to white. 65535 / 257 is 255.
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        # The transparent colour of a palette. Were it left there, Pillow would warn of it here,
        # and fail when the result is saved.
        image.info.pop("transparency", None)
        return image.convert("RGB")


def center_crop(image, size):
    """PIL image -> its centre, size x size pixels. ADM's crop (guided-diffusion): halve with a box
    filter while the short side is at least twice `size`, bicubic until it is `size`, cut out.
    Raises Stop for a strip, which might be enlarged to gigabytes before it is cut."""
    require(max(image.size) <= 50 * min(image.size), "a strip, over 50 times as long as wide")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    image = ImageOps.scale(image, size / min(image.size), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def from_pil(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images / 127.5 - 1


def to_uint8(images):
    """Values in [-1, 1] -> uint8, any shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(path, image):
    """Writes a uint8 image (3, H, W)."""
    with replacing(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary)


def image_grid(images, columns):
    """uint8 images (N, 3, H, W), N a multiple of `columns` -> one (3, rows H, columns W)."""
    rows = images.unflatten(0, (-1, columns))  # (rows, columns, 3, H, W)
    return rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


# =============================================================== the VAE
class Flux2VAE:
    """The FLUX.2 autoencoder (diffusers' AutoencoderKLFlux2), frozen, with latents as a transformer
    takes them.

    The encoder gives a Gaussian for each position of 32 channels. Its most likely value, the mode,
    is kept, so that a picture always has the same latent. Each 2x2 positions become one of 128
    channels. Then each channel is normalised, to about mean 0 and standard deviation 1, which is
    the scale of the noise that training adds. The means and variances are those of the training
    images of FLUX.2; they are in its BatchNorm layer `bn`, which diffusers' own encode and decode
    leave to their callers."""

    pixels = 16  # the encoder's 8, twice

    def __init__(self, autoencoder):
        self.autoencoder = autoencoder
        self.device = autoencoder.device
        self.channels = len(autoencoder.bn.running_mean)
        variance = autoencoder.bn.running_var + autoencoder.config.batch_norm_eps
        self.mean = autoencoder.bn.running_mean[:, None, None]  # (128, 1, 1)
        self.std = variance.sqrt()[:, None, None]

    def encode(self, images):
        latents = self.autoencoder.encode(images.to(self.device)).latent_dist.mode()
        # (B, 32, H/8, W/8) -> (B, 128, H/16, W/16), of channels c * 4 + row * 2 + column.
        return (F.pixel_unshuffle(latents, 2) - self.mean) / self.std

    def decode(self, latents):
        latents = latents.to(self.device) * self.std + self.mean
        return self.autoencoder.decode(F.pixel_shuffle(latents, 2)).sample


def load_vae(name=VAE, device="cpu", compiled=False):
    """The VAE of a hub repository, or of a local folder that holds the weights, itself or in its
    vae/; or, from a file codec.safetensors, the DigitCodec of the demo (at the end of this file).
    Raises Stop where there is none, or where the weights are another model's.

    A VAE of another kind can take its place if it has `encode` and `decode` (as the functions
    below), `channels` of a latent, `pixels`, the side of the square that becomes one position, and
    the `device` on which it is.

    `compiled`: for many images of one shape; at the first of them it takes a minute or two."""
    if str(name).endswith("codec.safetensors"):
        return DigitCodec(**load_file(name))
    advice = (
        "no AutoencoderKLFlux2 there; to fetch one: "
        f"hf download {VAE} --include 'vae/*' --local-dir flux2, then --vae flux2"
    )
    with explaining(f"--vae {name}", advice):
        # Here, since the import takes seconds.
        from diffusers import AutoencoderKLFlux2, logging
        from huggingface_hub import snapshot_download

        logging.set_verbosity_error()
        folder = Path(name)
        if not folder.is_dir():
            files = ["vae/*", "config.json", "diffusion_pytorch_model.safetensors"]
            folder = Path(snapshot_download(name, allow_patterns=files))
        if (folder / "vae").is_dir():
            folder = folder / "vae"
        autoencoder, report = AutoencoderKLFlux2.from_pretrained(
            folder, torch_dtype=torch.float32, output_loading_info=True
        )
        # diffusers only warns of keys that are missing, unexpected or of another shape.
        require(not any(report.values()), f"--vae {name}: holds the weights of another model")
    # In float32, with the TF32 products that cuDNN takes by default on CUDA: they move latents by
    # 0.2% of their deviation; bfloat16 would by 2%.
    autoencoder.requires_grad_(False).to(device, memory_format=torch.channels_last)
    if compiled:
        # One by one: autoencoder.compile() compiles its forward(), which is not called here.
        autoencoder.encoder.compile(dynamic=False)
        autoencoder.decoder.compile(dynamic=False)
    return Flux2VAE(autoencoder)


def encode(vae, images):
    """Images (B, 3, H, W) in [-1, 1] -> normalised latents (B, C, H/pixels, W/pixels) float32; for
    FLUX.2's VAE (B, 128, H/16, W/16), the mode of its posterior."""
    return vae.encode(images)


def decode(vae, latents):
    """Normalised latents (B, C, h, w) -> images (B, 3, h pixels, w pixels), about in [-1, 1]."""
    return vae.decode(latents)


# =============================================================== the cache
SHARD = 1024  # images in a file
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def save_shard(path, latents, latents_flip, labels):
    """Writes latents, and those of the mirrored images, (N, C, H, W) as fp16; labels as int32."""
    tensors = {
        "latents": latents.half().contiguous(),
        "latents_flip": latents_flip.half().contiguous(),
        "labels": labels.int(),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary)


class LatentDataset(Dataset):
    """A folder of cached latents, made by encode.py or by the code that the paper's authors
    released. Item i is (latent (C, H, W) float32, label); item(i, flip=True) is that of the
    mirrored image or, where the cache has no mirrored images, of the image itself. Raises Stop for
    a cache that is missing, unfinished, damaged or mixed.

    `shape` (C, H, W), `labels` (N,), `num_classes`, `class_names` (empty where they are not
    known), and `settings`, what encode.py wrote in settings.json."""

    def __init__(self, folder):
        folder = Path(folder)
        self.paths = sorted(folder.glob("latents_*.safetensors"))
        require(
            self.paths,
            f"{folder}: holds no latents_*.safetensors; encode.py IMAGES --out {folder} makes them",
        )
        self.settings = read_settings(folder)
        wanted = self.settings.get("shards", len(self.paths))
        line = f"{folder}: {len(self.paths)} of {wanted} shards; the same encode.py command goes on"
        require(len(self.paths) == wanted, line)

        labels, kinds, self.offsets = zip(*map(read_header, self.paths), strict=True)
        require(len(set(kinds)) == 1, f"{folder}: mixes latents of different shapes or types")
        *self.shape, self.dtype = kinds[0]
        self.starts = np.cumsum([0, *map(len, labels)])  # the number of each file's first latent
        self.labels = torch.cat(labels)
        require(len(self.labels), f"{folder}: holds no latents; was no image readable?")
        self.class_names = self.settings.get("classes", [])
        self.num_classes = len(self.class_names) or int(self.labels.max()) + 1

    def __len__(self):
        return len(self.labels)

    def read(self, i, flip=False):
        """-> latent i (C, H, W) in the precision of the file."""
        shard = np.searchsorted(self.starts, i, side="right") - 1
        path = self.paths[shard]
        size = math.prod(self.shape) * self.dtype.itemsize
        # Read, not mapped: a page fault would fetch the disk's whole read-ahead, up to 8 MB, for
        # these 64 KB.
        with explaining(path, "cannot be read"), open(path, "rb", buffering=0) as file:
            file.seek(self.offsets[shard][flip] + int(i - self.starts[shard]) * size)
            data = bytearray(file.read(size))
            return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def item(self, i, flip=False):
        """-> latent i (C, H, W) float32, label."""
        return self.read(i, flip).float(), int(self.labels[i])

    __getitem__ = item


def read_header(path):
    """-> labels (n,); channels, height, width and type of a latent; and where in the file latents
    and those of the mirrored images begin. Raises Stop for a file of anything else."""
    advice = "no shard of square latents (N, C, H, H) and labels (N,); delete it and encode again"
    with explaining(path, advice):
        # safetensors checks that the header fits the file's length, but does not tell where in the
        # file a tensor begins. A file is: the header's length in 8 bytes, the header, tensors.
        with safe_open(path, "pt") as file:
            labels = file.get_tensor("labels").long()
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
        latents = header["latents"]
        flipped = header.get("latents_flip", latents)
        count, channels, height, width = latents["shape"]
        require(height == width and len(labels) == count, f"{path}: {advice}")
        offsets = [start + part["data_offsets"][0] for part in (latents, flipped)]
        return labels, (channels, height, width, DTYPES[latents["dtype"]]), offsets


# =============================================================== the command
class Photos(Dataset):
    """The images in the class folders of a folder, or of its train/ where that has some. Item i is
    a crop, uint8 (3, S, S), and its label; of a file that cannot be read, black and -1."""

    def __init__(self, folder, size):
        for root in (Path(folder) / "train", Path(folder)):
            names = [name for name in list_images(root) if os.sep in name]
            if names:
                break
        require(names, f"{folder}: no images in class folders; arrange them as CLASS/image.jpg")
        self.size = size
        self.root = root
        self.names = names
        self.classes = sorted({name.split(os.sep)[0] for name in names})

    def __len__(self):
        return len(self.names)

    # Called in the DataLoader's processes.
    def __getitem__(self, i):
        name = self.names[i]
        try:
            image = center_crop(open_rgb(self.root / name, upright=True), self.size)
            return from_pil(image), self.classes.index(name.split(os.sep)[0])
        except Exception as error:
            # Pillow raises whatever the file's bytes lead it to.
            print(f"skipped {name!a}: {error}", file=sys.stderr)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1


def save_reconstructions(path, vae, photos):
    """A picture of up to eight originals and, below each, what its latent decodes to."""
    some = range(0, len(photos), math.ceil(len(photos) / 8))
    originals = torch.stack([photos[i][0] for i in some])
    decoded = to_uint8(decode(vae, encode(vae, to_float(originals)))).cpu()
    save_png(path, image_grid(torch.cat([originals, decoded]), columns=len(some)))


def encode_shards(vae, photos, shards, workers):
    """Encodes and writes the shards {path: batches of numbers of images}."""
    # One loader for all of them, whose processes go on reading while a shard is written.
    batches = [batch for shard in shards.values() for batch in shard]
    arriving = iter(
        DataLoader(
            photos, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_interrupts
        )
    )
    bar = tqdm(total=sum(map(len, batches)), unit="image", disable=processes()[0] > 0)
    for path, shard in shards.items():
        parts = []
        for _ in shard:
            images, labels = next(arriving)  # uint8 (B, 3, S, S), (B,)
            x = to_float(images.to(vae.device))
            latents, flipped = encode(vae, torch.cat([x, x.flip(-1)])).cpu().chunk(2)
            readable = labels >= 0
            parts.append((latents[readable], flipped[readable], labels[readable]))
            bar.update(len(images))
        save_shard(path, *map(torch.cat, zip(*parts, strict=True)))


def summarize(folder, files):
    """Says what a finished cache holds of so many files."""
    data = LatentDataset(folder)
    some = range(0, len(data), len(data) // 512 + 1)
    std, mean = torch.std_mean(torch.stack([data[i][0] for i in some]), (0, 2, 3))  # (C,)
    print(
        f"{folder}: {len(data):,} images and their mirror images; {files - len(data)} files "
        f"skipped; channel means {mean.min():.2f} to {mean.max():.2f}, standard deviations "
        f"{std.min():.2f} to {std.max():.2f} (FLUX.2's: about 0 and 1)"
    )


def read_flags():
    """-> the settings of the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", help="folder of class folders; its train/ is used where it holds some")
    add("--out", default="latents", type=Path, help="folder of the cache (%(default)s)")
    add("--vae", default=VAE, help="hub repository or folder of a VAE (%(default)s)")
    add("--size", default=256, type=positive, help="side of the crop in pixels (%(default)s)")
    add("--batch", default=32, type=positive, help="images at a time, with mirrors (%(default)s)")
    # Under torchrun the processes share the cores.
    share = cores() // processes()[1]
    add("--workers", default=share, type=int, help="processes that read images (%(default)s here)")
    add("--device", default="", help="cuda, mps or cpu (the best there is)")
    return parser.parse_args()


def main():
    args = read_flags()
    rank, world = processes()
    photos = Photos(args.images, args.size)
    if rank == 0:
        print(
            f"{photos.root}: {len(photos):,} files, {len(photos.classes)} classes, "
            f"{photos.classes[:5]} ...",
            flush=True,
        )
    device = pick_device(args.device)
    # Compiling pays for many images only.
    vae = load_vae(args.vae, device, compiled=device.type == "cuda" and len(photos) > 20_000)
    require(args.size % vae.pixels == 0, f"--size {args.size}: no multiple of {vae.pixels}")
    # A batch is of one shard: whatever is missing, a picture is encoded beside the same others.
    shards = {
        args.out / f"latents_{k:05d}.safetensors": numbers.split(args.batch)
        for k, numbers in enumerate(torch.arange(len(photos)).split(SHARD))
    }
    # A cache of other pictures, or by another VAE, is not added to.
    refuse_other_settings(
        args.out,
        {
            "vae": args.vae,
            "size": args.size,
            "files": hashlib.sha256(repr(photos.names).encode()).hexdigest(),
            "shards": len(shards),
            "classes": photos.classes,
        },
    )

    # By number, not by what is missing: the processes look at different moments.
    missing = {path: shards[path] for path in list(shards)[rank::world] if not path.exists()}
    if rank == 0:
        print(f"this process makes {len(missing)} of {len(shards)} shards")
        save_reconstructions(args.out / "reconstructions.png", vae, photos)
    encode_shards(vae, photos, missing, args.workers)
    if rank == 0:
        wait_for_files(shards)
        summarize(args.out, len(photos))


# =============================================================== drawn digits
# Not needed for photographs: the data of `jlt.py --demo`, its picture, and a codec that is to the
# digits what the FLUX.2 VAE is to photographs.

# The path of a pen for each of 0 to 9: 12 points, x then y, of a 10 x 10 grid, y downwards. Shorter
# paths stay at their last point.
STROKES = (
    "50 20 13 16 29 59 86 83 50 20 20 20",
    "22 50 59 59 59 59 59 59 59 59 59 59",
    "12 30 60 82 74 19 89 89 89 89 89 89",
    "11 40 70 82 64 44 64 86 78 49 18 18",
    "60 16 86 66 60 69 69 69 69 69 69 69",
    "80 20 14 54 86 78 49 18 18 18 18 18",
    "70 32 15 18 49 78 86 65 35 16 16 16",
    "10 80 39 39 39 39 39 39 39 39 39 39",
    "54 22 20 60 82 54 16 18 49 79 86 54",
    "29 67 84 81 50 21 13 34 64 83 83 83",
)


# A point of the plane is x + iy, so that turning and scaling a path is one multiplication.
PATHS = torch.tensor([complex(int(x), int(y)) for stroke in STROKES for x, y in stroke.split()])


def draw_digits(n, seed):
    """n drawn digits of classes 0, 1, ..., 9, 0, ... -> images uint8 (n, 3, 32, 32), labels (n,).
    Bright ink on dark paper; colour, thickness, shape, slant, rotation, size, place are random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.arange(n) % 10
    paths = PATHS.view(10, 12)[labels] / 9 - (0.5 + 0.5j)  # (n, 12), about the origin
    paths = paths + 0.012 * torch.complex(*torch.randn(2, n, 12, generator=generator))
    # Digits are narrower than tall, and lean.
    slanted = 0.75 * paths.real + uniform(-0.15, 0.15, 1) * paths.imag
    paths = torch.complex(slanted, paths.imag)
    paths = paths * torch.polar(uniform(20, 24, 1), uniform(-0.12, 0.12, 1))  # size, rotation
    paths = paths + torch.complex(*uniform(14.5, 17.5, 2, 1).unbind(1))

    width = uniform(2.2, 3.6, 1, 1)
    ink = uniform(0.6, 1, 3, 1)
    paper = uniform(0, 0.3, 3, 1)
    side = torch.arange(32) + 0.5
    pixels = torch.complex(side.repeat(32), side.repeat_interleave(32))  # (1024,)
    # How far each pixel is from the nearest of the eleven straight pieces of the path.
    distance = torch.tensor(math.inf)
    for start, end in pairwise(paths.T[..., None, None]):  # (n, 1, 1)
        piece = end - start
        along = ((pixels - start) * piece.conj()).real / piece.abs().square().clamp(min=1e-6)
        distance = distance.minimum((pixels - start - along.clamp(0, 1) * piece).abs())
    # A pixel at the edge of the stroke is ink in part.
    cover = (width / 2 - distance + 0.5).clamp(0, 1)  # (n, 1, 1024)
    colours = paper + (ink - paper) * cover  # (n, 3, 1024)
    return (colours * 255).round().to(torch.uint8).view(-1, 3, 32, 32), labels


class DigitCodec:
    """FLUX.2's VAE in miniature, for drawn digits: a patch of 16x16x3 pixels becomes its 128
    principal components, all divided by one number, so that weak ones stay weak."""

    pixels = 16

    def __init__(self, mean, basis, scale):
        self.mean = mean  # (768, 1, 1)
        self.basis = basis  # (768, 128), orthonormal columns
        self.scale = scale
        self.device = mean.device
        self.channels = basis.shape[1]

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 128, H/16, W/16)."""
        patches = F.pixel_unshuffle(images, 16) - self.mean
        return torch.einsum("bchw,cd->bdhw", patches, self.basis) / self.scale

    def decode(self, latents):
        """The projection back: (B, 128, h, w) -> (B, 3, 16h, 16w)."""
        latents = latents.cpu() * self.scale
        patches = torch.einsum("bdhw,cd->bchw", latents, self.basis) + self.mean
        return F.pixel_shuffle(patches, 16)


def cache_digits(folder, n=10_000):
    """Writes n digits as a cache like any other, with their codec, unless they are there."""
    folder = Path(folder)
    codec_file = folder / "codec.safetensors"
    shard = folder / "latents_00000.safetensors"
    if shard.exists():
        return
    settings = {"vae": str(codec_file.resolve()), "shards": 1, "classes": list("0123456789")}
    refuse_other_settings(folder, settings)
    images, labels = draw_digits(n, seed=1)
    images = to_float(images)
    patches = F.pixel_unshuffle(images, 16).movedim(1, -1).flatten(0, 2)  # (4n, 768)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    codec = {
        "mean": patches.mean(0)[:, None, None],
        "basis": vectors[:, -128:].flip(1).contiguous(),
        "scale": values[-128:].mean().sqrt(),
    }
    with replacing(codec_file) as temporary:
        save_file(codec, temporary)
    latents = DigitCodec(**codec).encode(images)
    # A mirrored 3 is no digit: both are the picture as it is.
    save_shard(shard, latents, latents, labels)


def labelled_rows(rows):
    """{name: 20 images uint8 (20, 3, 32, 32)} -> one image (3, H, W): names at the left, two rows
    of ten each, three times as large."""
    grid = image_grid(torch.cat(list(rows.values())), columns=10)
    grid = grid.repeat_interleave(3, 1).repeat_interleave(3, 2)  # (3, 192 rows, 960)
    margin = Image.new("RGB", (170, grid.shape[1]), "white")
    font = ImageFont.load_default(26)
    for k, name in enumerate(rows):
        ImageDraw.Draw(margin).text((160, 192 * k + 96), name, "black", font, anchor="rm")
    return torch.cat([from_pil(margin), grid], 2)


if __name__ == "__main__":
    run_command(main)
