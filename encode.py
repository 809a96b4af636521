"""Pictures to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                         # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos      # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/    # several GPUs share the work

Look at latents/reconstructions.png first: originals, and at the right of each what its latent
decodes to. Interrupted? Run the same command again: finished shards stay, the one in flight is
made anew.

This file is also the ground that jlt.py and fid.py stand on. From top to bottom: errors and
files, pictures, the VAE, the cache, the command. What follows main() is for jlt.py alone: labels,
charts, and the digits of its demo.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# The default VAE, under the Apache-2.0 licence, in the folder vae/ of this repository of the
# Hugging Face hub.
VAE = "black-forest-labs/FLUX.2-klein-4B"


# =============================================================== errors and files
class Stop(ValueError):
    """A fault that one line explains. Exit status 2 is bad usage, 1 a fault on the way."""

    def __init__(self, line, status=2):
        super().__init__(line)
        self.status = status


def require(condition, line, status=2):
    """Raises Stop with this line unless the condition holds."""
    if not condition:
        raise Stop(line, status)


def reason_of(error):
    """The first sentence of what an exception says."""
    reason = getattr(error, "strerror", None) or str(error).split(". ")[0][:200]
    return reason or type(error).__name__


@contextlib.contextmanager
def explaining(what, advice, status=2):
    """Makes a Stop of whatever goes wrong inside: Pillow, zip, safetensors, torch.load and the
    hub each have errors of their own."""
    try:
        yield
    except (Stop, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Stop(f"{what}: {advice} ({reason_of(error)})", status) from None


def processes():
    """-> this process's number and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores():
    """-> how many cores this process may use; a container or a scheduler may allow a few only."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def run_command(main):
    """Calls main(). A foreseeable fault becomes one line on stderr and an exit status."""
    rank, _ = processes()
    try:
        return main()
    except Stop as error:
        line, status = str(error), error.status
    except KeyboardInterrupt:
        line, status = "interrupted", 130
    except OSError as error:
        # A full disk, a permission, a network drive that is gone.
        line, status = f"{error.filename or 'a file'}: {error.strerror or error}", 1
    except (MemoryError, torch.OutOfMemoryError):
        line = "out of memory; lower --batch (encode.py) or --micro-batch (jlt.py)"
        status = 1
    if rank > 0 and status != 1:
        # The first process mostly makes the same mistake and says it, and torchrun ends this one
        # as soon as it has left.
        time.sleep(2)
    if rank == 0 or status != 130:
        print(f"{Path(sys.argv[0]).name}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name that becomes `path` once the file is written: whoever reads `path`
    finds what was there before or all of the new file, also after a power cut. One process at a
    time may write a path."""
    path = Path(path)
    temporary = path.with_name(f".tmp.{os.getpid()}.{path.name}")
    try:
        # Left behind by a process that was killed while it wrote this file.
        for leftover in path.parent.glob(f".tmp.[0-9]*.{path.name}"):
            leftover.unlink(missing_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError.
        line = f"{path}: cannot be written; is the disk full? What was there is intact"
        raise Stop(f"{line} ({reason_of(error)})", status=1) from None
    finally:
        temporary.unlink(missing_ok=True)


def require_new(path):
    """Raises Stop unless a file can be written to `path` without replacing another."""
    path = Path(path)
    require(not path.exists(), f"{path}: exists already; give another name, or remove it")
    require(path.parent.is_dir(), f"{path}: there is no folder {path.parent}; make it first")
    writable = os.access(path.parent, os.W_OK)
    require(writable, f"{path}: no permission to write in the folder {path.parent}")


def wait_for_files(paths):
    """Until the other processes have written theirs."""
    for path in paths:
        while not path.exists():
            time.sleep(0.1)


def refuse_changes(path, old, new):
    """Raises Stop, naming what differs, unless `old` holds all that `new` does."""
    other = [name for name in new if old.get(name) != new[name]]
    changes = ", ".join(f"{name} {old.get(name)} (now {new[name]})" for name in other)
    require(not other, f"{path}: made with other settings: {changes}; give another --out")


def make_parser(description):
    """An ArgumentParser whose complaints are one line, like all others."""
    parser = argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def complain(message):
        raise Stop(message)

    parser.error = complain
    return parser


def pick_device(name=""):
    """cuda, cuda:1, mps, cpu, or "" for the best there is -> torch.device. Under torchrun every
    process has a GPU of its own. Raises Stop for a device that is not there."""
    best = "cpu"
    if torch.backends.mps.is_available():
        best = "mps"
    if torch.cuda.is_available():
        best = "cuda"
    name = name or best
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with explaining(f"--device {name}", f"not on this machine, which has {best}"):
        torch.ones(1, device=name)
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# =============================================================== pictures
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".ppm", ".pgm", ".tif", ".tiff", ".mpo"),
)
EXIF_ORIENTATION = 0x0112  # 1 is upright; a camera held on its side writes 6 or 8


def is_image(name):
    """By its ending; names that begin with a dot are what Macs leave behind."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def list_images(folder):
    """Sorted paths, relative to `folder`, of the image files in it and below it, but for folders
    whose names begin with a dot, which notebooks leave behind."""

    def fail(error):
        raise error

    found = []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(root, name), folder) for name in filter(is_image, names)
        ]
    return sorted(found)


def open_rgb(path, turn=False):
    """Any image file as an RGB PIL image: its first frame, transparency dropped, 16-bit grayscale
    scaled to 8 bits. `turn` rotates it as its EXIF data asks; ImageNet's convention is not to."""
    with Image.open(path) as image:
        if turn:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow's convert would clip 16 bits to white. 65535 / 257 is 255.
            image = Image.fromarray(
                (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
            )
        # The transparent colour of a palette. Were it left there, Pillow would warn of it here,
        # and fail when the result is saved.
        image.info.pop("transparency", None)
        return image.convert("RGB")


def center_crop(image, size):
    """PIL image -> its centre, size x size pixels. ADM's crop (guided-diffusion): halve with a box
    filter while the short side is at least twice `size`, bicubic until it is `size`, cut out."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images / 127.5 - 1


def to_uint8(images):
    """Values in [-1, 1] -> uint8, any shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(path, image):
    """Writes a uint8 image (3, H, W)."""
    with replacing(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(temporary, "PNG")


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
    channels. Then each channel is normalised, to about mean 0 and deviation 1, which is the scale
    of the noise that training adds. The means and variances are those of the training images of
    FLUX.2; they are in its BatchNorm layer `bn`, which diffusers' own encode and decode leave to
    their callers."""

    def __init__(self, autoencoder):
        self.autoencoder = autoencoder
        self.device = autoencoder.device
        self.channels = len(autoencoder.bn.running_mean)
        variance = autoencoder.bn.running_var + autoencoder.config.batch_norm_eps
        self.mean = autoencoder.bn.running_mean.view(-1, 1, 1)  # (128, 1, 1)
        self.std = variance.sqrt().view(-1, 1, 1)

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, 128, H/16, W/16) float32, the posterior's mode."""
        images = images.to(self.device, self.autoencoder.dtype)
        latents = self.autoencoder.encode(images).latent_dist.mode().float()  # (B, 32, H/8, W/8)
        # Channel c * 4 + row * 2 + column.
        return (F.pixel_unshuffle(latents, 2) - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents):
        """(B, 128, h, w) -> (B, 3, 16h, 16w) float32, about in [-1, 1]."""
        latents = latents.to(self.device).float() * self.std + self.mean
        latents = F.pixel_shuffle(latents, 2)  # (B, 32, 2h, 2w)
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype)).sample.float()

    def compile(self):
        """For many images of one shape, on CUDA; at the first of them it takes a minute or two."""
        if self.device.type == "cuda":
            # One by one: autoencoder.compile() compiles its forward(), which encode() and
            # decode() do not call.
            self.autoencoder.encoder.compile(dynamic=False)
            self.autoencoder.decoder.compile(dynamic=False)

    def fingerprint(self):
        """A digest of the weights that make latents; the decoder may be replaced by another."""
        digest = hashlib.sha256()
        for name, tensor in self.autoencoder.state_dict().items():
            if "decoder" not in name and "post" not in name:
                digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_vae(name=VAE, device="cpu"):
    """The VAE of a hub repository, or of a local folder that holds the weights, itself or in its
    vae/; or, from a file codec.safetensors, the DigitCodec of the demo (at the end of this file).
    Raises Stop where there is none, or where the weights are another model's."""
    if str(name).endswith("codec.safetensors"):
        with explaining(f"--vae {name}", "not a codec of drawn digits; jlt.py --demo makes one"):
            return DigitCodec(**load_file(name))
    by_hand = f"hf download {VAE} --include 'vae/*' --local-dir flux2, then --vae flux2"
    with explaining(f"--vae {name}", f"no AutoencoderKLFlux2 there; to fetch one: {by_hand}"):
        # Here, since the import takes seconds.
        from diffusers import AutoencoderKLFlux2, logging
        from huggingface_hub import snapshot_download

        logging.set_verbosity_error()
        folder = Path(name)
        if not folder.is_dir():
            files = ["vae/*", "config.json", "diffusion_pytorch_model.safetensors"]
            folder = Path(snapshot_download(str(name), allow_patterns=files))
        if (folder / "vae").is_dir():
            folder = folder / "vae"
        autoencoder, report = AutoencoderKLFlux2.from_pretrained(
            folder, output_loading_info=True, local_files_only=True
        )
        # diffusers only warns of these.
        problems = [
            key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]
        ]
        require(not problems, f"--vae {name}: holds the weights of another model")
    autoencoder = autoencoder.eval().requires_grad_(False)
    # In float32, with the TF32 products that cuDNN takes by default on CUDA: they move latents by
    # 0.2% of their deviation; bfloat16 would by 2%.
    return Flux2VAE(autoencoder.to(device, memory_format=torch.channels_last))


def encode(vae, images):
    """Images (B, 3, H, W) in [-1, 1] -> normalised latents (B, 128, H/16, W/16), float32."""
    return vae.encode(images)


def decode(vae, latents):
    """Normalised latents (B, 128, h, w) -> images (B, 3, 16h, 16w), about in [-1, 1]."""
    return vae.decode(latents)


# =============================================================== the cache
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass
class Shard:
    """One file of a cache, as its header describes it."""

    path: Path
    settings: dict  # what encode.py wrote about the cache; empty in other programs' files
    labels: torch.Tensor  # (n,)
    shape: tuple  # of one latent, (C, H, W)
    dtype: torch.dtype
    offsets: dict  # where "latents" and, if there, "latents_flip" begin, in bytes

    def read(self, i, flip=False):
        """-> latent i (C, H, W), of the mirrored image if asked for and there."""
        flip = flip and "latents_flip" in self.offsets
        size = math.prod(self.shape) * self.dtype.itemsize
        data = bytearray(size)
        # Read, not mapped: a page fault would fetch the disk's whole read-ahead, up to 8 MB, for
        # these 64 KB.
        with open(self.path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(self.offsets["latents_flip" if flip else "latents"] + i * size)
            whole = file.readinto(data) == size
            require(whole, f"{self.path}: is shorter than it was", status=1)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def save_shard(path, latents, latents_flip, labels, **settings):
    """Writes latents, and those of the mirrored images, (N, C, H, W) as fp16; labels as int32."""
    tensors = {
        "latents": latents.half().contiguous(),
        "latents_flip": latents_flip.half().contiguous(),
        "labels": labels.int(),
    }
    with replacing(path) as temporary:
        # One key: safetensors would write several in random order.
        temporary.write_bytes(save(tensors, {"encode": json.dumps(settings)}))


def open_shard(path):
    """-> Shard. Raises Stop for a damaged file, or one that holds no latents."""
    advice = "no shard of latents (N, C, H, W) and labels (N,); delete it and encode again"
    with explaining(path, advice, status=1):
        # safetensors checks that the header fits the file's length, but does not tell where in the
        # file a tensor begins. A file is: the header's length in 8 bytes, the header, tensors.
        with safe_open(path, "pt") as file:
            labels = file.get_tensor("labels").long()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        latents = header["latents"]
        flipped = header.get("latents_flip", latents)
        count, *shape = latents["shape"]
        square = len(shape) == 3 and shape[1] == shape[2]
        alike = flipped["shape"] == latents["shape"] and flipped["dtype"] == latents["dtype"]
        fits = square and alike and labels.shape == (count,)
        require(fits, f"{path}: {advice}", status=1)
        metadata = header.get("__metadata__", {})
        return Shard(
            path=path,
            settings=json.loads(metadata.get("encode", "{}")),
            labels=labels,
            shape=tuple(shape),
            dtype=DTYPES[latents["dtype"]],
            offsets={
                name: 8 + length + header[name]["data_offsets"][0]
                for name in ("latents", "latents_flip")
                if name in header
            },
        )


class LatentDataset(Dataset):
    """A folder of cached latents, made by encode.py or by the code that the paper's authors
    released. Item i is (latent (C, H, W) float32, label); item(i, flip=True) is that of the
    mirrored image. Raises Stop for a cache that is missing, unfinished, damaged or mixed.

    `shape` (C, H, W), `labels` (N,), `num_classes`, `class_names` (empty where they are not
    known), `settings` of the first shard; `origin` is the same for two caches if they were made
    from files of the same names with the same encoder."""

    def __init__(self, folder):
        folder = Path(folder)
        require(
            folder.is_dir(), f"{folder}: no such folder; encode.py IMAGES --out {folder} makes it"
        )
        paths = sorted(folder.glob("latents_*.safetensors"))
        require(paths, f"{folder}: holds no latents_*.safetensors; encode.py makes them")
        self.shards = [open_shard(path) for path in paths]
        self.settings = self.shards[0].settings

        # Every shard of ours knows its number, and how many there are to be.
        wanted = self.settings.get("shards", len(paths))
        numbers = [shard.settings.get("number", k) for k, shard in enumerate(self.shards)]
        complete = numbers == list(range(wanted))
        require(
            complete,
            f"{folder}: {len(paths)} of {wanted} shards; the same encode.py command finishes it",
        )

        kinds = {
            (shard.shape, shard.dtype, shard.settings.get("encoder"), shard.settings.get("files"))
            for shard in self.shards
        }
        require(len(kinds) == 1, f"{folder}: mixes latents of different shape or origin {kinds}")
        self.shape = self.shards[0].shape
        self.origin = (self.settings.get("encoder"), self.settings.get("files"))

        self.labels = torch.cat([shard.labels for shard in self.shards])
        require(len(self.labels), f"{folder}: holds no latents; was no image readable?")
        low, high = self.labels.aminmax()
        self.num_classes = self.settings.get("num_classes", int(high) + 1)
        require(
            low >= 0 and high < self.num_classes,
            f"{folder}: labels {low} to {high} do not fit {self.num_classes} classes",
        )
        self.starts = np.cumsum([0] + [len(shard.labels) for shard in self.shards])
        self.class_names = read_class_names(folder)

    def __len__(self):
        return len(self.labels)

    def read(self, i, flip=False):
        """-> latent i (C, H, W) in the precision of the file."""
        shard = np.searchsorted(self.starts, i, side="right") - 1
        return self.shards[shard].read(i - self.starts[shard], flip)

    def item(self, i, flip=False):
        """-> latent i (C, H, W) float32, label."""
        i = range(len(self))[i]  # -1 is the last one
        return self.read(i, flip).float(), int(self.labels[i])

    def __getitem__(self, i):
        return self.item(i)


def read_class_names(folder):
    """The names of a cache's classes in the order of their labels; [] where nothing says them."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return []
    with explaining(path, "damaged; the same encode.py command writes it anew"):
        return list(json.loads(path.read_text())["classes"])


# =============================================================== the command
class Photos(Dataset):
    """The images of a folder (or its train/) of class folders. Item i: a crop, uint8 (3, S, S);
    why it could not be read, or ""; and whether its EXIF data asks to turn or mirror it."""

    def __init__(self, folder, size, turn=False):
        root = Path(folder)
        require(root.is_dir(), f"{root}: no such folder; give the one that holds the class folders")
        if (root / "train").is_dir():
            root = root / "train"
        entries = sorted(entry.name for entry in os.scandir(root))
        self.classes = [name for name in entries if (root / name).is_dir() and name[0] != "."]
        self.loose = [name for name in entries if (root / name).is_file() and is_image(name)]
        self.root = root
        self.size = size
        self.turn = turn
        self.names = []
        labels = []
        for label, name in enumerate(self.classes):
            files = list_images(root / name)
            self.names += [os.path.join(name, file) for file in files]
            labels += [label] * len(files)
        self.labels = torch.tensor(labels)
        arrange = f"arrange them as {root / 'CLASS' / 'image.jpg'}"
        require(self.names, f"{root}: no images in class folders; {arrange}")

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Runs in the DataLoader's processes."""
        turned = False
        try:
            path = self.root / self.names[i]
            with Image.open(path) as image:
                turned = image.getexif().get(EXIF_ORIENTATION) in range(2, 9)
            crop = np.array(center_crop(open_rgb(path, self.turn), self.size))
            reason = ""
        except Exception as error:
            # Pillow raises whatever the file's bytes lead it to.
            crop = np.zeros((self.size, self.size, 3), np.uint8)
            turned = False
            reason = " ".join(str(error).split()) or type(error).__name__
        return torch.from_numpy(crop).permute(2, 0, 1), reason, turned


def cache_settings(vae, photos, args):
    """What all shards of a cache have in common; each header holds it."""
    files = "\0".join(photos.names + photos.classes)
    return {
        "encoder": vae.fingerprint(),
        "files": hashlib.sha256(os.fsencode(files)).hexdigest()[:16],
        "num_classes": len(photos.classes),
        "size": args.size,
        "exif": args.exif,
        "shard": args.shard,
        "shards": math.ceil(len(photos) / args.shard),
        "vae": os.path.realpath(args.vae) if os.path.isdir(args.vae) else args.vae,
    }


def check_finished_shards(folder, settings):
    """-> paths of the shards that are there. Raises Stop if one is not of these settings."""
    # The same weights may lie elsewhere.
    needed = {key: value for key, value in settings.items() if key != "vae"}
    paths = sorted(folder.glob("latents_*.safetensors"))
    for path in paths:
        refuse_changes(path, open_shard(path).settings, needed)
    return paths


def save_reconstructions(path, vae, photos):
    """A picture of up to eight originals, each with what its latent decodes to at its right."""
    step = math.ceil(len(photos) / 8)
    items = [photos[i] for i in range(0, len(photos), step)]
    readable = [image for image, reason, _ in items if not reason]
    originals = torch.stack(readable or [items[0][0]])  # none: a black one
    decoded = to_uint8(decode(vae, encode(vae, to_float(originals)))).cpu()
    pairs = torch.stack([originals, decoded], 1).flatten(0, 1)
    save_png(path, image_grid(pairs, columns=4 if len(pairs) % 4 == 0 else 2))


def encode_shards(vae, photos, shards, args, settings):
    """Encodes and writes the shards {path: range of image numbers}."""
    rank, _ = processes()
    # One loader for all of them, whose workers go on reading while a shard ends. Each shard takes
    # its own batches from it.
    batches = []
    for numbers in shards.values():
        batches += [numbers[i : i + args.batch] for i in range(0, len(numbers), args.batch)]
    loader = DataLoader(
        photos,
        batch_sampler=batches,
        num_workers=min(args.workers, len(batches)),
        pin_memory=vae.device.type == "cuda",
    )
    loader = iter(loader)
    bar = tqdm(total=sum(map(len, batches)), unit="image", disable=rank > 0)
    # A shard is written while the GPU is at the next.
    with ThreadPoolExecutor(1) as writer, bar:
        writing = None
        for path, numbers in shards.items():
            latents = []
            reasons = []
            turned = 0
            for _ in range(0, len(numbers), args.batch):
                images, batch_reasons, batch_turned = next(loader)  # uint8 (B, 3, S, S)
                x = to_float(images.to(vae.device, non_blocking=True))
                both = encode(vae, torch.cat([x, x.flip(-1)])).half().cpu()
                latents.append(both.unflatten(0, (2, -1)))  # (2, B, C, H, W)
                reasons += batch_reasons
                turned += int(batch_turned.sum())
                bar.update(len(images))

            skipped = [
                (photos.names[i], reason)
                for i, reason in zip(numbers, reasons, strict=True)
                if reason
            ]
            for name, reason in skipped:
                bar.write(f"skipped {name!a}: {reason}", file=sys.stderr)
            good = torch.tensor([not reason for reason in reasons])
            plain, flipped = torch.cat(latents, 1)[:, good]
            if writing:
                writing.result()  # raises what went wrong there
            writing = writer.submit(
                save_shard,
                path,
                plain,
                flipped,
                photos.labels[numbers][good],
                number=numbers.start // args.shard,
                skipped=skipped,
                turned=turned,
                **settings,
            )
        if writing:
            writing.result()


def finish_cache(folder, photos, settings):
    """Once all shards are there: writes meta.json and says what the cache holds."""
    data = LatentDataset(folder)
    skipped = [pair for shard in data.shards for pair in shard.settings["skipped"]]
    turned = sum(shard.settings["turned"] for shard in data.shards)
    meta = settings | {
        "classes": photos.classes,
        "images": len(data),
        "skipped": skipped,
        "turned": turned,
        "loose": photos.loose,
    }
    with replacing(folder / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))

    some = range(0, len(data), math.ceil(len(data) / 512))
    latents = torch.stack([data[i][0] for i in some])
    std, mean = torch.std_mean(latents, (0, 2, 3), correction=0)  # (C,)
    line = (
        f"{folder}: {len(data):,} images and their mirror images in {len(data.shards)} shards; "
        f"{len(skipped)} files skipped; channel means {mean.min():.2f} to {mean.max():.2f}, "
        f"deviations {std.min():.2f} to {std.max():.2f} (FLUX.2's: about 0 and 1)"
    )
    without = set(range(len(photos.classes))) - set(data.labels.tolist())
    if without:
        names = ", ".join(f"{photos.classes[label]!a}" for label in sorted(without)[:3])
        line += f"; no image in {len(without)} of the classes ({names})"
    if turned and settings["exif"]:
        line += f"; {turned} turned upright"
    elif turned:
        line += f"; {turned} are not upright, by their EXIF data (--exif turns them)"
    if photos.loose:
        names = ", ".join(f"{name!a}" for name in photos.loose[:3])
        line += f"; {len(photos.loose)} images in no class folder left out ({names})"
    print(line)


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", help="folder of class folders; its train/ is used where it exists")
    add("--out", default="latents", type=Path, help="folder of the cache (%(default)s)")
    add("--vae", default=VAE, help="hub repository or folder of a VAE (%(default)s)")
    add("--size", default=256, type=int, help="side of the square crop in pixels (%(default)s)")
    add("--exif", action="store_true", help="turn pictures as their EXIF data asks (ImageNet: no)")
    add("--batch", default=32, type=int, help="images at a time, and their mirrors (%(default)s)")
    add("--shard", default=1024, type=int, help="images in a file (%(default)s)")
    add("--workers", default=0, type=int, help="processes that read images (0: the cores)")
    add("--device", default="", help="cuda, mps or cpu (the best there is)")
    args = parser.parse_args()
    for name in ("size", "batch", "shard"):
        require(getattr(args, name) > 0, f"--{name} {getattr(args, name)}: must be positive")
    # The VAE makes one position of 8 x 8 pixels; 2 x 2 of them are one of a latent.
    require(args.size % 16 == 0, f"--size {args.size}: must be a multiple of 16")
    require(args.workers >= 0, f"--workers {args.workers}: must not be negative")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    args.workers = args.workers or math.ceil(cores() / local_processes)
    require(not args.out.is_file(), f"--out {args.out}: is a file; give a folder")
    return args


def main():
    args = parse_arguments()
    rank, world = processes()
    photos = Photos(args.images, args.size, args.exif)
    vae = load_vae(args.vae, pick_device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = cache_settings(vae, photos, args)
    done = check_finished_shards(args.out, settings)
    if rank == 0:
        print(
            f"{args.out}: {len(photos):,} files, {len(photos.classes)} classes; "
            f"{len(done)} of {settings['shards']} shards there already",
            file=sys.stderr,
        )

    shards = {}
    for number in range(settings["shards"]):
        first = number * args.shard
        path = args.out / f"latents_{number:05d}.safetensors"
        shards[path] = range(first, min(first + args.shard, len(photos)))
    if rank == 0:
        save_reconstructions(args.out / "reconstructions.png", vae, photos)
    mine = list(shards)[rank::world]
    missing = {path: shards[path] for path in mine if not path.exists()}
    if sum(map(len, missing.values())) > 20_000:
        vae.compile()
    encode_shards(vae, photos, missing, args, settings)

    if rank == 0:
        wait_for_files(shards)
        finish_cache(args.out, photos, settings)


# =============================================================== labels and charts
# For jlt.py: words beside pictures, and curves.


def from_pil(image):
    """PIL image -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def caption(text, width):
    """-> a white strip (3, 16, width) with a line of text."""
    strip = Image.new("RGB", (width, 16), "white")
    ImageDraw.Draw(strip).text((2, 1), text, "black", ImageFont.load_default(12))
    return from_pil(strip)


def labelled_rows(rows):
    """{name: 20 images uint8 (20, 3, 32, 32)} -> one image (3, H, W): names at the left, two rows
    of ten each, three times as large."""
    lines = []
    for name, images in rows.items():
        grid = image_grid(images, columns=10)
        grid = grid.repeat_interleave(3, 1).repeat_interleave(3, 2)  # (3, 192, 960)
        label = Image.new("RGB", (170, 192), "white")
        font = ImageFont.load_default(26)
        ImageDraw.Draw(label).text((160, 96), name, "black", font, anchor="rm")
        lines.append(torch.cat([from_pil(label), grid], 2))
    return torch.cat(lines, 1)


CURVE_COLOURS = ("#1f77b4", "#7f7f7f", "#d62728")


def chart(title, x_label, curves):
    """Curves {name: [(x, y), ...]} over a logarithmic y axis -> image uint8 (3, 420, 560)."""
    image = Image.new("RGB", (560, 420), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    points = [point for curve in curves.values() for point in curve]
    xs = [x for x, _ in points]
    left, right = min(xs), max(xs)
    low = math.floor(math.log10(max(1e-5, min(y for _, y in points))))
    high = math.ceil(math.log10(max(y for _, y in points)))

    def place(x, y):
        """A point of a curve -> its pixel; what lies below the axis stays on it."""
        exponent = max(low, math.log10(max(y, 1e-30)))
        across = (x - left) / (right - left)
        up = (exponent - low) / max(1, high - low)
        return 60 + 470 * across, 360 - 280 * up

    draw.text((60, 10), title, "black", font)
    for exponent in range(low, high + 1):
        _, y = place(left, 10.0**exponent)
        draw.line([(60, y), (530, y)], "#dddddd")
        draw.text((52, y), f"1e{exponent}", "black", font, anchor="rm")
    for x in (left, (left + right) / 2, right):
        draw.text((place(x, 1)[0], 368), f"{x:g}", "black", font, anchor="ma")
    draw.text((295, 392), x_label, "black", font, anchor="ma")
    legend = 60
    for (name, curve), colour in zip(curves.items(), CURVE_COLOURS, strict=False):
        draw.line([place(x, y) for x, y in curve], colour, 3)
        draw.line([(legend, 50), (legend + 24, 50)], colour, 3)
        draw.text((legend + 30, 50), name, "black", font, anchor="lm")
        legend += 60 + 9 * len(name)
    return from_pil(image)


# =============================================================== drawn digits
# Not needed for photographs: the data of `jlt.py --demo`, and a codec that is to them what the
# FLUX.2 VAE is to photographs.

# The path of a pen for each of 0 to 9: points, x then y, of a 10 x 10 grid, y downwards.
STROKES = (
    "50 20 13 16 29 59 86 83 50 20",
    "22 50 59",
    "12 30 60 82 74 19 89",
    "11 40 70 82 64 44 64 86 78 49 18",
    "60 16 86 66 60 69",
    "80 20 14 54 86 78 49 18",
    "70 32 15 18 49 78 86 65 35 16",
    "10 80 39",
    "54 22 20 60 82 54 16 18 49 79 86 54",
    "29 67 84 81 50 21 13 34 64 83",
)
STROKE_POINTS = 12  # shorter paths stay at their last point


def pen_paths():
    """-> (10, 12) complex: a point of the plane is x + iy, so that turning and scaling a path is
    one multiplication."""
    paths = torch.zeros(10, STROKE_POINTS, dtype=torch.complex64)
    for digit, stroke in enumerate(STROKES):
        points = [complex(int(x), int(y)) for x, y in stroke.split()]
        points += [points[-1]] * (STROKE_POINTS - len(points))
        paths[digit] = torch.tensor(points)
    return paths


def draw_digits(n, seed):
    """n drawn digits of classes 0, 1, ..., 9, 0, ... -> images uint8 (n, 3, 32, 32), labels (n,).
    Bright ink on dark paper; colour, thickness, shape, slant, rotation, size, place are random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    labels = torch.arange(n) % 10
    paths = pen_paths()[labels] / 9 - (0.5 + 0.5j)  # (n, 12), about the origin
    shaken = torch.randn(2, n, STROKE_POINTS, generator=generator)
    paths = paths + 0.012 * torch.complex(shaken[0], shaken[1])
    # Digits are narrower than tall, and lean.
    slanted = 0.75 * paths.real + uniform(-0.15, 0.15, 1) * paths.imag
    paths = torch.complex(slanted, paths.imag)
    paths = paths * torch.polar(uniform(20, 24, 1), uniform(-0.12, 0.12, 1))  # size, rotation
    centre = uniform(14.5, 17.5, 2, 1)
    paths = paths + torch.complex(centre[:, 0], centre[:, 1])

    width = uniform(2.2, 3.6)
    ink = uniform(0.6, 1, 3, 1)
    paper = uniform(0, 0.3, 3, 1)
    side = torch.arange(32) + 0.5
    pixels = torch.complex(side.repeat(32), side.repeat_interleave(32))  # (1024,)
    images = []
    for part in torch.arange(n).split(500):
        # How far each pixel is from each straight piece of the path, and from the nearest.
        start = paths[part, :-1, None]
        piece = paths[part].diff()[..., None]  # (k, 11, 1)
        along = ((pixels - start) * piece.conj()).real / piece.abs().square().clamp(min=1e-6)
        distance = (pixels - start - along.clamp(0, 1) * piece).abs().amin(1)  # (k, 1024)
        # A pixel at the edge of the stroke is ink in part.
        cover = (width[part, None] / 2 - distance + 0.5).clamp(0, 1)[:, None]  # (k, 1, 1024)
        colours = paper[part] + (ink[part] - paper[part]) * cover  # (k, 3, 1024)
        images.append((colours * 255).round().to(torch.uint8).view(-1, 3, 32, 32))
    return torch.cat(images), labels


class DigitCodec:
    """FLUX.2's VAE in miniature, for drawn digits: a patch of 16x16x3 pixels becomes its 128
    principal components, all divided by one number, so that weak ones stay weak."""

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
        latents = latents.cpu().float() * self.scale
        patches = torch.einsum("bdhw,cd->bchw", latents, self.basis) + self.mean
        return F.pixel_shuffle(patches, 16)

    def compile(self):
        """A matrix product has nothing to compile."""

    def save(self, path):
        """Writes what load_vae reads."""
        tensors = {"mean": self.mean, "basis": self.basis, "scale": self.scale}
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors))


def fit_codec(images):
    """-> the DigitCodec of uint8 images (N, 3, H, W)."""
    patches = F.pixel_unshuffle(to_float(images), 16).movedim(1, -1).flatten(0, 2)  # (4N, 768)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    return DigitCodec(
        mean=patches.mean(0)[:, None, None],
        basis=vectors[:, -128:].flip(1).contiguous(),
        scale=values[-128:].mean().sqrt(),
    )


def cache_digits(folder, n=10_000):
    """Writes n digits as a cache like any other, with their codec, unless they are there."""
    folder = Path(folder)
    shard = folder / "latents_00000.safetensors"
    if shard.exists():
        return
    images, labels = draw_digits(n, seed=1)
    codec = fit_codec(images)
    folder.mkdir(parents=True, exist_ok=True)
    codec_file = folder / "codec.safetensors"
    codec.save(codec_file)
    latents = codec.encode(to_float(images))
    # A mirrored 3 is no digit: both are the picture as it is.
    save_shard(shard, latents, latents, labels, vae=str(codec_file.resolve()))


if __name__ == "__main__":
    run_command(main)
