"""Pictures to FLUX.2 latents: the cache that jlt.py trains on.

    python encode.py imagenet/                         # imagenet/train/<class>/*.JPEG -> latents/
    python encode.py photos/ --out latents_photos      # any folder of class folders
    torchrun --nproc-per-node 2 encode.py imagenet/    # several GPUs share the work

Look at latents/reconstructions.png first: originals, and below each of them what its latent decodes
to. Interrupted? The same command continues: finished shards stay.

Pictures are turned as their EXIF data ask, and transparency is dropped, so that hidden pixels may
show. Damage that Pillow does not see in a JPEG, and TIFFs of 16 bits that are stored in unusual
ways, may give odd pictures without a word. A cache is one of file names: a picture that was
replaced under its name is not encoded again.

This file is also the ground that jlt.py and fid.py stand on. From top to bottom: mistakes, files
and folders; pictures; the VAE; the cache; the command; and, for jlt.py's demo alone, drawn digits.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# The default VAE, under the Apache-2.0 licence, in the folder vae/ of this repository of the
# Hugging Face hub.
VAE = "black-forest-labs/FLUX.2-klein-4B"
PATIENCE = 600  # seconds that one process waits for a file of another
# Of torch's errors, which are all of one class: a reader was killed, or found no shared memory.
KILLED = r"DataLoader worker \(pid|</torch_"


# =============================================================== mistakes, files and folders
class Stop(ValueError):
    """A mistake that one line explains."""

    def __init__(self, line):
        # A DataLoader hands on what its reader processes raise as a traceback with the line at
        # its end.
        super().__init__(line.rpartition("Stop: ")[2])


def require(condition, line):
    """Raises Stop with this line unless the condition holds."""
    if not condition:
        raise Stop(line)


@contextlib.contextmanager
def stop_on_error(what, advice):
    """Makes a Stop of whatever goes wrong inside: Pillow, safetensors, torch.load and the hub each
    have errors of their own."""
    try:
        yield
    except (Stop, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # That a reader was killed is raised wherever the main process is at the time.
        if re.search(KILLED, str(error)):
            raise
        reason = str(error).split(". ")[0][:200] or type(error).__name__
        raise Stop(f"{what}: {advice} ({reason})") from None


def run_command(main):
    """Calls main(). A mistake or Ctrl-C becomes one line and exit status 1."""
    # A terminal may lack the letters of a path; printing it must not end the program. (The output
    # of a notebook has no such method, and all letters.)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    killed = (
        "a process that reads was killed, or had no memory: try fewer --workers, or in Docker a "
        "larger --shm-size"
    )
    try:
        return main()
    except KeyboardInterrupt:
        line = "interrupted"
    except torch.OutOfMemoryError:
        line = "out of memory; lower --batch (encode.py) or --micro-batch (jlt.py)"
    except BrokenPipeError:
        # Python writes what is left of the output when it ends, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        line = "nobody reads the output any more"
    except (ConnectionError, EOFError):  # the pipe from a reader broke
        line = killed
    except RuntimeError as error:
        if not re.search(KILLED, str(error)):
            raise
        line = killed
    except (Stop, OSError) as error:
        line = " ".join(str(error).split())
    sys.exit(f"{Path(sys.argv[0]).name}: {line}")


def make_parser(description):
    """-> an ArgumentParser that prints a program's docstring as it is."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def natural(text):
    """The type of a flag: a whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def positive(text):
    """The type of a flag: a whole number above 0."""
    number = natural(text)
    if number == 0:
        raise ValueError
    return number


def full_path(text):
    """The type of --vae: a path in full, so that it can be found from elsewhere; a repository as it
    is."""
    path = Path(text)
    return str(path.resolve()) if path.exists() else text


def processes():
    """-> this process's number and how many there are, as torchrun says; (0, 1) without it. Raises
    Stop where half of it is said, as by some schedulers."""
    rank = os.environ.get("RANK") or ""
    world = os.environ.get("WORLD_SIZE") or ""
    if not rank + world:
        return 0, 1
    fits = world.isdecimal() and rank in map(str, range(int(world)))
    require(fits, f"RANK={rank} WORLD_SIZE={world}: start this with torchrun, or unset both")
    return int(rank), int(world)


def cores():
    """-> how many cores this process may use; a container or a scheduler may allow a few only."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def pick_device(name=""):
    """cuda, cuda:1, mps, cpu, or "" for the best there is -> torch.device. Under torchrun every
    process has a GPU of its own. Raises Stop for a device that is not there."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with stop_on_error(f"--device {name}", f"not on this machine, which has {best}"):
        device = torch.device(name or best)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK") or 0))
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
    time may write a path. Raises Stop if something goes wrong."""
    temporary = path.with_name(f".tmp.{path.name}")
    with stop_on_error(path, "cannot be written; is the disk full?"):
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file)
        os.replace(temporary, path)


def save_tensors(path, tensors, about=None):
    """Writes a safetensors file, with `about` {name: text} in its header. (Not by save_file, whose
    files nobody but their owner can read.)"""
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, about))


def wait_for_files(paths):
    """Until the other processes have written theirs. Raises Stop if a file does not come: its
    process may have ended, or write into the folder of another machine."""
    for path in paths:
        started = time.monotonic()
        while not path.exists():
            late = time.monotonic() > started + PATIENCE
            require(not late, f"{path}: another process has not written it in {PATIENCE} seconds")
            time.sleep(0.1)


def digest(content):
    """-> sixteen letters that stand for bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def claim_folder(folder, settings, defaults=None):
    """Makes a folder that says in settings.json what its files are made with, before the first of
    them is there. Later commands must have the same settings, whatever else is in it, so that
    nothing is mixed or overwritten: raises Stop, naming what differs. A setting that an older
    version did not write down counts as its default. Raises Stop also if the same command is at
    work in the folder."""
    path = folder / "settings.json"
    rank, _ = processes()
    if rank == 0 and not path.exists():
        foreign = any(folder.glob("[!.]*"))
        require(not foreign, f"{folder}: has files, but no settings.json; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
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
    lock(folder)


def lock(folder):
    """Lets no other process of this one's number write into a folder, until this one ends. Raises
    Stop if there is one."""
    rank, _ = processes()
    # A byte for each process, and a file that stays open. Readers, its children, do not inherit
    # such a lock (as they would flock's), and may outlive it.
    with contextlib.suppress(OSError):  # a network drive may have no locks
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except BlockingIOError:
            raise Stop(f"{folder}: another process writes here") from None


def read_settings(folder):
    """-> what settings.json in a folder says; {} where there is none."""
    path = folder / "settings.json"
    with stop_on_error(path, "damaged; if this folder is of no use any more, delete it"):
        return json.loads(path.read_text()) if path.exists() else {}


def is_ours(folder):
    """Whether a folder is a cache, a run, or samples of these programs. Others have files called
    settings.json, too."""
    path = folder / "settings.json"
    ours = r'"(shards|latents|weights)": '  # of a cache, a run, samples
    return path.is_file() and re.search(ours, path.read_text(errors="replace"))


# =============================================================== pictures
ENDINGS = Image.registered_extensions()  # those that Pillow knows
# Pillow refuses text and colour profiles above 1 MB in a PNG, whose pixels may be fine.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def ending(name):
    """The ending of a file's name, in small letters; for a download a.jpg?size=large it is .jpg."""
    return os.path.splitext(os.path.basename(name).partition("?")[0])[1].lower()


def is_picture(name):
    """Whether a file's name ends as one of a kind that Pillow knows."""
    return ending(name) in ENDINGS


def list_files(folder, above=()):
    """Sorted paths, relative to `folder`, of the files in it and below it. Links to folders are
    followed, unless they lead back to one of the folders `above`. Left out are folders of this
    project's own files, such as a cache."""
    place = os.path.realpath(folder)
    if place in above:
        return []
    found = []
    for path in folder.iterdir():
        # Left behind by editors, notebooks, network drives and Macs: nobody's pictures.
        if path.name.startswith((".", "@eaDir", "__MACOSX")):
            continue
        if not path.is_dir():
            found.append(path.name)
        elif not is_ours(path):
            found += [os.path.join(path.name, name) for name in list_files(path, (*above, place))]
    return sorted(found)


def open_rgb(path, upright=False):
    """Any image file as an RGB PIL image: its first frame, transparency dropped, 16-bit grayscale
    scaled to 8 bits. `upright` turns it as its EXIF data asks. Raises Stop for other depths, of
    which nothing says what is white."""
    require(os.path.isfile(path), "is no regular file")  # a pipe would be waited for
    with Image.open(path) as image:
        image.load()
        # Mode I of a PNG or PGM has 16 bits; that of other files, such as TIFF, 32, or signs.
        known = image.mode not in ("I", "F") or (
            image.mode == "I" and image.format in ("PNG", "PPM")
        )
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
    filter while the short side is at least twice `size`, bicubic until it is `size`, cut out."""
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


@lru_cache(1)  # once for all the pictures of a run
def load_vae(name=VAE, device="cpu", compiled=False):
    """The VAE of a hub repository, or of a local folder that holds the weights, itself or in its
    vae/; or, from a file codec.safetensors, the DigitCodec of the demo (at the end of this file).
    Raises Stop where there is none, or where the weights are another model's.

    A VAE of another kind can take its place if it has `encode` and `decode` (as the functions
    below), `channels` of a latent, `pixels`, the side of the square that becomes one position, and
    the `device` on which it is.

    `compiled`: for many images of one shape; at the first of them it takes a minute or two."""
    if str(name).endswith("codec.safetensors"):
        with stop_on_error(f"--vae {name}", "no codec of digits"):
            return DigitCodec(**load_file(name))
    advice = (
        "no AutoencoderKLFlux2 there; to fetch one: "
        f"hf download {VAE} --include 'vae/*' --local-dir flux2, then --vae flux2"
    )
    with stop_on_error(f"--vae {name}", advice):
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


def shard_name(k):
    return f"latents_{k:05d}.safetensors"


def save_shard(path, latents, latents_flip, labels):
    """Writes latents, and those of the mirrored images, (N, C, H, W) as fp16; labels as int32."""
    tensors = {
        "latents": latents.half().contiguous(),
        "latents_flip": latents_flip.half().contiguous(),
        "labels": labels.int(),
    }
    save_tensors(path, tensors)


class LatentDataset(Dataset):
    """A folder of cached latents, made by encode.py or by the code that the paper's authors
    released: data[i, flip] is latent i (C, H, W), in the precision of the file, and its label. With
    `flip` it is the latent of the mirrored image or, where the cache has no mirrored images, of the
    image itself. Raises Stop for a cache that is missing, unfinished, damaged or mixed.

    Another program's cache is a folder of files latents_*.safetensors with `latents` (N, C, H, H),
    of mean 0 and standard deviation 1, `labels` (N,) from 0 on and, if half of the latents shown
    are to be mirrored, `latents_flip`.

    `shape` (C, H, W), `labels` (N,), `num_classes`, `class_names` (empty where they are not
    known), and `settings`, what encode.py wrote in settings.json."""

    def __init__(self, folder):
        folder = Path(folder)
        there = {path.name for path in folder.glob("latents_*.safetensors")}
        advice = f"encode.py IMAGES --out {folder} makes them"
        require(there, f"{folder}: holds no latents_*.safetensors; {advice}")
        self.settings = read_settings(folder)
        # Another program's files have other names, but none has the "(1)" or blank of a copy.
        wanted = {name for name in there if re.fullmatch(r"[\w-]+\.safetensors", name)}
        if "shards" in self.settings:
            wanted = {shard_name(k) for k in range(self.settings["shards"])}
        lacking = sorted(wanted - there)
        surplus = sorted(there - wanted)
        line = f"lacks {len(lacking)} of {len(wanted)} shards; the same encode.py command goes on"
        require(not lacking, f"{folder}: {line}")
        require(not surplus, f"{folder}: {surplus} do not belong to it; move them away")
        self.paths = [folder / name for name in sorted(wanted)]

        labels, kinds, self.offsets = zip(*map(read_header, self.paths), strict=True)
        require(len(set(kinds)) == 1, f"{folder}: mixes latents of different shapes or types")
        *self.shape, self.dtype = kinds[0]
        self.starts = np.cumsum([0, *map(len, labels)])  # the number of each file's first latent
        self.labels = torch.cat(labels)
        require(len(self.labels), f"{folder}: holds no latents; was no image readable?")
        self.class_names = self.settings.get("classes", [])
        low, high = self.labels.aminmax()
        self.num_classes = len(self.class_names) or int(high) + 1
        # Of the classes that have names, the first may have no picture that could be read.
        fits = low == 0 or (low > 0 and self.class_names)
        line = f"{folder}: labels are {low} to {high}, not 0 to {self.num_classes - 1}"
        require(fits and high < self.num_classes, line)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, pick):
        i, flip = pick
        shard = np.searchsorted(self.starts, i, side="right") - 1
        path = self.paths[shard]
        size = math.prod(self.shape) * self.dtype.itemsize
        # Read, not mapped: a page fault would fetch the disk's whole read-ahead, up to 8 MB, for
        # these 64 KB.
        with stop_on_error(path, "cannot be read"), open(path, "rb", buffering=0) as file:
            file.seek(self.offsets[shard][flip] + int(i - self.starts[shard]) * size)
            data = bytearray(file.read(size))
            latent = torch.frombuffer(data, dtype=self.dtype).view(self.shape)
        return latent, self.labels[i]

    def some(self, most=512):
        """-> up to so many latents (N, C, H, W) float32, spread over all."""
        numbers = range(0, len(self), math.ceil(len(self) / most))
        return torch.stack([self[i, False][0].float() for i in numbers])


def read_header(path):
    """-> labels (n,); channels, height, width and type of a latent; and where in the file latents
    and those of the mirrored images begin. Raises Stop for a file of anything else."""
    advice = "no shard of square latents (N, C, H, H) and labels (N,); delete it and encode again"
    with stop_on_error(path, advice):
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
            files = list_files(root) if root.is_dir() else []
            names = [name for name in files if os.sep in name and is_picture(name)]
            if names:
                break
        require(names, f"{folder}: no images in class folders; arrange them as CLASS/image.jpg")
        self.size = size
        self.root = root
        self.names = names
        self.classes = sorted({name.split(os.sep)[0] for name in names})
        self.others = Counter(ending(name) for name in set(files) - set(names))

    def __len__(self):
        return len(self.names)

    # Called in the DataLoader's processes.
    def __getitem__(self, i):
        name = self.names[i]
        try:
            image = center_crop(open_rgb(self.root / name, upright=True), self.size)
            return from_pil(image), self.classes.index(name.split(os.sep)[0])
        except Exception as error:
            # Pillow raises whatever the file's bytes lead it to. What the drive says has a number.
            require(not getattr(error, "errno", None), f"{self.root / name}: {error}")
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
    count = sum(map(len, batches))
    with tqdm(total=count, unit="image", disable=processes()[0] > 0) as bar:
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
    std, mean = torch.std_mean(data.some(), (0, 2, 3))  # (C,)
    print(
        f"{folder}: {len(data):,} images and their mirror images; {files - len(data)} files "
        f"skipped; channel means {mean.min():.2f} to {mean.max():.2f}, standard deviations "
        f"{std.min():.2f} to {std.max():.2f} (FLUX.2's: about 0 and 1)"
    )
    there = set(data.labels.tolist())
    empty = [name for label, name in enumerate(data.class_names) if label not in there]
    if empty:
        print(f"no picture could be read in the classes {empty}")


def read_flags():
    """-> the settings of the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("images", help="folder of class folders; its train/ is used where it holds some")
    add("--out", default="latents", type=Path, help="folder of the cache (%(default)s)")
    add(
        "--vae", default=VAE, type=full_path, help="hub repository or folder of a VAE (%(default)s)"
    )
    add("--size", default=256, type=positive, help="side of the crop in pixels (%(default)s)")
    add("--batch", default=32, type=positive, help="images at a time, with mirrors (%(default)s)")
    # Under torchrun the processes of a machine share its cores.
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    add(
        "--workers",
        default=share,
        type=natural,
        help="processes that read images (%(default)s here)",
    )
    add("--device", default="", help="cuda, mps or cpu (the best there is)")
    return parser.parse_args()


def main():
    args = read_flags()
    rank, world = processes()
    photos = Photos(args.images, args.size)
    if rank == 0:
        print(
            f"{photos.root}: {len(photos):,} files, {len(photos.classes)} classes, "
            f"{photos.classes[:5]} ...; other files: {dict(photos.others)}",
            flush=True,
        )
    device = pick_device(args.device)
    # Compiling pays for many images only.
    vae = load_vae(args.vae, device, compiled=device.type == "cuda" and len(photos) > 20_000)
    require(args.size % vae.pixels == 0, f"--size {args.size}: no multiple of {vae.pixels}")
    # A batch is of one shard: whatever is missing, a picture is encoded beside the same others.
    shards = {
        args.out / shard_name(k): numbers.split(args.batch)
        for k, numbers in enumerate(torch.arange(len(photos)).split(SHARD))
    }
    # A cache of other pictures, or by another VAE, is not added to.
    claim_folder(
        args.out,
        {
            "vae": args.vae,
            "size": args.size,
            "files": digest(repr(photos.names).encode()),
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
    shard = folder / shard_name(0)
    if shard.exists():
        return
    settings = {"vae": str(codec_file.resolve()), "shards": 1, "classes": list("0123456789")}
    claim_folder(folder, settings)
    images, labels = draw_digits(n, seed=1)
    images = to_float(images)
    patches = F.pixel_unshuffle(images, 16).movedim(1, -1).flatten(0, 2)  # (4n, 768)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    codec = {
        "mean": patches.mean(0)[:, None, None],
        "basis": vectors[:, -128:].flip(1).contiguous(),
        "scale": values[-128:].mean().sqrt(),
    }
    save_tensors(codec_file, codec)
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
