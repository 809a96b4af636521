"""What must hold of JLT, checked from first principles: exact values by hand or in float64,
properties, and the command lines as a user types them. CPU, offline, under 3 minutes on 2 cores:

    pytest
    pytest -m long    # some minutes of kills at random moments
"""

import contextlib
import copy
import dataclasses
import errno
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

# Before torch is imported: two threads on two busy cores wait for each other more than they work.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import tracemalloc

import huggingface_hub
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import encode
import fid
import jlt

HERE = Path(__file__).parent


# =============================================================== helpers
def command(script, *arguments, processes=1):
    """-> the words of a command line, started by torchrun where there are several processes."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(processes), "--"]
    return [*words, str(HERE / script), *map(str, arguments)]


def call(script, *arguments, processes=1):
    """Runs a command line in a process of its own."""
    words = command(script, *arguments, processes=processes)
    return subprocess.run(words, capture_output=True, text=True)


def refused(result, *words, status=2):
    """Asserts that a program (what `cli` or `call` returned) ended with one line that begins with
    its name and holds all `words`."""
    if isinstance(result, subprocess.CompletedProcess):
        result = result.returncode, result.stdout, result.stderr
    code, _, stderr = result
    programs = ("jlt.py:", "encode.py:", "fid.py:")
    lines = [line for line in stderr.splitlines() if line.startswith(programs)]
    assert code == status, stderr
    assert "Traceback" not in stderr
    assert len(lines) == 1, stderr
    for word in words:
        assert str(word) in lines[0]


@contextlib.contextmanager
def stops(*words, status=2):
    """Asserts that what is inside raises a Stop of which the line holds all `words`."""
    with pytest.raises(encode.Stop) as stop:
        yield
    assert stop.value.status == status
    for word in words:
        assert str(word) in str(stop.value)


def files_of(folder):
    """-> {name: bytes} of all files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def noise(width, height, seed=0):
    """-> an RGB image of which no two places are alike."""
    generator = np.random.RandomState(seed)
    return Image.fromarray(generator.randint(0, 256, (height, width, 3), dtype=np.uint8))


def oriented(value):
    """-> what a camera writes into its pictures: 1 if it was held upright, 6 on its side."""
    exif = Image.Exif()
    exif[encode.EXIF_ORIENTATION] = value
    return exif


def as_batch(image):
    """A PIL image -> (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def write_cache(folder, n=24, shape=(8, 4, 4), classes=3, **tensors):
    """A cache as another program would write it: random latents, no metadata. `tensors` replace
    its own, None leaves one out. -> folder"""
    generator = torch.Generator().manual_seed(1)
    contents = {
        "latents": torch.randn(n, *shape, generator=generator).half(),
        "latents_flip": torch.randn(n, *shape, generator=generator).half(),
        "labels": (torch.arange(n) % classes).int(),
    }
    contents |= tensors
    contents = {name: tensor for name, tensor in contents.items() if tensor is not None}
    folder.mkdir(exist_ok=True, parents=True)
    save_file(contents, folder / "latents_00000.safetensors")
    return folder


def shard_bytes(n=4, shape=(8, 4, 4), labels=(0, 1, 2, 0), **settings):
    """-> the contents of a shard of encode.py."""
    tensors = {
        "latents": torch.ones(n, *shape).half(),
        "latents_flip": torch.ones(n, *shape).half(),
        "labels": torch.tensor(labels).int(),
    }
    return save(tensors, {"encode": json.dumps(settings)})


class Trap:
    """Pickled, it makes a folder `trapped` where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


# =============================================================== fixtures
@pytest.fixture
def cli(monkeypatch, capsys):
    """A command line in this process: cli(module, *arguments) -> status, stdout, stderr."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        # jlt.py installs its own.
        handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        status = 0
        try:
            encode.run_command(module.main)
        except SystemExit as stop:
            status = stop.code
        for name, handler in handlers.items():
            signal.signal(name, handler)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def save_vae(folder, seed):
    """A small FLUX.2 autoencoder with random weights and BatchNorm statistics. -> folder"""
    torch.manual_seed(seed)
    autoencoder = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32))
    autoencoder.bn.running_mean.normal_(0, 0.1)
    autoencoder.bn.running_var.uniform_(0.05, 0.15)
    autoencoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a small VAE."""
    return save_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="session")
def other_vae(tmp_path_factory):
    """The folder of a VAE with other weights."""
    return save_vae(tmp_path_factory.mktemp("other_vae"), seed=1)


@pytest.fixture(scope="session")
def model(vae):
    """The same VAE, loaded."""
    return encode.load_vae(vae)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Class folders with every kind of picture, and some that are none."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("b_cats", "a_dogs", "c_empty", "d_odd"):
        (root / name).mkdir()
    for i in range(6):
        noise(70, 40 + 9 * i, seed=i).save(root / "b_cats" / f"{i}.JPEG")
        noise(35 + 20 * i, 33, seed=i).save(root / "a_dogs" / f"{i}.png")

    odd = root / "d_odd"
    picture = noise(50, 50)
    picture.convert("L").save(odd / "gray.png")
    picture.convert("CMYK").save(odd / "cmyk.jpg", exif=oriented(1))
    picture.convert("P").save(odd / "palette.gif")
    picture.convert("RGBA").save(odd / "alpha.png")
    picture.resize((3, 5)).save(odd / "tiny.png")
    noise(60, 40).save(odd / "side.jpg", exif=oriented(6))
    deep = np.random.RandomState(0).randint(0, 65536, (50, 60), dtype=np.uint16)
    Image.fromarray(deep).save(odd / "deep.png")
    jpeg = (root / "b_cats/0.JPEG").read_bytes()
    (odd / "UPPER.JPG").write_bytes(jpeg)

    (odd / "cut.jpg").write_bytes(jpeg[:900])
    (odd / "empty.png").write_bytes(b"")
    (odd / "new\nline.png").write_bytes(b"no picture")

    (odd / "notes.txt").write_text("no picture by its name")
    (odd / "._mac.png").write_text("left behind by a Mac")
    (root / ".checkpoints").mkdir()
    picture.save(root / ".checkpoints/hidden.png")
    picture.save(root / "loose.png")
    return root


GOOD_PHOTOS = (
    *(f"a_dogs/{i}.png" for i in range(6)),
    *(f"b_cats/{i}.JPEG" for i in range(6)),
    *(f"d_odd/{name}" for name in ("UPPER.JPG", "alpha.png", "cmyk.jpg", "deep.png", "gray.png")),
    *(f"d_odd/{name}" for name in ("palette.gif", "side.jpg", "tiny.png")),
)
BAD_PHOTOS = ("d_odd/cut.jpg", "d_odd/empty.png", "d_odd/new\nline.png")

Cache = namedtuple("Cache", "folder arguments result")


@pytest.fixture(scope="session")
def cache(photos, vae, tmp_path_factory):
    """The photos encoded by the command line, five to a shard: the folder, the arguments but for
    --out, and how the process ended."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    arguments = [photos, "--vae", vae, "--size", 32, "--shard", 5]
    arguments += ["--batch", 1, "--workers", 1, "--device", "cpu"]
    result = call("encode.py", *arguments, "--out", folder)
    assert result.returncode == 0, result.stderr
    return Cache(folder, arguments, result)


@pytest.fixture
def few_photos(tmp_path):
    """Two classes below train/: three upright pictures and one on its side. -> their parent"""
    for name in ("one", "two"):
        (tmp_path / "few/train" / name).mkdir(parents=True)
    (tmp_path / "few/val").mkdir()
    noise(40, 32).save(tmp_path / "few/train/one/a.png")
    noise(32, 40).save(tmp_path / "few/train/one/b.png")
    noise(60, 40).save(tmp_path / "few/train/one/c.png", exif=oriented(6))
    noise(50, 60).save(tmp_path / "few/train/two/d.png")
    return tmp_path / "few"


@pytest.fixture
def options(vae):
    """What all commands on few photos have in common."""
    return ["--vae", vae, "--size", 32, "--workers", 1, "--device", "cpu"]


@pytest.fixture(scope="session")
def images():
    """A batch of random images (2, 3, 32, 48) in [-1, 1]."""
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="session")
def mode(model, images):
    """The mode of the posterior of `images`, (2, 32, 4, 6)."""
    with torch.no_grad():
        return model.autoencoder.encode(images).latent_dist.mean


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of a cache of 600 digits."""
    folder = tmp_path_factory.mktemp("digits")
    encode.cache_digits(folder, n=600)
    return folder


@pytest.fixture(scope="session")
def codec(digits):
    """The codec of these digits."""
    return encode.load_vae(digits / "codec.safetensors")


@pytest.fixture
def pipeline(monkeypatch):
    """diffusers' own Flux2KleinPipeline. Its module wants a text encoder from transformers, which
    is not needed here: something else stands in."""
    import diffusers.loaders

    stand_in = SimpleNamespace(Qwen2TokenizerFast=object, Qwen3ForCausalLM=object)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    monkeypatch.setattr(diffusers.loaders, "Flux2LoraLoaderMixin", object, raising=False)
    module = importlib.import_module("diffusers.pipelines.flux2.pipeline_flux2_klein")
    return module.Flux2KleinPipeline


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 8 MB of its own. To mount one takes root, as in a container."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_but_for(disk, contents):
    """Fills a disk so that one block is missing to hold all of `contents`, a list of bytes. To
    make room again: remove `rest`."""
    status = os.statvfs(disk)
    blocks = sum(math.ceil(len(data) / status.f_frsize) for data in contents)
    free = status.f_bavail - (blocks - 1)
    (disk / "rest").write_bytes(bytes(free * status.f_frsize))


@pytest.fixture
def ends(monkeypatch, capsys):
    """ends(error) -> the exit status and the words on stderr of a program that raises it."""
    monkeypatch.setattr(sys, "argv", ["folder/program.py"])

    def ends(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as stop:
            encode.run_command(main)
        return stop.value.code, capsys.readouterr().err

    return ends


# =============================================================== pictures
@pytest.mark.parametrize(
    "width, height, halved, left, top",
    [
        (230, 150, [], 21, 0),  # 123 wide at the end, of which 43 are cut away
        (150, 230, [], 0, 21),
        (100, 160, [], 0, 24),
        (300, 160, [(150, 80)], 35, 0),  # at exactly twice the size, too
        (750, 321, [(375, 160), (187, 80)], 53, 0),  # a half pixel is dropped
        (8, 4, [], 40, 0),
    ],
)
def test_center_crop_is_adms(width, height, halved, left, top):
    image = noise(width, height)
    scaled = image
    for size in halved:
        scaled = scaled.resize(size, Image.BOX)
    scale = 80 / min(scaled.size)
    scaled = scaled.resize(
        (round(scaled.width * scale), round(scaled.height * scale)), Image.BICUBIC
    )
    expected = np.asarray(scaled)[top : top + 80, left : left + 80]
    assert np.array_equal(encode.center_crop(image, 80), expected)


def test_center_crop_leaves_a_picture_of_the_size_alone():
    image = noise(32, 32)
    assert np.array_equal(encode.center_crop(image, 32), image)


RGB = noise(20, 30)
GRAY = RGB.convert("L")
PALETTE = RGB.quantize(16)


@pytest.mark.parametrize(
    "name, image, expected",
    [
        ("colour.png", RGB, RGB),
        ("cmyk.tif", RGB.convert("CMYK"), RGB),
        ("alpha.png", Image.merge("RGBA", [*RGB.split(), GRAY]), RGB),
        ("gray.png", GRAY, Image.merge("RGB", [GRAY] * 3)),
        ("gray_alpha.png", Image.merge("LA", [GRAY, GRAY]), Image.merge("RGB", [GRAY] * 3)),
        ("palette.gif", PALETTE, PALETTE.convert("RGB")),
        ("bit.png", GRAY.convert("1"), Image.merge("RGB", [GRAY.convert("1").convert("L")] * 3)),
    ],
)
def test_every_kind_of_picture_is_read_as_rgb(tmp_path, name, image, expected):
    image.save(tmp_path / name)
    opened = encode.open_rgb(tmp_path / name)
    assert opened.mode == "RGB"
    assert np.array_equal(opened, expected)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    opened = np.asarray(encode.open_rgb(tmp_path / name))
    for channel in range(3):
        assert opened[0, :, channel].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, transparency",
    [("bytes.png", bytes(range(16))), ("index.png", 3), ("index.gif", 3)],
    ids=["one for each colour", "one colour", "one colour of a GIF"],
)
def test_transparency_of_palettes_is_dropped_in_silence(tmp_path, name, transparency):
    PALETTE.save(tmp_path / name, transparency=transparency)
    opened = encode.open_rgb(tmp_path / name)
    assert np.array_equal(opened, PALETTE.convert("RGB"))
    opened.save(tmp_path / "again.png")


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    PALETTE.save(tmp_path / "two.gif", save_all=True, append_images=[noise(20, 30, 1).quantize(16)])
    assert np.array_equal(encode.open_rgb(tmp_path / "two.gif"), PALETTE.convert("RGB"))


def test_exif_turns_a_picture_only_if_asked(tmp_path):
    RGB.save(tmp_path / "side.png", exif=oriented(6))
    assert np.array_equal(encode.open_rgb(tmp_path / "side.png"), RGB)
    clockwise = np.rot90(RGB, -1)
    assert np.array_equal(encode.open_rgb(tmp_path / "side.png", turn=True), clockwise)


def test_images_are_listed_by_name_and_without_hidden_ones(tmp_path):
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    pictures = ("b.JPEG", "a.png", "deep/c.WebP", "deep/er/d.tiff")
    for name in (*pictures, "._a.png", ".ipynb_checkpoints/a.png", "a.txt", "png"):
        (tmp_path / name).write_bytes(b"")
    assert encode.list_images(tmp_path) == ["a.png", "b.JPEG", "deep/c.WebP", "deep/er/d.tiff"]


def test_to_uint8_rounds_and_clamps():
    grey = torch.tensor([-1.2, -1, 0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 3])
    assert encode.to_uint8(grey).tolist() == [0, 0, 128, 0, 1, 255, 255]


def test_to_uint8_inverts_to_float():
    every = torch.arange(256).to(torch.uint8)
    assert torch.equal(encode.to_uint8(encode.to_float(every)), every)


def test_a_grid_is_filled_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 3, 2, 4)
    images[4, :, 1, 2] = torch.tensor([7, 8, 9])
    grid = encode.image_grid(images, columns=3)
    assert grid.shape == (3, 4, 12)
    assert grid[0, ::2, ::4].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert grid[:, 3, 6].tolist() == [7, 8, 9]


def test_png_holds_the_image_to_the_bit(tmp_path):
    image = torch.from_numpy(np.array(RGB)).permute(2, 0, 1)
    encode.save_png(tmp_path / "image.png", image)
    assert np.array_equal(Image.open(tmp_path / "image.png"), RGB)


# =============================================================== the VAE
def test_latents_are_normalised_patches_of_the_posterior_mode(model, images, mode):
    latents = encode.encode(model, images)
    assert latents.shape == (2, 128, 2, 3)
    assert latents.dtype == torch.float32
    bn = model.autoencoder.bn
    std = (bn.running_var + model.autoencoder.config.batch_norm_eps).sqrt()
    for k in range(128):
        c, row, column = k // 4, k // 2 % 2, k % 2
        expected = (mode[:, c, row::2, column::2] - bn.running_mean[k]) / std[k]
        torch.testing.assert_close(latents[:, k], expected, rtol=1e-4, atol=1e-5)


def test_decode_inverts_the_normalisation(model, images, mode):
    with torch.no_grad():
        expected = model.autoencoder.decode(mode).sample
    decoded = encode.decode(model, encode.encode(model, images))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GOOD_PHOTOS)
def test_latents_and_pictures_are_those_of_diffusers_pipeline(model, photos, pipeline, name):
    autoencoder = model.autoencoder
    # All that the method asks of the pipeline.
    theirs = SimpleNamespace(vae=autoencoder, _patchify_latents=pipeline._patchify_latents)
    image = encode.center_crop(encode.open_rgb(photos / name), 32)
    x = VaeImageProcessor(vae_scale_factor=16).preprocess(image)
    with torch.no_grad():
        latent = pipeline._encode_vae_image(theirs, x, None)  # (1, 128, 2, 2)
        # The way the pipeline decodes.
        mean = autoencoder.bn.running_mean.view(1, -1, 1, 1)
        variance = autoencoder.bn.running_var.view(1, -1, 1, 1)
        std = (variance + autoencoder.config.batch_norm_eps).sqrt()
        patches = pipeline._unpatchify_latents(latent * std + mean)
        picture = autoencoder.decode(patches).sample
    torch.testing.assert_close(encode.encode(model, as_batch(image)), latent, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(encode.decode(model, latent), picture, rtol=1e-4, atol=1e-4)


def test_a_vae_is_loaded_frozen(model):
    assert not model.autoencoder.training
    assert not any(parameter.requires_grad for parameter in model.autoencoder.parameters())


def test_a_vae_is_found_in_the_folder_vae_of_a_model(vae, model, tmp_path):
    (tmp_path / "vae").symlink_to(vae)
    assert encode.load_vae(tmp_path).fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    "name, same",
    [
        ("encoder.conv_in.weight", False),
        ("quant_conv.bias", False),
        ("bn.running_var", False),
        ("decoder.conv_in.weight", True),
        ("post_quant_conv.bias", True),
    ],
)
def test_the_fingerprint_is_that_of_the_weights_that_make_latents(model, vae, name, same):
    other = encode.load_vae(vae)
    other.autoencoder.state_dict()[name].add_(1)
    assert (other.fingerprint() == model.fingerprint()) == same


# =============================================================== the cache
def test_a_cache_holds_every_readable_picture_with_its_label(cache):
    data = encode.LatentDataset(cache.folder)
    assert len(data) == len(GOOD_PHOTOS)
    assert data.labels.tolist() == [0] * 6 + [1] * 6 + [3] * 8
    assert data.num_classes == 4
    assert data.class_names == ["a_dogs", "b_cats", "c_empty", "d_odd"]


@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_holds_the_latents_of_its_pictures_and_of_their_mirror_images(
    cache, model, photos, flip
):
    data = encode.LatentDataset(cache.folder)
    for i, name in enumerate(GOOD_PHOTOS):
        image = encode.center_crop(encode.open_rgb(photos / name), 32)
        if flip:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        expected = encode.encode(model, as_batch(image))[0]
        # Half a unit of fp16.
        torch.testing.assert_close(data.item(i, flip)[0], expected, rtol=2**-11, atol=4e-5)


def test_shards_are_what_the_released_code_reads(cache):
    paths = sorted(cache.folder.glob("*.safetensors"))
    assert [path.name for path in paths] == [f"latents_{k:05d}.safetensors" for k in range(5)]
    for path, n in zip(paths, (5, 5, 5, 2, 3), strict=True):
        tensors = load_file(path)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            "latents": ((n, 128, 2, 2), torch.float16),
            "latents_flip": ((n, 128, 2, 2), torch.float16),
            "labels": ((n,), torch.int32),
        }


def test_meta_json_says_what_a_cache_holds(cache, vae):
    meta = json.loads((cache.folder / "meta.json").read_text())
    assert meta["classes"] == ["a_dogs", "b_cats", "c_empty", "d_odd"]
    assert meta["images"] == 20
    assert [name for name, _ in meta["skipped"]] == list(BAD_PHOTOS)
    assert all(reason for _, reason in meta["skipped"])
    assert (meta["size"], meta["shards"], meta["vae"]) == (32, 5, str(vae))
    assert (meta["loose"], meta["turned"]) == (["loose.png"], 1)


@pytest.mark.parametrize(
    "words",
    [
        "20 images and their mirror images in 5 shards",
        "3 files skipped",
        "no image in 1 of the classes ('c_empty')",
        "1 are not upright, by their EXIF data (--exif turns them)",
        "1 images in no class folder left out ('loose.png')",
    ],
)
def test_the_last_line_counts(cache, words):
    assert words in cache.result.stdout
    assert cache.result.stdout.count("\n") == 1


def test_skipped_files_are_named_on_the_way(cache):
    lines = [line for line in cache.result.stderr.splitlines() if "skipped '" in line]
    assert len(lines) == 3
    for name, line in zip(BAD_PHOTOS, lines, strict=True):
        assert f"skipped {name!a}: " in line


def test_reconstructions_show_originals_and_what_their_latents_decode_to(cache, model, photos):
    # Every third of the 23 files; of the eight, cut.jpg cannot be read.
    names = [name for name in sorted(GOOD_PHOTOS + BAD_PHOTOS)[::3] if name in GOOD_PHOTOS]
    sheet = np.asarray(Image.open(cache.folder / "reconstructions.png")).astype(int)
    assert sheet.shape == (len(names) * 32, 2 * 32, 3)
    for row, name in enumerate(names):
        image = encode.center_crop(encode.open_rgb(photos / name), 32)
        decoded = encode.decode(model, encode.encode(model, as_batch(image)))[0]
        decoded = encode.to_uint8(decoded).permute(1, 2, 0).numpy()
        left, right = np.split(sheet[row * 32 : (row + 1) * 32], 2, axis=1)
        assert np.array_equal(left, image)
        assert np.abs(right - decoded).max() <= 1


def test_train_is_used_where_it_exists(cli, few_photos, options, tmp_path):
    status, _, stderr = cli(encode, few_photos, *options, "--out", tmp_path / "latents")
    assert status == 0, stderr
    data = encode.LatentDataset(tmp_path / "latents")
    assert data.class_names == ["one", "two"]
    assert data.labels.tolist() == [0, 0, 0, 1]


def test_exif_turns_pictures_upright(cli, few_photos, options, model, tmp_path):
    out = tmp_path / "latents"
    status, stdout, _ = cli(encode, few_photos, *options, "--exif", "--out", out)
    assert status == 0
    assert "; 1 turned upright" in stdout
    upright = Image.fromarray(np.rot90(noise(60, 40), -1))
    expected = encode.encode(model, as_batch(encode.center_crop(upright, 32)))[0]
    latent, _ = encode.LatentDataset(out)[2]
    torch.testing.assert_close(latent, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_may_cross_the_size_of_a_shard(cli, few_photos, options, model, tmp_path, batch):
    out = tmp_path / "latents"
    arguments = [*options, "--shard", 3, "--batch", batch, "--out", out]
    assert cli(encode, few_photos, *arguments)[0] == 0
    data = encode.LatentDataset(out)
    assert data.labels.tolist() == [0, 0, 0, 1]
    for i, name in enumerate(("one/a.png", "one/b.png", "one/c.png", "two/d.png")):
        image = encode.center_crop(encode.open_rgb(few_photos / "train" / name), 32)
        for flip, x in enumerate((as_batch(image), as_batch(image).flip(-1))):
            latent, _ = data.item(i, flip)
            torch.testing.assert_close(latent, encode.encode(model, x)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shard", [1, 4], ids=["a shard without a picture", "within a shard"])
def test_labels_follow_their_pictures_past_those_skipped(cli, few_photos, options, tmp_path, shard):
    (few_photos / "train/one/b.png").write_bytes(b"no picture")
    out = tmp_path / "latents"
    assert cli(encode, few_photos, *options, "--shard", shard, "--out", out)[0] == 0
    assert [label for _, label in encode.LatentDataset(out)] == [0, 0, 1]


# =============================================================== reading a cache
def test_items_are_float32_latents_and_labels(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path))
    latent, label = data[7]
    assert latent.shape == data.shape == (8, 4, 4)
    assert latent.dtype == torch.float32
    assert label == 1
    assert type(label) is int


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_caches_of_other_programs_are_read_to_the_bit(tmp_path, dtype):
    latents = torch.randn(6, 8, 4, 4).to(dtype)
    flipped = latents.flip(-1).contiguous()
    write_cache(tmp_path, n=6, latents=latents, latents_flip=flipped)
    data = encode.LatentDataset(tmp_path)
    for i in range(6):
        assert torch.equal(data.item(i)[0], latents[i].float())
        assert torch.equal(data.item(i, flip=True)[0], flipped[i].float())
    assert (data.num_classes, data.class_names) == (3, [])


def test_where_there_are_no_mirror_images_flip_gives_the_image_itself(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path, latents_flip=None))
    assert torch.equal(data.item(5, flip=True)[0], data.item(5)[0])


def test_negative_numbers_count_from_the_end(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path))
    assert torch.equal(data[-1][0], data[23][0])
    assert data[-1][1] == data[23][1]


@pytest.mark.parametrize("i", [24, -25])
def test_numbers_beyond_the_end_are_an_index_error(tmp_path, i):
    data = encode.LatentDataset(write_cache(tmp_path))
    with pytest.raises(IndexError):
        data[i]


def test_items_are_those_of_the_shards_one_after_another(cache):
    data = encode.LatentDataset(cache.folder)
    tensors = [load_file(path) for path in sorted(cache.folder.glob("*.safetensors"))]
    for flip, name in enumerate(("latents", "latents_flip")):
        expected = torch.cat([shard[name] for shard in tensors])
        read = torch.stack([data.read(i, flip) for i in range(len(data))])
        assert read.dtype == torch.float16
        assert torch.equal(read, expected)
    assert torch.equal(data.labels, torch.cat([shard["labels"] for shard in tensors]).long())


def test_a_data_set_can_be_pickled_for_other_processes(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.item(3, flip=True)[0], data.item(3, flip=True)[0])


def test_the_origin_of_a_cache_is_its_encoder_and_its_files(cache, model):
    encoder, files = encode.LatentDataset(cache.folder).origin
    assert encoder == model.fingerprint()
    assert files


def test_the_origin_tells_caches_of_other_pictures_and_encoders_apart(tmp_path):
    origins = set()
    for encoder, files in (("a", "x"), ("b", "x"), ("a", "y")):
        folder = tmp_path / f"{encoder}{files}"
        folder.mkdir()
        contents = shard_bytes(encoder=encoder, files=files)
        (folder / "latents_00000.safetensors").write_bytes(contents)
        origins.add(encode.LatentDataset(folder).origin)
    assert len(origins) == 3


# =============================================================== interruptions, several processes
def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with encode.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert files_of(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError(errno.ENOSPC, "No space left on device"), encode.Stop),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), encode.Stop),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, error, raised):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(raised), encode.replacing(path) as temporary:
        temporary.write_text("ne")
        raise error
    assert files_of(tmp_path) == {"file": b"old"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".tmp.77.file").write_text("half")
    (tmp_path / ".tmp.77.another").write_text("perhaps being written")
    with encode.replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert set(files_of(tmp_path)) == {"file", ".tmp.77.another"}


def test_killed_encoding_is_continued_to_the_same_bytes(cache, cli, tmp_path):
    out = tmp_path / "latents"
    words = command("encode.py", *cache.arguments, "--out", out)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "latents_00001.safetensors").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    # Should it have come further in the meantime.
    (out / "latents_00004.safetensors").unlink(missing_ok=True)
    (out / ".tmp.1.latents_00004.safetensors").write_bytes(b"half")
    with stops("of 5 shards; the same encode.py command finishes it"):
        encode.LatentDataset(out)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("latents_*")}

    assert cli(encode, *cache.arguments, "--out", out)[0] == 0
    assert files_of(out) == files_of(cache.folder)
    assert len(finished) >= 2
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written


@pytest.mark.long
def test_encoding_outlives_25_kills_at_random_moments(cache, tmp_path):
    expected = files_of(cache.folder)
    out = tmp_path / "latents"
    random = np.random.default_rng(0)
    words = command("encode.py", *cache.arguments, "--out", out)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.time()
    subprocess.run(words, check=True, **silent)
    duration = time.time() - start
    kills = 0
    while kills < 25:
        process = subprocess.Popen(words, **silent)
        try:
            process.wait(timeout=random.uniform(0.3, 1.02) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        found = files_of(out) if out.exists() else {}
        for name, data in found.items():
            if not name.startswith(".tmp"):
                assert data == expected[name]
        if process.returncode == 0:
            assert found == expected
            shutil.rmtree(out)
    subprocess.run(words, check=True, **silent)
    assert files_of(out) == expected


def test_each_process_encodes_its_own_shards(cache, cli, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    expected = files_of(cache.folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli(encode, *cache.arguments, "--out", out)[0] == 0
    mine = ("latents_00001.safetensors", "latents_00003.safetensors")
    assert files_of(out) == {name: expected[name] for name in mine}


def test_the_first_process_ends_when_all_shards_are_there(cache, cli, tmp_path, monkeypatch):
    out = tmp_path / "latents"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("latents_00001.safetensors", "latents_00003.safetensors"):
        shutil.copy(cache.folder / name, tmp_path)
        threading.Timer(3, os.replace, [tmp_path / name, out / name]).start()
    assert cli(encode, *cache.arguments, "--out", out)[0] == 0
    assert files_of(out) == files_of(cache.folder)


def test_two_processes_make_the_same_bytes(cache, tmp_path):
    out = tmp_path / "latents"
    result = call("encode.py", *cache.arguments, "--out", out, processes=2)
    assert result.returncode == 0, result.stderr
    assert files_of(out) == files_of(cache.folder)
    assert "20 images and their mirror images" in result.stdout


# =============================================================== drawn digits
def test_digits_are_of_all_classes_in_turn():
    images, labels = encode.draw_digits(12, seed=5)
    assert images.shape == (12, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_digits_are_a_function_of_the_seed():
    images, _ = encode.draw_digits(30, seed=5)
    assert torch.equal(encode.draw_digits(30, seed=5)[0], images)
    assert not torch.equal(encode.draw_digits(30, seed=6)[0], images)


def test_ink_is_brighter_than_paper_and_does_not_touch_the_edge():
    images, _ = encode.draw_digits(600, seed=5)
    images = images.float().mean(1)
    paper = images[:, 0, 0]
    assert ((images.amax((1, 2)) - paper) > 60).all()
    assert torch.equal(images.amin((1, 2)), paper)
    edges = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], 1)
    assert ((edges - paper[:, None]).abs() < 1).float().mean() > 0.99


GLYPHS = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#...# ..#.. ....# ..#.. .#.#. #.... #.... ...#. #...# #...#
#...# ..#.. ...#. ...#. #..#. ####. ####. ..#.. .###. .####
#...# ..#.. ..#.. ....# ##### ....# #...# .#... #...# ....#
#...# ..#.. .#... #...# ...#. ....# #...# .#... #...# ...#.
.###. .###. ##### .###. ...#. ####. .###. .#... .###. .##..
"""


def shapes(images):
    """(N, C, H, W) -> (N, HW) of length 1, about 0: their products say how alike they look."""
    gray = images.float().mean(1).flatten(1)
    return F.normalize(gray - gray.mean(1, keepdim=True))


def test_digits_look_like_what_their_labels_say():
    glyphs = np.array(list("".join(GLYPHS.split()))).reshape(7, 10, 5) == "#"
    glyphs = torch.from_numpy(glyphs).permute(1, 0, 2)[:, None].float()  # (10, 1, 7, 5)
    glyphs = F.pad(F.interpolate(glyphs, (22, 14), mode="bilinear"), (9, 9, 5, 5))
    images, labels = encode.draw_digits(300, seed=5)
    likeness = shapes(images) @ shapes(glyphs).T  # (300, 10)
    for digit in range(10):
        assert likeness[labels == digit].mean(0).argmax() == digit


def test_digits_of_a_later_chunk_look_like_those_before():
    images, labels = encode.draw_digits(1000, seed=5)
    seen, new = shapes(images).split(500)
    means = torch.stack([seen[labels[:500] == digit].mean(0) for digit in range(10)])
    read = (new @ F.normalize(means).T).argmax(1)
    assert (read == labels[500:]).float().mean() > 0.95


def test_the_codec_is_orthonormal(codec):
    assert codec.channels == 128
    product = codec.basis.T @ codec.basis
    torch.testing.assert_close(product, torch.eye(128), rtol=0, atol=1e-4)


def test_the_codec_is_a_projection(codec):
    images = encode.to_float(encode.draw_digits(20, seed=5)[0])
    latents = encode.encode(codec, images)
    decoded = encode.decode(codec, latents)
    assert decoded.shape == images.shape
    torch.testing.assert_close(encode.encode(codec, decoded), latents, rtol=0, atol=1e-3)
    # Of what it was fitted on, most.
    assert (decoded - images).square().mean() < 0.05 * images.var()


def test_latents_of_digits_are_principal_components_of_mean_variance_one(digits):
    data = encode.LatentDataset(digits)
    latents = torch.stack([latent for latent, _ in data])  # (600, 128, 2, 2)
    tokens = latents.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(tokens.mean(0), torch.zeros(128), rtol=0, atol=0.01)
    covariance = torch.cov(tokens.double().T)
    variances = covariance.diagonal()
    assert variances.mean() == pytest.approx(1, rel=0.01)
    assert (variances.diff() < 0.01 * variances[:-1]).all()
    # Directions of low variance stay low.
    assert variances[0] > 100 * variances[-1]
    assert (covariance - variances.diag()).abs().max() < 0.02 * variances.max()


def test_a_cache_of_digits_is_read_like_any_other(digits, codec):
    data = encode.LatentDataset(digits)
    assert len(data) == 600
    assert data.shape == (128, 2, 2)
    assert data.num_classes == 10
    assert data.settings["vae"] == str(digits / "codec.safetensors")
    images, labels = encode.draw_digits(600, seed=1)
    assert torch.equal(data.labels, labels)
    expected = encode.encode(codec, encode.to_float(images[:1]))[0]
    torch.testing.assert_close(data[0][0], expected, rtol=2e-3, atol=2e-3)


def test_a_digit_is_not_mirrored(digits):
    data = encode.LatentDataset(digits)
    assert torch.equal(data.item(3, flip=True)[0], data.item(3)[0])


def test_digits_that_are_there_stay(digits):
    before = files_of(digits)
    encode.cache_digits(digits, n=30)
    assert files_of(digits) == before


# =============================================================== full disks
@pytest.mark.parametrize("name", ["reconstructions.png", "latents_00003.safetensors", "meta.json"])
def test_a_full_disk_is_one_line_and_harms_nothing(cache, cli, small_disk, name):
    whole = files_of(cache.folder)
    shards = sorted(file for file in whole if file.endswith(".safetensors"))
    order = ["reconstructions.png", *shards, "meta.json"]
    written = order[: order.index(name)]
    fill_but_for(small_disk, [whole[file] for file in [*written, name]])
    out = small_disk / "latents"

    refused(cli(encode, *cache.arguments, "--out", out), name, "is the disk full?", status=1)
    assert files_of(out) == {file: whole[file] for file in written}

    (small_disk / "rest").unlink()
    assert cli(encode, *cache.arguments, "--out", out)[0] == 0
    assert files_of(out) == whole


def test_a_full_disk_leaves_an_older_file_alone(cache, cli, small_disk):
    out = small_disk / "latents"
    out.mkdir()
    (out / "reconstructions.png").write_bytes(b"of the last time")
    fill_but_for(small_disk, [(cache.folder / "reconstructions.png").read_bytes()])
    result = cli(encode, *cache.arguments, "--out", out)
    refused(result, "reconstructions.png", "What was there is intact", status=1)
    assert files_of(out) == {"reconstructions.png": b"of the last time"}


@pytest.mark.parametrize("name", ["codec.safetensors", "latents_00000.safetensors"])
def test_a_full_disk_under_the_digits(digits, small_disk, name):
    whole = files_of(digits)
    order = ["codec.safetensors", "latents_00000.safetensors"]
    written = order[: order.index(name)]
    fill_but_for(small_disk, [whole[file] for file in [*written, name]])
    folder = small_disk / "digits"
    with stops(f"{name}: cannot be written; is the disk full?", status=1):
        encode.cache_digits(folder, n=600)
    assert set(files_of(folder)) == set(written)

    (small_disk / "rest").unlink()
    encode.cache_digits(folder, n=600)
    assert len(encode.LatentDataset(folder)) == 600


# =============================================================== faults: caches
WHOLE = shard_bytes()
OTHER_SHAPE = shard_bytes(shape=(8, 2, 2))


@pytest.mark.parametrize(
    "contents, status, words",
    [
        ([], 2, "holds no latents_*.safetensors"),
        ([shard_bytes(n=0, labels=())], 2, "holds no latents; was no image readable?"),
        ([shard_bytes(number=0, shards=3)], 2, "1 of 3 shards; the same encode.py command"),
        ([shard_bytes(number=1, shards=2)], 2, "1 of 2 shards"),
        ([shard_bytes(number=k, shards=2) for k in (0, 2)], 2, "2 of 2 shards"),
        ([WHOLE, OTHER_SHAPE], 2, "mixes latents of different shape or origin"),
        ([shard_bytes(encoder=name) for name in "ab"], 2, "mixes latents"),
        ([shard_bytes(files=name) for name in "ab"], 2, "mixes latents"),
        ([shard_bytes(num_classes=2)], 2, "labels 0 to 2 do not fit 2 classes"),
        ([shard_bytes(labels=(0, -1, 1, 2))], 2, "labels -1 to 2 do not fit 3 classes"),
        ([WHOLE, b""], 1, "latents_00001.safetensors: no shard of latents"),
        ([WHOLE, b"no shard at all"], 1, "latents_00001.safetensors: no shard of latents"),
        ([WHOLE[:4]], 1, "latents_00000.safetensors: no shard of latents"),
        ([WHOLE[:100]], 1, "latents_00000.safetensors: no shard of latents"),
        ([WHOLE[:-1]], 1, "delete it and encode again"),
        ([WHOLE + b"!"], 1, "delete it and encode again"),
        ([bytes(8) + WHOLE[8:]], 1, "delete it and encode again"),
        ([shard_bytes(labels=(0, 1, 2))], 1, "no shard of latents (N, C, H, W) and labels (N,)"),
        ([shard_bytes(shape=(8,))], 1, "no shard of latents (N, C, H, W) and labels (N,)"),
        ([shard_bytes(shape=(8, 4, 2))], 1, "no shard of latents (N, C, H, W) and labels (N,)"),
        ([save({"pixels": torch.ones(4)})], 1, "no shard of latents"),
        ([save({"latents": torch.ones(4, 8, 4, 4)})], 1, "no shard of latents"),
        ([pickle.dumps(Trap())], 1, "no shard of latents"),
    ],
)
def test_a_cache_that_cannot_be_read_is_refused(tmp_path, monkeypatch, contents, status, words):
    monkeypatch.chdir(tmp_path)
    for number, data in enumerate(contents):
        (tmp_path / f"latents_{number:05d}.safetensors").write_bytes(data)
    with stops(tmp_path, words, status=status):
        encode.LatentDataset(tmp_path)
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    "n, flipped",
    [(4, torch.ones(3, 8, 4, 4).half()), (4, torch.ones(4, 8, 4, 4))],
    ids=["another number", "another precision"],
)
def test_mirror_images_that_do_not_fit_are_refused(tmp_path, n, flipped):
    write_cache(tmp_path, n=n, latents_flip=flipped)
    with stops("latents_00000.safetensors: no shard of latents", status=1):
        encode.LatentDataset(tmp_path)


def test_a_missing_cache_is_refused_with_the_command_that_makes_it(tmp_path):
    with stops("nowhere: no such folder; encode.py IMAGES --out"):
        encode.LatentDataset(tmp_path / "nowhere")


def test_a_damaged_meta_json_is_refused(tmp_path):
    (write_cache(tmp_path) / "meta.json").write_text('{"classes": ["a", ')
    with stops("meta.json: damaged; the same encode.py command writes it anew"):
        encode.LatentDataset(tmp_path)


def test_a_shard_that_became_shorter_is_noticed(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path))
    os.truncate(tmp_path / "latents_00000.safetensors", 4000)
    with stops("latents_00000.safetensors: is shorter than it was", status=1):
        data.item(23, flip=True)


# =============================================================== faults: the command
@pytest.mark.parametrize(
    "change, words",
    [
        ("--size 48", "size 32 (now 48)"),
        ("--shard 7", "shard 5 (now 7)"),
        ("--exif", "exif False (now True)"),
        ("--vae {other_vae}", "made with other settings: encoder"),
    ],
)
def test_a_cache_of_other_settings_is_refused(cache, cli, other_vae, change, words):
    before = files_of(cache.folder)
    change = change.format(other_vae=other_vae).split()
    result = cli(encode, *cache.arguments, "--out", cache.folder, *change)
    refused(result, cache.folder, "made with other settings", words, "give another --out")
    assert files_of(cache.folder) == before


def test_a_cache_of_other_pictures_is_refused(cache, cli, few_photos):
    before = files_of(cache.folder)
    result = cli(encode, few_photos, *cache.arguments[1:], "--out", cache.folder)
    refused(result, cache.folder, "made with other settings", "files")
    assert files_of(cache.folder) == before


def test_the_cache_of_another_program_is_refused(cache, cli, tmp_path):
    before = files_of(write_cache(tmp_path))
    refused(cli(encode, *cache.arguments, "--out", tmp_path), tmp_path, "made with other settings")
    assert files_of(tmp_path) == before


def test_the_same_vae_may_lie_elsewhere(cache, cli, vae, tmp_path):
    out = tmp_path / "latents"
    shutil.copytree(cache.folder, out)
    shutil.copytree(vae, tmp_path / "moved")
    assert cli(encode, *cache.arguments, "--vae", tmp_path / "moved", "--out", out)[0] == 0


@pytest.mark.parametrize(
    "line, status, words",
    [
        ("", 2, "arguments are required: images"),
        ("nowhere", 2, "nowhere: no such folder; give the one that holds the class folders"),
        ("few/train/one/a.png", 2, "a.png: no such folder"),
        ("few/train/one", 2, "few/train/one: no images in class folders; arrange them as"),
        ("few --size 40", 2, "--size 40: must be a multiple of 16"),
        ("few --size 0", 2, "--size 0: must be positive"),
        ("few --size big", 2, "--size: invalid int value: 'big'"),
        ("few --batch 0", 2, "--batch 0: must be positive"),
        ("few --shard -1", 2, "--shard -1: must be positive"),
        ("few --workers -2", 2, "--workers -2: must not be negative"),
        ("few --bach 8", 2, "unrecognized arguments: --bach 8"),
        ("few --siz 64", 2, "unrecognized arguments: --siz 64"),
        ("few --device tpu", 2, "--device tpu: not on this machine, which has"),
        ("few --vae {vae} --out file", 2, "file: is a file; give a folder"),
        ("few --vae nobody/no-such-vae", 2, "--vae nobody/no-such-vae: no AutoencoderKLFlux2"),
        ("few --vae few", 2, "--vae few: no AutoencoderKLFlux2 there; to fetch one: hf download"),
        ("few --vae trap.codec.safetensors", 2, "not a codec of drawn digits"),
    ],
)
def test_mistakes_are_one_line(cli, few_photos, vae, tmp_path, monkeypatch, line, status, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    Path("trap.codec.safetensors").write_bytes(pickle.dumps(Trap()))
    before = sorted(tmp_path.rglob("*"))
    refused(cli(encode, *line.format(vae=vae).split()), words, status=status)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["another width", "other names", "a pickle"])
def test_weights_of_another_model_are_refused(cli, few_photos, vae, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(vae, "vae")
    weights = Path("vae/diffusion_pytorch_model.safetensors")
    if kind == "another width":
        config = json.loads(Path("vae/config.json").read_text())
        config["block_out_channels"] = [64, 64, 64, 64]
        Path("vae/config.json").write_text(json.dumps(config))
    if kind == "other names":
        save_file({"another." + name: w for name, w in load_file(weights).items()}, weights)
    if kind == "a pickle":
        weights.unlink()
        torch.save(Trap(), "vae/diffusion_pytorch_model.bin")
    refused(cli(encode, few_photos, "--vae", "vae", "--device", "cpu"), "--vae vae: ")
    assert not Path("trapped").exists()
    assert not Path("latents").exists()


def test_under_torchrun_a_mistake_is_one_line_too():
    result = call("encode.py", "nowhere", processes=2)
    assert result.returncode == 1
    # torchrun itself reports below that its processes failed.
    lines = [line for line in result.stderr.splitlines() if line.startswith("encode.py:")]
    assert len(lines) == 1
    assert "nowhere: no such folder" in lines[0]
    assert "exitcode  : 2" in result.stderr


# =============================================================== faults: what all programs share
@pytest.mark.parametrize(
    "error, status, line",
    [
        (encode.Stop("a: wrong"), 2, "program.py: a: wrong"),
        (encode.Stop("a:\n  wrong", status=1), 1, "program.py: a: wrong"),
        (KeyboardInterrupt(), 130, "program.py: interrupted"),
        (PermissionError(13, "Permission denied", "a"), 1, "program.py: a: Permission denied"),
        (OSError("the network is gone"), 1, "program.py: a file: the network is gone"),
        (MemoryError(), 1, "program.py: out of memory; lower --batch"),
        (torch.OutOfMemoryError("CUDA"), 1, "program.py: out of memory; lower --batch"),
    ],
)
def test_faults_that_one_line_explains(ends, error, status, line):
    code, stderr = ends(error)
    assert code == status
    assert stderr.startswith(line)
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("a"), KeyError("a")])
def test_other_faults_keep_their_traceback(monkeypatch, error):
    def main():
        raise error

    with pytest.raises(type(error)):
        encode.run_command(main)


@pytest.mark.parametrize("status", [1, 2])
def test_a_fault_of_one_process_is_told_by_that_process(ends, monkeypatch, status):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fault = encode.Stop("GPU 1 is lost", status=status)
    assert ends(fault) == (status, "program.py: GPU 1 is lost\n")


def test_that_a_signal_came_is_told_by_the_first_process_only(ends, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    stopped = encode.Stop("stopped by a signal", status=130)
    assert ends(stopped) == (130, "program.py: stopped by a signal\n")
    monkeypatch.setenv("RANK", "1")
    assert ends(stopped) == (130, "")


def test_a_program_without_faults_just_returns(capsys):
    assert encode.run_command(dict) == {}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "a"), "a: no zip (No such file or"),
        (RuntimeError("Bad magic. And more"), "a: no zip (Bad magic)"),
        (EOFError(), "a: no zip (EOFError)"),
        (encode.Stop("b: of another kind"), "b: of another kind"),
    ],
)
def test_reading_explains_what_went_wrong(error, line):
    with stops(line), encode.explaining("a", "no zip"):
        raise error


def test_reading_does_not_hide_a_lack_of_memory():
    with pytest.raises(MemoryError), encode.explaining("a", "no zip"):
        raise MemoryError


def test_a_new_file_may_be_written(tmp_path, monkeypatch):
    encode.require_new(tmp_path / "new.png")
    monkeypatch.chdir(tmp_path)
    encode.require_new("new.png")


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "old.png").write_text("x")
    with stops("old.png: exists already; give another name"):
        encode.require_new(tmp_path / "old.png")


def test_a_file_in_no_folder_is_refused(tmp_path):
    with stops("new.png: there is no folder", "nowhere; make it first"):
        encode.require_new(tmp_path / "nowhere/new.png")


def test_a_file_in_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, kind: False)
    with stops("new.png: no permission to write in the folder"):
        encode.require_new(tmp_path / "new.png")


# =============================================================== score
# ---------------------------------------------------------------- fixtures
class WithoutWeights(fid.Inception):
    def load_state_dict(self, state):
        pass


def plausible(name, shape, generator):
    """-> a random tensor under which activations neither die nor explode."""
    x = torch.randn(shape, generator=generator)
    if name.endswith("conv.weight"):
        return x * (2 / x[0].numel()) ** 0.5
    if name.endswith("bn.weight"):
        return 1 + 0.2 * x
    if name.endswith("bn.running_var"):
        return (1 + 0.2 * x).clamp(min=0.3)
    if name.endswith("bn.num_batches_tracked"):
        return torch.tensor(7)
    return 0.1 * x


@pytest.fixture(scope="session")
def inception_weights():
    """-> a random state dict."""
    generator = torch.Generator().manual_seed(0)
    state = WithoutWeights({}).state_dict()
    return {name: plausible(name, x.shape, generator) for name, x in state.items()}


@pytest.fixture(scope="session")
def inception(inception_weights):
    return fid.Inception(inception_weights)


def random_images(n, height, width, seed=0):
    """-> uint8 (n, H, W, 3), the first bright, the later ones darker and darker."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return images // np.arange(1, n + 1, dtype=np.uint8).reshape(n, 1, 1, 1)


def save_images(folder, images):
    """Writes 000.png and so on. -> folder"""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def sets(inception_weights, tmp_path_factory):
    """A folder of image sets and of files of weights."""
    root = tmp_path_factory.mktemp("sets")
    torch.save(inception_weights, root / "zip.pth")
    # As the real file is.
    torch.save(inception_weights, root / "legacy.pth", _use_new_zipfile_serialization=False)

    # Ten images of one size: in a folder, some deeper, one gray, one with alpha, and as an npz.
    images = random_images(10, 24, 40)
    images[3] = images[3, :, :, :1]
    equal = save_images(root / "equal", images)
    Image.fromarray(images[3, :, :, 0]).save(equal / "003.png")
    with_alpha = Image.fromarray(images[4])
    with_alpha.putalpha(Image.fromarray(images[0, :, :, 0]))
    with_alpha.save(equal / "004.png")
    (equal / "deeper").mkdir()
    for i in (8, 9):
        (equal / f"{i:03d}.png").rename(equal / "deeper" / f"{i:03d}.png")
    np.savez(root / "equal.npz", arr_0=images)

    # Ten of two sizes.
    save_images(root / "mixed", [*random_images(5, 33, 21, seed=1)])
    for i, image in enumerate(random_images(5, 16, 50, seed=2)):
        Image.fromarray(image).save(root / "mixed" / f"{5 + i:03d}.png")
    return root


class StandIn(nn.Module):
    """A quick network that remembers the images it was given: its features are means of pixels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2048, 1008)
        self.seen = []

    def forward(self, images):
        self.seen += images
        pixels = F.adaptive_avg_pool2d(images.float(), 8).flatten(1)  # (B, 192)
        features = F.pad(pixels, (0, 2048 - 192))
        return features, features[:, :1008]


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a StandIn where the command makes its network, and a distance of 1."""
    net = StandIn()
    monkeypatch.setattr(fid, "Inception", lambda weights: net)
    monkeypatch.setattr(fid, "frechet_distance", lambda *gaussians: 1.0)
    return net


@pytest.fixture
def no_network(monkeypatch):
    """What must be refused before anything is computed."""
    monkeypatch.setattr(fid, "Inception", None)


def warnings_in(stderr):
    return [line for line in stderr.splitlines() if line.startswith("fid.py: ")]


class PickledCode:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("this must not run",)


# ---------------------------------------------------------------- resize
def taps(size):
    """-> left pixel, right pixel, weight of the right, for each of 299 places; all in float32."""
    scale = np.float32(size) / np.float32(299)
    places = [np.float32(i) * scale for i in range(299)]
    return [(int(x), min(int(x) + 1, size - 1), x - np.float32(int(x))) for x in places]


def resize_by_loops(image):
    """TensorFlow's kernel, one float32 operation at a time. (H, W) uint8 -> (299, 299)."""
    image = image.astype(np.float32)
    height, width = image.shape
    out = np.empty((299, 299), np.float32)
    for i, (top, bottom, dy) in enumerate(taps(height)):
        for j, (left, right, dx) in enumerate(taps(width)):
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            value = above + (below - above) * dy
            out[i, j] = (value - np.float32(128)) / np.float32(128)
    return out


@pytest.mark.parametrize("size", [(7, 33), (301, 611)])
def test_resize_is_tensorflows_bit_for_bit(size):
    image = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    resized = fid.tf_resize(torch.from_numpy(image).expand(1, 3, *size))
    assert resized.shape == (1, 3, 299, 299)
    assert resized.dtype == torch.float32
    assert np.array_equal(resized[0, 1].numpy(), resize_by_loops(image))


def resized_square():
    """-> [[0, 100], [200, 40]] at 299 x 299, in pixel values."""
    square = torch.tensor([[0, 100], [200, 40]], dtype=torch.uint8)
    return fid.tf_resize(square.expand(1, 3, 2, 2))[0, 0] * 128 + 128


def test_resize_starts_at_the_first_pixel_and_ends_flat():
    resized = resized_square()
    assert resized[0, 0] == 0
    assert resized[150, 0] == 200
    # From 150 on only the last column is left.
    assert (resized[0, 150:] == 100).all()


def test_resize_between_pixels_by_hand():
    resized = resized_square()
    # Place 75 is read at 75 * 2 / 299, a little right of the middle between two pixels.
    right = 150 / 299
    above = 100 * right
    below = 200 - 160 * right
    assert resized[0, 75].item() == pytest.approx(above, rel=1e-6)
    assert resized[75, 75].item() == pytest.approx(above + (below - above) * right, rel=1e-6)


def test_resize_does_not_antialias():
    images = torch.randint(0, 256, (2, 3, 299, 598), dtype=torch.uint8)
    assert torch.equal(fid.tf_resize(images), (images[..., ::2].float() - 128) / 128)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_resize_refuses_other_input(images):
    with stops("uint8 (B, 3, H, W)", tuple(images.shape)):
        fid.tf_resize(images)


# ---------------------------------------------------------------- the network
def test_state_dict_has_the_size_of_pytorch_fids(inception):
    state = inception.state_dict()
    assert len(state) == 566
    assert sum(name.endswith("conv.weight") for name in state) == 94
    assert sum(x.numel() for x in state.values()) == 23_885_486


PYTORCH_FID = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.bn.bias": (96,),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6d.branch7x7_3.conv.weight": (192, 160, 7, 1),
    "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
    "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch_pool.bn.num_batches_tracked": (),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


@pytest.mark.parametrize("name", PYTORCH_FID)
def test_state_dict_has_pytorch_fids_names_and_shapes(inception, name):
    assert inception.state_dict()[name].shape == PYTORCH_FID[name]


def test_inception_is_in_evaluation_mode_and_full_precision(inception):
    assert not inception.training
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def windows(x, outside):
    """-> the 3x3 neighbourhoods of each pixel (B, C, H, W, 9)."""
    padded = F.pad(x, (1, 1, 1, 1), value=outside)
    return padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)


def mean_of_pixels_inside(x):
    return windows(x, outside=torch.nan).nanmean(-1)


def maximum(x):
    return windows(x, outside=-torch.inf).amax(-1)


def maximum_of_every_second(x):
    return maximum(x)[:, :, 1:-1:2, 1:-1:2]


class Layers:
    """Convolution, batch norm and ReLU of a block, written out from the weights alone."""

    def __init__(self, weights, block):
        self.weights = weights
        self.block = block

    def __call__(self, x, *names, halving=False):
        """Layers one after the other; `halving`: the last has stride 2 and no padding."""
        for name in names:
            last = halving and name == names[-1]
            x = self.layer(x, name, last)
        return x

    def layer(self, x, name, halving):
        kernel = self.weights[f"{self.block}.{name}.conv.weight"]
        keys = ("running_mean", "running_var", "weight", "bias")
        columns = [self.weights[f"{self.block}.{name}.bn.{key}"][:, None, None] for key in keys]
        mean, variance, scale, shift = columns
        if halving:
            x = F.conv2d(x, kernel, stride=2)
        else:
            x = F.conv2d(x, kernel, padding=[size // 2 for size in kernel.shape[2:]])
        return ((x - mean) / (variance + 1e-3).sqrt() * scale + shift).clamp(min=0)


def block_5(x, layers):
    return [
        layers(x, "branch1x1"),
        layers(x, "branch5x5_1", "branch5x5_2"),
        layers(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
        layers(mean_of_pixels_inside(x), "branch_pool"),
    ]


def block_6a(x, layers):
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return [
        layers(x, "branch3x3", halving=True),
        layers(x, *double, halving=True),
        maximum_of_every_second(x),
    ]


def block_6(x, layers):
    return [
        layers(x, "branch1x1"),
        layers(x, *[f"branch7x7_{i}" for i in (1, 2, 3)]),
        layers(x, *[f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)]),
        layers(mean_of_pixels_inside(x), "branch_pool"),
    ]


def block_7a(x, layers):
    return [
        layers(x, "branch3x3_1", "branch3x3_2", halving=True),
        layers(x, *[f"branch7x7x3_{i}" for i in (1, 2, 3, 4)], halving=True),
        maximum_of_every_second(x),
    ]


def block_7(x, layers, pool):
    return [
        layers(x, "branch1x1"),
        layers(x, "branch3x3_1", "branch3x3_2a"),
        layers(x, "branch3x3_1", "branch3x3_2b"),
        layers(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
        layers(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
        layers(pool(x), "branch_pool"),
    ]


def block_7b(x, layers):
    return block_7(x, layers, mean_of_pixels_inside)


def block_7c(x, layers):
    return block_7(x, layers, maximum)


@pytest.mark.parametrize(
    ("name", "channels", "description"),
    [
        ("Mixed_5b", 192, block_5),
        ("Mixed_5c", 256, block_5),
        ("Mixed_5d", 288, block_5),
        ("Mixed_6a", 288, block_6a),
        ("Mixed_6b", 768, block_6),
        ("Mixed_6c", 768, block_6),
        ("Mixed_6d", 768, block_6),
        ("Mixed_6e", 768, block_6),
        ("Mixed_7a", 768, block_7a),
        ("Mixed_7b", 1280, block_7b),
        ("Mixed_7c", 2048, block_7c),
    ],
)
def test_block_against_its_description(inception, inception_weights, name, channels, description):
    x = torch.randn(2, channels, 7, 7, generator=torch.Generator().manual_seed(2))
    expected = torch.cat(description(x, Layers(inception_weights, name)), 1)
    with torch.inference_mode():
        got = inception.get_submodule(name)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def recorded(inception, images):
    """-> features, logits, and {name: output} of the network's direct children."""
    outputs = {}
    hooks = []
    for name, module in inception.named_children():

        def record(module, inputs, output, name=name):
            outputs[name] = output.clone()

        hooks.append(module.register_forward_hook(record))
    features, logits = inception(images)
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(features=features, logits=logits, outputs=outputs)


@pytest.fixture(scope="session")
def one_pass(inception):
    """One pass of two images through the network."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 20, 31), dtype=torch.uint8, generator=generator)
    return recorded(inception, images)


MAPS = {
    "Conv2d_1a_3x3": (32, 149),
    "Conv2d_2a_3x3": (32, 147),
    "Conv2d_2b_3x3": (64, 147),
    "Conv2d_3b_1x1": (80, 73),
    "Conv2d_4a_3x3": (192, 71),
    "Mixed_5b": (256, 35),
    "Mixed_5c": (288, 35),
    "Mixed_5d": (288, 35),
    "Mixed_6a": (768, 17),
    "Mixed_6b": (768, 17),
    "Mixed_6c": (768, 17),
    "Mixed_6d": (768, 17),
    "Mixed_6e": (768, 17),
    "Mixed_7a": (1280, 8),
    "Mixed_7b": (2048, 8),
    "Mixed_7c": (2048, 8),
}


def test_maps_have_the_sizes_of_the_paper(one_pass):
    shapes = {name: tuple(x.shape) for name, x in one_pass.outputs.items()}
    assert shapes == {name: (2, channels, side, side) for name, (channels, side) in MAPS.items()}
    # In this order, too.
    assert list(shapes) == list(MAPS)


def test_stem_halves_by_maxima(inception, one_pass):
    with torch.inference_mode():
        first = inception.Conv2d_3b_1x1(maximum_of_every_second(one_pass.outputs["Conv2d_2b_3x3"]))
        second = inception.Mixed_5b(maximum_of_every_second(one_pass.outputs["Conv2d_4a_3x3"]))
    torch.testing.assert_close(one_pass.outputs["Conv2d_3b_1x1"], first)
    torch.testing.assert_close(one_pass.outputs["Mixed_5b"], second)


def test_features_are_means_over_the_last_map(one_pass):
    features = one_pass.features
    last = one_pass.outputs["Mixed_7c"]
    torch.testing.assert_close(features, last.flatten(2).mean(2))
    # The two images are told apart.
    assert features.std(0).mean() > 1e-3


def test_logits_leave_out_the_bias(inception, one_pass):
    with torch.inference_mode():
        with_bias = inception.fc(one_pass.features)
    assert one_pass.logits.shape == (2, 1008)
    assert inception.fc.bias.abs().max() > 0.1
    torch.testing.assert_close(one_pass.logits, with_bias - inception.fc.bias)


# ---------------------------------------------------------------- weights
def without(state, name):
    return {key: x for key, x in state.items() if key != name}


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_other_models_weights_are_refused(inception_weights, change):
    states = {
        "missing": without(inception_weights, "Mixed_6b.branch7x7_2.conv.weight"),
        # torchvision's own classifier.
        "shape": inception_weights | {"fc.weight": torch.zeros(1000, 2048)},
        "unknown": inception_weights | {"epoch": torch.tensor(3)},
    }
    with stops("--weights", fid.URL):
        fid.Inception(states[change])


@pytest.mark.parametrize("contents", [[1, 2], PickledCode(), {"state_dict": {}}])
def test_files_without_weights_are_refused(tmp_path, capsys, contents):
    torch.save(contents, tmp_path / "w.pth")
    with stops("w.pth", "--weights", fid.URL):
        fid.Inception(tmp_path / "w.pth")
    # No code was run.
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "no weights"])
def test_text_is_no_file_of_weights(tmp_path, text):
    (tmp_path / "w.pth").write_text(text)
    with stops("w.pth", "--weights", fid.URL):
        fid.Inception(tmp_path / "w.pth")


def test_weights_are_downloaded_with_their_hash_checked(inception_weights, monkeypatch, capsys):
    asked = {}

    def download(url, **options):
        print("Downloading")
        asked.update(options, url=url)
        return inception_weights

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    fid.Inception()
    assert asked["url"].endswith("/pt_inception-2015-12-05-6726825d.pth")
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True
    # Standard output is for the score.
    assert capsys.readouterr() == ("", "Downloading\n")


def test_offline_without_weights(sets, cli, monkeypatch):
    def no_net(*arguments, **options):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_net)
    refused(cli(fid, sets / "equal.npz"), fid.URL, "--weights", "not known", status=1)


# ---------------------------------------------------------------- Frechet distance
def random_gaussian(generator, dim):
    """-> mu, sigma."""
    root = generator.normal(size=(dim, dim))
    return generator.normal(size=dim), root @ root.T


@pytest.fixture
def two_gaussians():
    generator = np.random.default_rng(4)
    return *random_gaussian(generator, 12), *random_gaussian(generator, 12)


def test_distance_of_equal_covariances_is_that_of_the_means(two_gaussians):
    mu1, sigma, mu2, _ = two_gaussians
    expected = ((mu1 - mu2) ** 2).sum()
    assert fid.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_0(two_gaussians):
    mu, sigma, _, _ = two_gaussians
    assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)


def test_distance_is_symmetric(two_gaussians):
    mu1, sigma1, mu2, sigma2 = two_gaussians
    there = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert there == pytest.approx(fid.frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-9)


def test_distance_of_diagonal_covariances():
    generator = np.random.default_rng(4)
    a = generator.uniform(size=12)
    b = generator.uniform(size=12)
    mu = generator.normal(size=12)
    expected = ((a**0.5 - b**0.5) ** 2).sum()
    got = fid.frechet_distance(mu, np.diag(a), mu, np.diag(b))
    assert got == pytest.approx(expected, rel=1e-9)


def test_distance_of_covariances_that_do_not_commute():
    sigma1 = np.array([[2.0, 1.0], [1.0, 3.0]])
    sigma2 = np.array([[5.0, -2.0], [-2.0, 1.0]])
    assert not np.allclose(sigma1 @ sigma2, sigma2 @ sigma1)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = 1 + 4 + np.trace(sigma1 + sigma2 - 2 * root)
    got = fid.frechet_distance([0, 0], sigma1, [1, 2], sigma2)
    assert got == pytest.approx(expected, rel=1e-12)


def test_distance_of_a_singular_covariance():
    """As of fewer images than dimensions."""
    flat = np.diag([1.0, 0.0, 0.0])
    mu = np.zeros(3)
    assert fid.frechet_distance(mu, flat, mu, np.eye(3)) == pytest.approx(1 + 3 - 2)


def test_distance_survives_eigenvalues_barely_below_0():
    """Rounding makes them where the covariance is singular."""
    mu = np.zeros(2)
    flat = np.diag([1.0, -1e-15])
    assert fid.frechet_distance(mu, flat, mu, np.eye(2)) == pytest.approx(1)
    assert fid.frechet_distance(mu, np.eye(2), mu, flat) == pytest.approx(1)


ORIGIN = np.zeros(3)
ROUND = np.eye(3)


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        (ORIGIN[:2], ROUND),
        (ORIGIN, ROUND[:2]),
        (ORIGIN[None], ROUND),
        (ORIGIN * np.nan, ROUND),
        (ORIGIN, ROUND + np.inf),
    ],
)
def test_distance_refuses(mu, sigma):
    with stops("mu (D,)", status=1):
        fid.frechet_distance(mu, sigma, ORIGIN, ROUND)
    with stops("mu (D,)", status=1):
        fid.frechet_distance(ORIGIN, ROUND, mu, sigma)


# ---------------------------------------------------------------- Inception Score
def test_score_of_logits_that_say_nothing_is_1():
    mean, deviation = fid.inception_score(np.zeros((40, 9)))
    assert mean == pytest.approx(1)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_score_of_certainty_is_the_number_of_classes():
    # Probabilities too small for a float: all but one of an image, all of the sixth class.
    certain = F.pad(torch.eye(5).repeat(20, 1) * 2000, (0, 1))
    mean, _ = fid.inception_score(certain, splits=1)
    assert mean == pytest.approx(5)


def score_by_loops(logits, splits, order):
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = (p / p.sum(1, keepdims=True))[order]
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        mean = part.mean(0)
        divergences = [
            sum(a * np.log(a / b) for a, b in zip(row, mean, strict=True)) for row in part
        ]
        scores.append(np.exp(np.mean(divergences)))
    mean = sum(scores) / splits
    return mean, np.sqrt(sum((score - mean) ** 2 for score in scores) / splits)


@pytest.fixture
def logits_by_class():
    """53 images in the order of their classes."""
    generator = np.random.default_rng(5)
    labels = np.sort(generator.integers(0, 6, 53))
    return generator.normal(size=(53, 6)) + 4 * np.eye(6)[labels]


def test_score_by_loops(logits_by_class):
    shuffled = np.random.RandomState(2020).permutation(53)
    expected = score_by_loops(logits_by_class, 10, shuffled)
    assert fid.inception_score(logits_by_class) == pytest.approx(expected, rel=1e-9)


def test_score_of_samples_in_the_order_of_classes_is_not_lower(logits_by_class):
    in_order, _ = score_by_loops(logits_by_class, 10, np.arange(53))
    mean, _ = fid.inception_score(torch.from_numpy(logits_by_class))
    assert in_order < 0.8 * mean


def test_score_of_float32_is_computed_in_float64(logits_by_class):
    single = torch.from_numpy(logits_by_class).float()
    assert fid.inception_score(single) == pytest.approx(
        fid.inception_score(single.double()), rel=1e-13
    )


@pytest.mark.parametrize("logits", [torch.zeros(9, 4), torch.full((20, 4), torch.nan)])
def test_score_refuses(logits):
    with stops("finite logits", status=1):
        fid.inception_score(logits)


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize("offset", [0, 1e6])
@pytest.mark.parametrize("sizes", [[157], [1] * 157, [100, 57], [1, 5, 40, 111]])
def test_statistics_do_not_depend_on_batches(sizes, offset):
    generator = np.random.default_rng(6)
    x = generator.normal(size=(157, 12)) * np.arange(1, 13) + offset
    statistics = fid.Statistics(dim=12)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        statistics.update(torch.from_numpy(batch))
    assert statistics.n == 157
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-13, atol=1e-13)
    # np.cov divides by n - 1.
    np.testing.assert_allclose(statistics.cov, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)


def test_statistics_of_two_by_hand():
    statistics = fid.Statistics(dim=2)
    statistics.update(np.array([[0.0, 1.0]]))
    statistics.update(np.array([[2.0, 1.0]]))
    np.testing.assert_allclose(statistics.mean, [1, 1])
    # (1 + 1) / (2 - 1).
    np.testing.assert_allclose(statistics.cov, [[2, 0], [0, 0]], atol=1e-15)


def test_statistics_already_taken_do_not_change():
    statistics = fid.Statistics(dim=1)
    statistics.update(np.array([[0.0], [2.0]]))
    mean = statistics.mean
    cov = statistics.cov
    statistics.update(np.array([[7.0]]))
    assert mean == [1]
    assert cov == [[2]]


@pytest.mark.parametrize(
    "features",
    [
        np.full((2, 12), np.nan),
        np.full((2, 12), np.inf),
        np.zeros((2, 11)),
        np.zeros((0, 12)),
        np.zeros(12),
    ],
)
def test_statistics_refuse_and_stay_as_they_were(features):
    statistics = fid.Statistics(dim=12)
    statistics.update(np.ones((3, 12)))
    with stops("(B, 12)", status=1):
        statistics.update(features)
    assert statistics.n == 3
    assert (statistics.mean == 1).all()


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(12, 5, 7, 3), (12, 5, 7, 4), (12, 5, 7, 1), (12, 5, 7)])
def test_npz_of_images(tmp_path, save, shape):
    arrays = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=arrays)
    images = fid.open_images(tmp_path / "x.npz")
    assert len(images) == 12

    channels = arrays.reshape(12, 5, 7, -1)
    if channels.shape[3] == 1:
        channels = np.concatenate([channels, channels, channels], axis=3)
    assert np.array_equal(np.stack(list(images)), channels[:, :, :, :3])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_not_loaded(tmp_path, save):
    arrays = np.random.default_rng(7).integers(0, 256, (300, 128, 128, 3), dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=arrays)
    tracemalloc.start()
    images = fid.open_images(tmp_path / "x.npz")
    for image, expected in zip(images, arrays, strict=True):
        assert np.array_equal(image, expected)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < arrays.nbytes / 10


def gray(i):
    return Image.new("RGB", (2, 2), (i, i, i))


def test_folder_is_decoded_in_order_and_not_far_ahead(tmp_path):
    for i in range(300):
        gray(i % 200).save(tmp_path / f"{i:03d}.bmp")
    images = iter(fid.open_images(tmp_path))
    values = [next(images)[0, 0, 0] for _ in range(65)]
    # Time enough to read them all.
    time.sleep(0.3)
    for i in range(192, 300):
        gray(i % 200 + 50).save(tmp_path / f"{i:03d}.bmp")
    values += [image[0, 0, 0] for image in images]
    assert values[:192] == list(range(192))
    # The later ones were read after that.
    assert values[192:] == [i % 200 + 50 for i in range(192, 300)]


def test_folder_is_cropped_as_encode_crops(tmp_path):
    shapes = [(40, 70), (90, 31), (16, 16), (8, 9), *[(20, 30)] * 6]
    originals = [random_images(1, *shape, seed=i)[0] for i, shape in enumerate(shapes)]
    save_images(tmp_path, originals)
    images = list(fid.open_images(tmp_path, size=16))
    for image, original in zip(images, originals, strict=True):
        crop = encode.center_crop(Image.fromarray(original), 16)
        assert np.array_equal(image, np.asarray(crop))


MU = np.arange(2048, dtype=np.float32)
SIGMA = np.eye(2048)


def test_reference_under_ref_mu(tmp_path):
    np.savez(tmp_path / "a.npz", ref_mu=MU, ref_sigma=SIGMA)
    reference = fid.read_statistics(tmp_path / "a.npz")
    assert np.array_equal(reference.mean, MU)
    assert np.array_equal(reference.cov, SIGMA)
    assert reference.n is None


def test_reference_beside_images(tmp_path, sets, cli, stand_in):
    """ADM's file: the statistics count, its images do not."""
    images = np.zeros((10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "b.npz", arr_0=images, mu=MU, sigma=SIGMA, n=50_000)
    status, stdout, _ = cli(fid, sets / "equal", tmp_path / "b.npz")
    assert status == 0
    assert "against n = 50000" in stdout
    assert len(stand_in.seen) == 10


def test_reference_that_does_not_say_n(tmp_path, sets, cli, stand_in):
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    _, stdout, stderr = cli(fid, sets / "equal", tmp_path / "a.npz")
    assert "against n = unknown" in stdout
    # Of the samples alone.
    assert len(warnings_in(stderr)) == 1


# ---------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def two_folders(sets):
    """fid.py on two folders, in a process of its own, whose statistics are saved on the way."""
    return call(
        "fid.py",
        sets / "mixed",
        sets / "equal",
        "--save",
        sets / "saved.npz",
        "--weights",
        sets / "zip.pth",
    )


LINE = re.compile(
    r"FID (?P<fid>\d+\.\d{3}) \| Inception Score \d+\.\d\d \+- \d+\.\d\d"
    r" \| n = 10 \((?P<samples>.*)\) against n = 10 \((?P<reference>.*)\)"
    r" \| (?P<weights>.*), TF1 resize(?P<saved> \| saved to .*)?\n"
)


def test_two_folders_make_one_line(two_folders, sets):
    assert two_folders.returncode == 0, two_folders.stderr
    found = LINE.fullmatch(two_folders.stdout).groupdict()
    assert float(found.pop("fid")) > 1
    assert found == {
        "samples": str(sets / "mixed"),
        "reference": str(sets / "equal"),
        "weights": str(sets / "zip.pth"),
        "saved": f" | saved to {sets / 'saved.npz'}",
    }


def test_two_folders_show_progress(two_folders):
    assert "mixed: 100%" in two_folders.stderr
    assert "equal: 100%" in two_folders.stderr
    assert "10/10" in two_folders.stderr


def test_sizes_that_differ_are_one_warning(two_folders):
    """Three sizes are in these two sets."""
    about_size = [line for line in warnings_in(two_folders.stderr) if "size" in line]
    assert len(about_size) == 1
    assert "21x33" in about_size[0]
    assert "50x16" in about_size[0]
    assert "--size" in about_size[0]


def test_small_sets_are_a_warning_each(two_folders):
    about_n = [line for line in warnings_in(two_folders.stderr) if "50,000" in line]
    assert len(about_n) == 2
    assert "mixed: 10 images" in about_n[0]
    assert "equal: 10 images" in about_n[1]
    assert all("covariance is singular" in line for line in about_n)


def test_saved_statistics(two_folders, sets):
    with np.load(sets / "saved.npz", allow_pickle=False) as file:
        saved = dict(file)
    assert saved["mu"].dtype == np.float32
    assert saved["mu"].shape == (2048,)
    assert saved["sigma"].dtype == np.float64
    assert saved["sigma"].shape == (2048, 2048)
    assert saved["n"] == 10
    assert str(sets / "mixed") in str(saved["source"])
    assert not list(sets.glob(".tmp*"))


def test_npz_against_saved_statistics_gives_the_same_fid(two_folders, sets, cli):
    """The same two sets, the other way round, and with the weights in the old format."""
    status, stdout, stderr = cli(
        fid, sets / "equal.npz", sets / "saved.npz", "--weights", sets / "legacy.pth"
    )
    assert status == 0, stderr
    found = LINE.fullmatch(stdout)
    before = LINE.fullmatch(two_folders.stdout)
    assert float(found["fid"]) == pytest.approx(float(before["fid"]), abs=2e-3)
    assert found["weights"] == str(sets / "legacy.pth")
    assert found["saved"] is None


def test_samples_alone_get_an_inception_score(sets, cli, stand_in):
    status, stdout, _ = cli(fid, sets / "equal")
    assert status == 0
    assert re.fullmatch(
        rf"Inception Score \S+ \+- \S+ \| n = 10 \({sets}/equal\) \| {fid.WEIGHTS}, TF1 resize\n",
        stdout,
    )


def test_inception_score_is_the_samples(cli, stand_in, tmp_path):
    # Ten splits of two images each: one image alone always scores 1.
    np.savez(tmp_path / "a.npz", arr_0=random_images(20, 8, 8, seed=1))
    np.savez(tmp_path / "b.npz", arr_0=random_images(20, 8, 8, seed=2))

    def score(*names):
        _, stdout, _ = cli(fid, *[tmp_path / name for name in names])
        return re.search(r"Inception Score (\S+ \+- \S+)", stdout)[1]

    assert score("a.npz", "b.npz") == score("a.npz")
    assert score("b.npz") != score("a.npz")


def test_images_reach_the_network_as_they_are(sets, cli, stand_in):
    """From the folder and from the npz: the same images in the same order, RGB."""
    cli(fid, sets / "equal", sets / "equal.npz")
    with np.load(sets / "equal.npz") as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert torch.equal(torch.stack(stand_in.seen), torch.cat([images, images]))


def test_size_crops_the_folders_of_both_sides(sets, cli, stand_in):
    status, _, stderr = cli(fid, sets / "mixed", sets / "equal", "--size", 16)
    assert status == 0
    assert {tuple(image.shape) for image in stand_in.seen} == {(3, 16, 16)}
    assert len(stand_in.seen) == 20
    assert not [line for line in warnings_in(stderr) if "pixels" in line]


def test_size_is_part_of_what_is_saved(sets, cli, stand_in, tmp_path):
    cli(fid, sets / "mixed", "--size", 16, "--save", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as file:
        assert str(file["source"]).endswith("mixed --size 16")


def test_sets_of_two_sizes_are_named(sets, cli, stand_in, tmp_path):
    save_images(tmp_path / "small", random_images(10, 8, 9))
    _, _, stderr = cli(fid, sets / "equal.npz", tmp_path / "small")
    about_size = [line for line in warnings_in(stderr) if "pixels" in line]
    assert len(about_size) == 1
    assert f"40x24 pixels ({sets}/equal.npz) and 9x8 pixels ({tmp_path}/small)" in about_size[0]


def test_one_size_is_no_warning(sets, cli, stand_in):
    _, _, stderr = cli(fid, sets / "equal", sets / "equal.npz")
    assert not [line for line in warnings_in(stderr) if "pixels" in line]


def test_same_images_are_said_to_be_the_same(sets, cli, stand_in):
    _, _, stderr = cli(fid, sets / "equal", sets / "equal")
    assert len([line for line in warnings_in(stderr) if "both sides are the same" in line]) == 1


def test_statistics_of_the_samples_themselves_are_the_same(sets, cli, stand_in, tmp_path):
    cli(fid, sets / "equal", "--save", tmp_path / "s.npz")
    _, _, stderr = cli(fid, sets / "equal", tmp_path / "s.npz")
    assert "both sides are the same" in stderr


def test_other_images_are_not_the_same(sets, cli, stand_in):
    _, _, stderr = cli(fid, sets / "mixed", sets / "equal")
    assert "both sides are the same" not in stderr


@pytest.mark.parametrize(
    ("distance", "printed"), [(-1e-7, "FID 0.000 "), (-0.0, "FID 0.000 "), (-0.02, "FID -0.020 ")]
)
def test_minus_0_is_not_printed(sets, cli, stand_in, monkeypatch, distance, printed):
    monkeypatch.setattr(fid, "frechet_distance", lambda *gaussians: distance)
    _, stdout, _ = cli(fid, sets / "equal", sets / "equal")
    assert stdout.startswith(printed)


def test_statistics_come_second(sets, cli, no_network, tmp_path):
    np.savez(tmp_path / "s.npz", mu=MU, sigma=SIGMA)
    refused(cli(fid, tmp_path / "s.npz", sets / "equal"), "s.npz: these are statistics", "second")


def test_one_process_only(sets, cli, no_network, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli(fid, sets / "equal"), "one process", "torchrun")


def test_a_folder_that_may_not_be_written(sets, cli, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(cli(fid, sets / "equal", "--save", tmp_path / "s.npz"), "s.npz", "permission")


def test_a_file_that_is_there_is_not_replaced(sets, cli, no_network):
    before = (sets / "equal.npz").read_bytes()
    refused(cli(fid, sets / "equal", "--save", sets / "equal.npz"), "equal.npz: exists already")
    assert (sets / "equal.npz").read_bytes() == before


@pytest.mark.parametrize("options", [[], ["--size", 4]])
def test_unreadable_image_is_named(cli, stand_in, tmp_path, options):
    save_images(tmp_path, random_images(10, 8, 8))
    (tmp_path / "007.png").write_bytes(b"not a picture")
    refused(cli(fid, tmp_path, *options), "007.png", "not a readable image")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_archive_is_not_scored(cli, stand_in, tmp_path, save):
    path = tmp_path / "damaged.npz"
    save(path, arr_0=random_images(10, 24, 40))
    data = bytearray(path.read_bytes())
    # The checksum of the zip tells.
    data[5000] ^= 255
    path.write_bytes(data)
    result = cli(fid, path, "--save", tmp_path / "s.npz")
    refused(result, "damaged.npz")
    assert result[1] == ""
    assert not (tmp_path / "s.npz").exists()


# ---------------------------------------------------------------- bad input
def npz(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


def text(contents):
    return lambda path: path.write_text(contents)


def cut_short(path):
    npz(arr_0=IMAGES)(path)
    path.write_bytes(path.read_bytes()[:300])


def picture(path):
    Image.new("RGB", (9, 9)).save(path)


def folder_of_text(path):
    path.mkdir()
    (path / "readme.txt").write_text("no images here")


IMAGES = np.zeros((10, 4, 4, 3), np.uint8)
OBJECTS = np.array([PickledCode()] * 10, dtype=object)
BAD_SAMPLES = {
    "missing.npz": (None, "no such file or folder"),
    "missing": (None, "no such file or folder"),
    "text.npz": (text("no zip"), "give a folder of images or an npz"),
    "text.txt": (text("no zip"), "give a folder of images or an npz"),
    "empty.npz": (text(""), "give a folder of images or an npz"),
    "photo.png": (picture, "give a folder of images or an npz"),
    "truncated.npz": (cut_short, "give a folder of images or an npz"),
    "latents.npz": (npz(latents=IMAGES), "no arr_0"),
    "float.npz": (npz(arr_0=IMAGES.astype(np.float32)), "float32"),
    "object.npz": (npz(arr_0=OBJECTS), "object"),
    "two_channels.npz": (npz(arr_0=IMAGES[..., :2]), "(10, 4, 4, 2)"),
    "channels_first.npz": (npz(arr_0=np.zeros((10, 3, 8, 8), np.uint8)), "(10, 3, 8, 8)"),
    "fortran.npz": (npz(arr_0=np.asfortranarray(IMAGES)), "Fortran"),
    "one.npz": (npz(arr_0=IMAGES[0, :, :, 0]), "(4, 4)"),
    "few.npz": (npz(arr_0=IMAGES[:9]), "9 images"),
    "empty": (Path.mkdir, "0 images"),
    "notes": (folder_of_text, "0 images"),
}
BAD_REFERENCES = {
    "none.npz": (None, "no such file or folder"),
    "words.txt": (text("no zip"), "npz with mu and sigma"),
    "cat.png": (picture, "npz with mu and sigma"),
    "dino.npz": (npz(mu=np.zeros(768), sigma=np.eye(768)), "(768,)"),
    "nan.npz": (npz(mu=np.full(2048, np.nan), sigma=SIGMA), "finite"),
    "infinite.npz": (npz(mu=MU, sigma=SIGMA + np.inf), "finite"),
    "half.npz": (npz(mu=MU), "sigma"),
    "negative.npz": (npz(mu=MU, sigma=-SIGMA), "covariance"),
    "pickle.npz": (npz(mu=OBJECTS, sigma=SIGMA), "allow_pickle"),
    "neither.npz": (npz(latents=IMAGES), "npz with mu and sigma"),
    "empty_reference": (Path.mkdir, "0 images"),
}
BAD_OPTIONS = {
    "--frobnicate": "frobnicate",
    "--save nowhere/x.npz": "no folder nowhere",
    "--size 0": "--size 0",
    "--size 16": "equal.npz is no folder",
    "--size big": "--size",
}
BAD_WEIGHTS = {"none.pth": "none.pth", "equal.npz": "equal.npz", ".": "--weights"}


def is_one_line(result, *words):
    """... and nothing else."""
    refused(result, *words)
    _, stdout, stderr = result
    assert stdout == ""
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(sets, cli, no_network, tmp_path, name):
    make, words = BAD_SAMPLES[name]
    if make:
        make(tmp_path / name)
    is_one_line(cli(fid, tmp_path / name, sets / "mixed"), name, words)


@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_bad_references(sets, cli, no_network, tmp_path, name):
    make, words = BAD_REFERENCES[name]
    if make:
        make(tmp_path / name)
    is_one_line(cli(fid, sets / "equal.npz", tmp_path / name), name, words)


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options(sets, cli, no_network, monkeypatch, options):
    monkeypatch.chdir(sets)
    is_one_line(cli(fid, "equal.npz", *options.split()), BAD_OPTIONS[options])


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(sets, cli, monkeypatch, name):
    monkeypatch.chdir(sets)
    is_one_line(cli(fid, "equal.npz", "--weights", name), BAD_WEIGHTS[name], fid.URL)


# =============================================================== helpers of the method's tests
CPU = torch.device("cpu")


def normal(*shape, seed=0, dtype=torch.float64):
    """Normal numbers that are a function of the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_net(**changes):
    """A new network for latents (8, 4, 4) of 3 classes."""
    settings = {
        "input_size": 4,
        "in_channels": 8,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    torch.manual_seed(0)
    return jlt.JLT(**settings | changes)


def randomized(net):
    """Makes all parameters random, so that no zero hides a path. -> net"""
    for i, p in enumerate(net.parameters()):
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 1.0
        p.data = scale * normal(*p.shape, seed=i, dtype=torch.float32)
    return net


def named_net(name):
    """The network of a model's name, without memory for its weights."""
    config = jlt.configure(model=name)
    with torch.device("meta"):
        return jlt.JLT(
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            depth=config.depth,
            num_heads=config.num_heads,
        )


def printed(folder, *arguments):
    """What jlt.py prints to this command line, given in `folder`."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["jlt.py", *map(str, arguments)])
        jlt.main()
    return out.getvalue()


def line_with(text, words):
    """The one line that holds `words`."""
    lines = [line for line in text.splitlines() if words in line]
    assert len(lines) == 1, text
    return lines[0]


def row_of(text, first_word):
    """The one line that begins with this word."""
    lines = [line for line in text.splitlines() if line.split()[:1] == [first_word]]
    assert len(lines) == 1, text
    return lines[0]


def numbers_in(line):
    """-> the numbers of a line; 1,234.5 is one, 12% is 0.12."""
    found = re.findall(r"-?[\d,]*\.?\d+(?:e[+-]\d+)?%?", line)
    return [
        float(word[:-1]) / 100 if word.endswith("%") else float(word.replace(",", ""))
        for word in found
    ]


def pixels_of(path):
    """-> a PNG as uint8 (3, H, W)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ByHand:
    """The network once more: in float64 numpy, an image at a time, with loops over tokens and
    heads where they are plainest."""

    def __init__(self, net, heads):
        self.weights = {name: w.double().numpy() for name, w in net.state_dict().items()}
        self.heads = heads
        self.patch = self.weights["x_embedder.proj.weight"].shape[2]
        self.depth = len(net.blocks)

    def linear(self, h, name):
        bias = self.weights[f"{name}.bias"]
        weight = self.weights[f"{name}.weight"].reshape(len(bias), -1)
        return h @ weight.T + bias

    def norm(self, h, name):
        rms = np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        return h / rms * self.weights[f"{name}.weight"]

    @staticmethod
    def silu(h):
        return h / (1 + np.exp(-h))

    def patches(self, z):
        """-> where patches lie, row by row, and the pixels of each."""
        sides = range(0, z.shape[1], self.patch)
        corners = [(row, column) for row in sides for column in sides]
        cut = [z[:, r : r + self.patch, c : c + self.patch] for r, c in corners]
        return corners, np.stack([pixels.ravel() for pixels in cut])

    def conditioning(self, t, y):
        angles = t * np.exp(-np.log(10000) * np.arange(128) / 128)
        sinusoids = np.concatenate([np.cos(angles), np.sin(angles)])
        hidden = self.silu(self.linear(sinusoids, "t_embedder.mlp.0"))
        time = self.linear(hidden, "t_embedder.mlp.2")
        return self.silu(time + self.weights["y_embedder.embedding_table.weight"][y])

    def modulation(self, c, name, parts):
        return np.split(self.linear(c, f"{name}.adaLN_modulation.1"), parts)

    def turned(self, u, places):
        """A head's channels (N, d), the first half turned by the row, the second by the column."""
        d = u.shape[1]
        out = np.empty_like(u)
        for n, place in enumerate(places):
            for half, position in enumerate(place):
                for k in range(d // 4):
                    angle = position * 10000 ** (-2 * k / (d / 2))
                    i = half * d // 2 + 2 * k
                    out[n, i] = u[n, i] * np.cos(angle) - u[n, i + 1] * np.sin(angle)
                    out[n, i + 1] = u[n, i + 1] * np.cos(angle) + u[n, i] * np.sin(angle)
        return out

    def attention(self, h, name, places):
        q, k, v = np.split(self.linear(h, f"{name}.qkv"), 3, axis=1)
        answers = []
        for head in np.split(np.arange(h.shape[1]), self.heads):
            q_head = self.turned(self.norm(q[:, head], f"{name}.q_norm"), places)
            k_head = self.turned(self.norm(k[:, head], f"{name}.k_norm"), places)
            weights = np.exp(q_head @ k_head.T / np.sqrt(len(head)))
            weights = weights / weights.sum(1, keepdims=True)
            answers.append(weights @ v[:, head])
        return self.linear(np.concatenate(answers, axis=1), f"{name}.proj")

    def mlp(self, h, name):
        a, b = np.split(self.linear(h, f"{name}.w12"), 2, axis=1)
        return self.linear(self.silu(a) * b, f"{name}.w3")

    def block(self, x, c, name, places):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c, name, 6)
        h = self.norm(x, f"{name}.norm1") * (1 + scale) + shift
        x = x + gate * self.attention(h, f"{name}.attn", places)
        h = self.norm(x, f"{name}.norm2") * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp(h, f"{name}.mlp")

    def __call__(self, z, t, y):
        """z (C, H, W), t and y numbers -> (C, H, W)."""
        corners, pixels = self.patches(z)
        places = [(row // self.patch, column // self.patch) for row, column in corners]
        c = self.conditioning(t, y)
        x = self.linear(pixels, "x_embedder.proj")
        for i in range(self.depth):
            x = self.block(x, c, f"blocks.{i}", places)
        shift, scale = self.modulation(c, "final_layer", 2)
        x = self.norm(x, "final_layer.norm_final") * (1 + scale) + shift
        x = self.linear(x, "final_layer.linear")
        out = np.empty_like(z)
        for token, (r, column) in zip(x, corners, strict=True):
            # A token's output is (row, column, channel).
            pixels = token.reshape(self.patch, self.patch, -1).transpose(2, 0, 1)
            out[:, r : r + self.patch, column : column + self.patch] = pixels
        return out


# Variances of x in the Gaussian field, a channel each.
FIELD = torch.tensor([0.01, 0.25, 1.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)
FIELD_NOISE = normal(2, 4, 3, 3)
FIELD_LABELS = torch.zeros(2).long()


def gaussian_net(target):
    """The best network there is for x ~ N(0, FIELD): E[target | z]. Its flow carries noise to
    sqrt(FIELD) * noise."""

    def net(z, t, y):
        t = t.view(-1, 1, 1, 1)
        variance_z = t**2 * FIELD + (1 - t) ** 2
        if target == "x":
            return t * FIELD * z / variance_z
        if target == "eps":
            return (1 - t) * z / variance_z
        return (t * FIELD - (1 - t)) * z / variance_z

    net.num_classes = 0
    return net


class Probe:
    """A network that answers 1 without a class and 3 with one, and notes its calls."""

    num_classes = 7

    def __init__(self):
        self.calls = []  # (time, labels)

    def __call__(self, z, t, y):
        assert len(z) == len(t) == len(y)
        assert (t == t[0]).all()
        self.calls.append((t[0].item(), y.tolist()))
        with_class = (y != self.num_classes).view(-1, 1, 1, 1)
        return torch.where(with_class, 3.0, 1.0).expand_as(z)

    def times(self, labels):
        return [t for t, y in self.calls if y == labels]


CLASSES = [5, 2]
NO_CLASS = [7, 7]


def probe(**settings):
    """Samples two images of the classes CLASSES from noise 0 -> Probe, samples."""
    net = Probe()
    noise = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    return net, jlt.sample(net, torch.tensor(CLASSES), noise, "v", **settings)


ORDER_CONFIG = jlt.configure(batch=16, micro_batch=4, steps=30)
ORDER_IMAGES = 30  # 16 epochs, of which some end within a micro-batch


def all_picks(config=ORDER_CONFIG, **where):
    """-> the (index, flip) pairs of each micro-batch."""
    return list(jlt.reading_order(ORDER_IMAGES, config, **where))


def epochs(config=ORDER_CONFIG):
    """-> the indices that each epoch shows, in order."""
    indices = [index for batch in all_picks(config) for index, _ in batch]
    return [indices[i : i + ORDER_IMAGES] for i in range(0, len(indices), ORDER_IMAGES)]


def drawn(step=3, m=1, n=40_000, **settings):
    """-> times, noise and labels of a micro-batch of n images of class 0 of 9."""
    x = torch.zeros(n, 1, 1, 1)
    config = jlt.configure(**settings)
    return jlt.draws(config, step, m, x, torch.zeros(n).long(), num_classes=9)


def generated(net, numbers, **settings):
    config = jlt.configure(sample_steps=4, **settings)
    return jlt.generate(net, torch.ones(len(numbers)).long(), numbers, config, CPU)


def noise_of(numbers, seed=0):
    """What generate() starts from: a new network answers 0, a velocity that leaves it as it is."""
    return generated(small_net(), numbers, target="v", seed=seed)


# =============================================================== fixtures of the method's tests
Geometry = namedtuple("Geometry", "folder lam count printed")


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    """--geometry of a cache: its folder (with g.png), the eigenvalues of its tokens' covariance,
    descending, how many tokens, and what was printed. One channel is constant."""
    folder = tmp_path_factory.mktemp("geometry")
    scale = torch.arange(8).view(1, 8, 1, 1) / 4
    latents = (scale * normal(600, 8, 4, 4) + 2).half()
    write_cache(folder / "cache", n=600, latents=latents)
    rows = latents.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 8)
    lam = np.linalg.eigvalsh(np.cov(rows.T))[::-1].clip(0)
    text = printed(folder, "--geometry", "cache", "--out", "g.png")
    return Geometry(folder, lam, len(rows), text)


Demo = namedtuple("Demo", "folder printed")
DEMO_FLAGS = (
    *("--demo", "--device", "cpu", "--depth", 1, "--steps", 6),
    *("--sample-steps", 2, "--log-every", 3),
)


def run_demo(folder, digits, images, *flags):
    """The demo with digits that lie there, in small. -> Demo"""
    shutil.copytree(digits, folder / "runs/digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jlt, "DEMO_IMAGES", images)
        text = printed(folder, *DEMO_FLAGS, *flags)
    return Demo(folder / "runs/demo-depth-1-steps-6", text)


DEMO_IMAGES = 200


@pytest.fixture(scope="module")
def demo(digits, tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"), digits, DEMO_IMAGES)


@pytest.fixture(scope="module")
def eps_demo(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eps_demo")
    return run_demo(folder, digits, 50, "--target", "eps", "--out", "mine")


Bench = namedtuple("Bench", "folder printed seconds")
BENCH_FLAGS = (
    *("--bench", "--device", "cpu", "--depth", 1, "--hidden-size", 32, "--sample-steps", 6),
    *("--steps", 100_000, "--batch", 96, "--micro-batch", 32, "--workers", 0),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """--bench of a small model: the folder in which it ran, what it printed, how long it took."""
    folder = tmp_path_factory.mktemp("bench")
    started = time.perf_counter()
    text = printed(folder, *BENCH_FLAGS)
    return Bench(folder, text, time.perf_counter() - started)


# =============================================================== the network
@pytest.mark.parametrize(
    "name, parameters", [("B/1", 130_508_672), ("L/1", 458_090_592), ("H/1", 951_293_120)]
)
def test_published_models_have_their_size(name, parameters):
    assert sum(p.numel() for p in named_net(name).parameters()) == parameters


@pytest.mark.parametrize("name, patch, billions", [("B/1", 1, 46.09), ("B/2", 2, 11.21)])
def test_cost_of_a_forward_pass_by_hand(name, patch, billions):
    n = (16 // patch) ** 2
    d = 768
    attention = n * 4 * d * d + 2 * n * n * d
    mlp = n * 3 * d * 2048
    block = attention + mlp + 6 * d * d
    ends = 2 * n * 128 * patch**2 * d
    conditioning = 256 * d + d * d + 2 * d * d
    products = 12 * block + ends + conditioning
    flops = jlt.forward_flops(named_net(name))
    assert flops == 2 * products
    assert flops / 1e9 == pytest.approx(billions, abs=0.005)


RELEASED = {
    "x_embedder.proj.weight": (768, 128, 1, 1),
    "x_embedder.proj.bias": (768,),
    "t_embedder.mlp.0.weight": (768, 256),
    "t_embedder.mlp.0.bias": (768,),
    "t_embedder.mlp.2.weight": (768, 768),
    "t_embedder.mlp.2.bias": (768,),
    "y_embedder.embedding_table.weight": (1001, 768),
    "blocks.0.norm1.weight": (768,),
    "blocks.0.attn.qkv.weight": (2304, 768),
    "blocks.0.attn.qkv.bias": (2304,),
    "blocks.0.attn.q_norm.weight": (64,),
    "blocks.0.attn.k_norm.weight": (64,),
    "blocks.0.attn.proj.weight": (768, 768),
    "blocks.0.attn.proj.bias": (768,),
    "blocks.0.norm2.weight": (768,),
    "blocks.0.mlp.w12.weight": (4096, 768),
    "blocks.0.mlp.w12.bias": (4096,),
    "blocks.0.mlp.w3.weight": (768, 2048),
    "blocks.0.mlp.w3.bias": (768,),
    "blocks.0.adaLN_modulation.1.weight": (4608, 768),
    "blocks.0.adaLN_modulation.1.bias": (4608,),
    "final_layer.norm_final.weight": (768,),
    "final_layer.linear.weight": (128, 768),
    "final_layer.linear.bias": (128,),
    "final_layer.adaLN_modulation.1.weight": (1536, 768),
    "final_layer.adaLN_modulation.1.bias": (1536,),
}


def test_state_dict_has_the_names_and_shapes_of_the_release():
    with torch.device("meta"):
        state = jlt.JLT(depth=1).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == RELEASED


def test_a_new_network_answers_zero():
    out = small_net()(normal(2, 8, 4, 4).float(), torch.tensor([0.3, 0.9]), torch.tensor([0, 3]))
    assert out.abs().max() == 0


def test_linear_layers_start_xavier_uniform():
    net = small_net(hidden_size=128, in_channels=16, patch_size=2).requires_grad_(False)
    layers = [
        (net.x_embedder.proj, 64, 128),
        (net.blocks[0].attn.qkv, 128, 384),
        (net.blocks[1].mlp.w3, 341, 128),
    ]
    for layer, fan_in, fan_out in layers:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert layer.weight.abs().max() == pytest.approx(bound, rel=0.01)
        assert layer.weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_embeddings_start_normal_with_deviation_0_02():
    net = small_net(hidden_size=256, num_classes=99).requires_grad_(False)
    for weight in (
        net.t_embedder.mlp[0].weight,
        net.t_embedder.mlp[2].weight,
        net.y_embedder.embedding_table.weight,
    ):
        assert weight.std() == pytest.approx(0.02, rel=0.03)
        assert weight.abs().max() > 0.06


def test_biases_modulation_and_output_start_at_zero():
    zero = ("bias", "adaLN_modulation.1.weight", "final_layer.linear.weight")
    for name, parameter in small_net().named_parameters():
        assert (parameter.abs().max() == 0) == name.endswith(zero), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 2},
        {"hidden_size": 160},  # heads of 80 channels, as in H
        {"num_heads": 8},  # of 4, the fewest
        {"num_heads": 1, "depth": 1},
    ],
)
def test_forward_equals_an_independent_float64_one(changes):
    net = randomized(small_net(**changes))
    z = normal(3, 8, 4, 4)
    times = torch.tensor([0.0, 0.37, 1.0])
    labels = torch.tensor([0, 3, 2])
    out = net(z.float(), times, labels).detach().numpy()
    by_hand = ByHand(net, changes.get("num_heads", 2))
    for i in range(3):
        expected = by_hand(z[i].numpy(), times[i].double().item(), labels[i].item())
        np.testing.assert_allclose(out[i], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_small_values_are_normalised_as_the_release_does():
    """Where the mean square is about the 1e-6 that is added to it."""
    net = randomized(small_net())
    for module in (net.x_embedder.proj, net.blocks[0].attn.qkv):
        module.weight.data *= 1e-3
        module.bias.data *= 1e-3
    z = normal(1, 8, 4, 4)
    out = net(z.float(), torch.tensor([0.5]), torch.tensor([1])).detach().numpy()
    expected = ByHand(net, 2)(z[0].numpy(), 0.5, 1)
    np.testing.assert_allclose(out[0], expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("width", [32, 160])
def test_every_parameter_has_a_finite_gradient(width):
    net = randomized(small_net(hidden_size=width))
    z = normal(3, 8, 4, 4).float()
    out = net(z, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 3]))
    out.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_bfloat16_products_stay_near_float32():
    net = randomized(small_net(hidden_size=64))
    given = (normal(2, 8, 4, 4).float(), torch.tensor([0.2, 0.7]), torch.tensor([0, 1]))
    exact = net(*given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(*given).float()
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_every_token_sees_every_other():
    net = randomized(small_net())
    z = normal(1, 8, 4, 4).float()
    moved = z.clone()
    moved[0, :, 1, 2] += 1
    out, changed = (net(x, torch.tensor([0.5]), torch.tensor([1])) for x in (z, moved))
    assert ((out - changed).abs().amax(1) > 1e-6).all()


def at_places(net, rows, columns):
    """The same network; it takes the 4 x 4 tokens to be in these rows and columns of a larger
    image."""
    net = copy.deepcopy(net)
    places = torch.arange(8 * 8).view(8, 8)[rows][:, columns].flatten()
    cos, sin = jlt.rope_tables(8, 16)
    net.rope_cos.copy_(cos[places])
    net.rope_sin.copy_(sin[places])
    return net


def test_only_relative_places_count():
    net = randomized(small_net())
    given = (normal(1, 8, 4, 4).float(), torch.tensor([0.5]), torch.tensor([1]))
    out = net(*given)
    unmoved = at_places(net, [0, 1, 2, 3], [0, 1, 2, 3])
    assert torch.equal(unmoved(*given), out)
    moved = at_places(net, [2, 3, 4, 5], [4, 5, 6, 7])
    torch.testing.assert_close(moved(*given), out, rtol=0, atol=1e-5 * out.abs().max().item())


@pytest.mark.parametrize(
    "rows, columns",
    [
        ([0, 2, 4, 6], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 2, 4, 6]),
        ([3, 2, 1, 0], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [3, 2, 1, 0]),
    ],
)
def test_distance_and_direction_count_in_rows_and_columns(rows, columns):
    net = randomized(small_net())
    given = (normal(1, 8, 4, 4).float(), torch.tensor([0.5]), torch.tensor([1]))
    out = net(*given)
    moved = at_places(net, rows, columns)
    assert (moved(*given) - out).abs().max() > 1e-3 * out.abs().max()


def test_a_bottleneck_is_a_product_of_two_projections():
    narrow = randomized(small_net(bottleneck=4, patch_size=2))
    state = narrow.state_dict()
    first = state.pop("x_embedder.proj1.weight")
    second = state.pop("x_embedder.proj2.weight")
    assert first.shape == (4, 8, 2, 2)
    assert "x_embedder.proj1.bias" not in state

    state["x_embedder.proj.weight"] = torch.einsum("dkij,kcab->dcab", second, first)
    state["x_embedder.proj.bias"] = state.pop("x_embedder.proj2.bias")
    direct = small_net(patch_size=2)
    direct.load_state_dict(state)
    given = (normal(1, 8, 4, 4).float(), torch.tensor([0.5]), torch.tensor([1]))
    torch.testing.assert_close(narrow(*given), direct(*given))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 3}, "3 do not tile 4"),
        ({"num_heads": 3}, "multiple of 4"),
        ({"hidden_size": 12}, "multiple of 4"),  # two heads of 6
    ],
)
def test_shapes_that_do_not_fit_are_asserted(changes, words):
    with pytest.raises(AssertionError, match=words):
        small_net(**changes)


# =============================================================== path, readouts and loss
# On the way the floor of 0.05 holds at both ends.
LOSS_TIMES = torch.tensor([0.0, 0.02, 0.3, 0.7, 0.97, 1.0], dtype=torch.float64)
LOSS_X, LOSS_EPS, LOSS_OUT = normal(3, 6, 2, 4, 4)


def errors_of(out, target, **settings):
    """flow_error, for each of six images, of a network that answers `out`."""

    def net(z, t, y):
        return out

    return jlt.flow_error(net, LOSS_X, None, LOSS_TIMES, LOSS_EPS, target, **settings)


def mean_square(difference):
    return difference.square().mean((1, 2, 3))


PERFECT = {"x": LOSS_X, "eps": LOSS_EPS, "v": LOSS_X - LOSS_EPS}
FLOORED = {
    "x": (1 - LOSS_TIMES).clamp(min=0.05),
    "eps": LOSS_TIMES.clamp(min=0.05),
    "v": torch.ones_like(LOSS_TIMES),
}


def test_the_network_sees_the_path():
    seen = []

    def net(z, t, y):
        seen.extend([z, t, y])
        return z

    labels = torch.tensor([1, 2, 0, 3, 4, 5])
    jlt.flow_error(net, LOSS_X, labels, LOSS_TIMES, LOSS_EPS)
    z, t, y = seen
    torch.testing.assert_close(z[2], 0.3 * LOSS_X[2] + 0.7 * LOSS_EPS[2])
    assert torch.equal(z[0], LOSS_EPS[0])
    assert torch.equal(z[5], LOSS_X[5])
    assert torch.equal(t, LOSS_TIMES)
    assert torch.equal(y, labels)


@pytest.mark.parametrize("target", jlt.TARGETS)
def test_the_error_is_that_of_the_velocity(target):
    expected = mean_square(LOSS_OUT - PERFECT[target]) / FLOORED[target] ** 2
    torch.testing.assert_close(errors_of(LOSS_OUT, target), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", jlt.TARGETS)
def test_the_x_loss_takes_back_the_weight_of_x(target):
    weight = (1 - LOSS_TIMES).clamp(min=0.05) ** 2
    expected = weight * errors_of(LOSS_OUT, target)
    errors = errors_of(LOSS_OUT, target, loss="x")
    torch.testing.assert_close(errors, expected, rtol=1e-12, atol=0)


def test_the_x_loss_of_x_is_the_plain_error():
    expected = mean_square(LOSS_OUT - LOSS_X)
    errors = errors_of(LOSS_OUT, "x", loss="x")
    torch.testing.assert_close(errors, expected, rtol=1e-12, atol=0)


def test_the_x_loss_of_x_has_the_plain_gradient():
    out = LOSS_OUT.clone().requires_grad_()
    errors_of(out, "x", loss="x").mean().backward()
    expected = 2 * (LOSS_OUT - LOSS_X) / LOSS_X.numel()
    torch.testing.assert_close(out.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", jlt.TARGETS)
def test_the_floor_is_a_setting(target):
    wide = {
        "x": (1 - LOSS_TIMES).clamp(min=0.5),
        "eps": LOSS_TIMES.clamp(min=0.5),
        "v": torch.ones_like(LOSS_TIMES),
    }
    expected = mean_square(LOSS_OUT - PERFECT[target]) / wide[target] ** 2
    torch.testing.assert_close(errors_of(LOSS_OUT, target, t_eps=0.5), expected)


@pytest.mark.parametrize("loss", jlt.LOSSES)
@pytest.mark.parametrize("target", jlt.TARGETS)
def test_perfect_outputs_have_no_error(target, loss):
    assert errors_of(PERFECT[target], target, loss=loss).abs().max() == 0


@pytest.mark.parametrize("target", jlt.TARGETS)
def test_perfect_outputs_read_as_the_velocity(target):
    t = torch.full((6,), 0.8, dtype=torch.float64)
    z = jlt.interpolate(LOSS_X, LOSS_EPS, t)
    torch.testing.assert_close(jlt.velocity(PERFECT[target], z, t, target), LOSS_X - LOSS_EPS)


def test_the_loss_is_the_mean_error():
    def net(z, t, y):
        return LOSS_OUT

    given = (LOSS_X, None, LOSS_TIMES, LOSS_EPS, "eps", 0.1, "x")
    assert jlt.flow_loss(net, *given) == jlt.flow_error(net, *given).mean()


@pytest.mark.parametrize("call", [jlt.flow_loss, jlt.flow_error])
def test_unknown_targets_and_losses_are_named(call):
    def net(z, t, y):
        return z

    given = (net, LOSS_X, None, LOSS_TIMES, LOSS_EPS)
    with pytest.raises(AssertionError, match=r"'velocity' .*'x', 'eps', 'v'"):
        call(*given, target="velocity")
    with pytest.raises(AssertionError, match=r"'eps' .*'v', 'x'"):
        call(*given, loss="eps")


def test_a_readout_of_an_unknown_target_is_named():
    with pytest.raises(AssertionError, match=r"'flow' .*'x', 'eps', 'v'"):
        jlt.velocity(LOSS_OUT, LOSS_X, LOSS_TIMES, "flow")


# =============================================================== the sampler
def follow_field(target, steps, **settings):
    return jlt.sample(
        gaussian_net(target), FIELD_LABELS, FIELD_NOISE, target, steps, cfg=1, **settings
    )


@pytest.mark.parametrize("method, order", [("heun", 2), ("euler", 1)])
def test_convergence_order_on_a_known_field(method, order):
    exact = FIELD.sqrt() * FIELD_NOISE
    coarse, fine = (
        (follow_field("v", steps, method=method) - exact).abs().max().item() for steps in (100, 200)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_x_and_v_sample_alike_from_perfect_answers():
    torch.testing.assert_close(follow_field("x", 40, t_eps=1e-9), follow_field("v", 40))


def test_eps_samples_alike_but_for_the_start():
    """At t = 0 eps says nothing of the velocity, which one step in 400 forgives."""
    difference = follow_field("eps", 400, t_eps=1e-9) - follow_field("v", 400)
    assert difference.abs().max() < 0.02


def test_guidance_costs_187_instead_of_99_calls():
    net, _ = probe(steps=50)
    assert len(net.calls) == 187
    assert len(net.times(CLASSES)) == 99
    assert len(net.times(NO_CLASS)) == 88


def test_guidance_of_weight_1_costs_nothing():
    net, _ = probe(steps=50, cfg=1.0)
    assert net.times(NO_CLASS) == []


def test_heun_looks_at_both_ends_of_a_step_but_not_at_the_last():
    net, _ = probe(steps=4)
    assert net.times(CLASSES) == [0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4]


def test_euler_looks_at_the_start_of_each_step():
    net, _ = probe(steps=4, method="euler")
    assert net.times(CLASSES) == [0, 1 / 4, 2 / 4, 3 / 4]


# With 30, 60, ... steps, linspace in float32 is above 0.1 at a tenth of the way.
@pytest.mark.parametrize("steps", [10, 20, 30, 40, 50, 60, 70, 90, 100, 110, 130, 250])
@pytest.mark.parametrize("low, high", [(0.1, 1.0), (0.3, 0.7), (0.2, 0.6)])
def test_the_interval_is_open_and_tested_at_each_evaluation(steps, low, high):
    net, _ = probe(steps=steps, interval=(low, high))
    first = round(low * steps)
    last = round(high * steps)
    inside = [i / steps for i in range(first + 1, min(last, steps))]
    assert sorted(set(net.times(NO_CLASS))) == inside
    expected = [t for t in net.times(CLASSES) if t in inside]
    assert net.times(NO_CLASS) == expected


@pytest.mark.parametrize("low, first", [(0.0, 0.0), (1e-9, 0.25)])
def test_guidance_from_0_on_includes_the_first_evaluation(low, first):
    net, _ = probe(steps=4, interval=(low, 1.0))
    assert net.times(NO_CLASS)[0] == first


def test_guided_velocity_goes_on_from_the_one_without_a_class():
    _, z = probe(steps=1, cfg=2.5, interval=(0.0, 1.0))
    assert z.flatten().tolist() == [1 + 2.5 * (3 - 1)] * 2


def test_outside_of_the_interval_the_velocity_is_that_of_the_class():
    _, z = probe(steps=2, cfg=2.5, interval=(0.5, 1.0))
    assert z.flatten().tolist() == [3.0, 3.0]


def test_the_first_class_is_guided_away_from_no_class_too():
    """Class 0 is a class."""
    net = Probe()
    jlt.sample(net, torch.tensor([0, 0]), torch.zeros(2, 1, 1, 1), "v", 3, 2.0, (0.0, 1.0))
    assert len(net.times([0, 0])) == len(net.times(NO_CLASS)) == 5


def test_the_floor_holds_in_sampling():
    def net(z, t, y):
        return torch.full_like(z, 8.0)

    net.num_classes = 0
    zero = torch.zeros(1, 1, 1, 1)
    z = jlt.sample(net, torch.zeros(1).long(), zero, "x", 2, 1, method="euler", t_eps=0.8)
    # Half of the way to 8, and from there half a step of (8 - 4) / 0.8.
    assert z.item() == pytest.approx(4 + 0.5 * 4 / 0.8)


def test_bfloat16_networks_are_integrated_in_float32():
    # bfloat16 could not hold the sum of the first two.
    answers = iter([1.0, 1.0 + 2**-7, 1.0])

    def net(z, t, y):
        return torch.full_like(z, next(answers)).bfloat16()

    net.num_classes = 0
    z = jlt.sample(net, torch.zeros(1).long(), torch.zeros(1, 1, 1, 1), "v", 2, 1.0)
    assert z.dtype == torch.float32
    assert z.item() == (1 + 1 + 2**-7) / 4 + 1 / 2


def test_unknown_methods_and_targets_are_named():
    labels = torch.zeros(2).long()
    noise = torch.zeros(2, 8, 4, 4)
    with pytest.raises(AssertionError, match=r"'Heun' .*'heun', 'euler'"):
        jlt.sample(small_net(), labels, noise, method="Heun")
    with pytest.raises(AssertionError, match=r"'q' .*'x', 'eps', 'v'"):
        jlt.sample(small_net(), labels, noise, target="q")


def test_noise_of_an_image_does_not_depend_on_its_batch():
    together = noise_of(range(6))
    assert torch.equal(noise_of([4, 5]), together[4:])
    assert torch.equal(noise_of([3]), together[3:4])


def test_noise_is_normal_and_differs_by_image_and_seed():
    noise = torch.cat([noise_of(range(100)), noise_of(range(100), seed=1)])
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    similarity = torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)
    assert similarity.abs().max() < 0.6


def test_samples_follow_the_configuration():
    net = randomized(small_net())
    settings = {"target": "eps", "cfg": 1.7, "interval": (0.2, 0.6), "t_eps": 0.3}
    noise = noise_of([8, 2], seed=5)
    expected = jlt.sample(net, torch.ones(2).long(), noise, steps=4, **settings)
    assert torch.equal(generated(net, [8, 2], seed=5, **settings), expected)


# =============================================================== data order and noise
def test_every_epoch_shows_every_image_once():
    orders = epochs()
    assert len(orders) == 16
    for order in orders:
        assert sorted(order) == list(range(ORDER_IMAGES))


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = epochs() + epochs(dataclasses.replace(ORDER_CONFIG, seed=1))
    assert len({tuple(order) for order in orders}) == 32


def test_half_of_the_images_are_mirrored():
    flips = [flip for batch in all_picks() for _, flip in batch]
    assert 190 < sum(flips) < 290


def test_micro_batches_are_mirrored_each_in_its_own_way():
    patterns = {tuple(flip for _, flip in batch) for batch in all_picks()}
    assert len(patterns) == 2**4


def test_an_image_is_mirrored_in_some_epochs():
    picks = [pick for batch in all_picks() for pick in batch]
    assert len(set(picks)) == 2 * ORDER_IMAGES


def test_the_data_order_has_no_memory():
    assert all_picks(start=7) == all_picks()[7 * 4 :]
    backwards = [jlt.picks(ORDER_IMAGES, ORDER_CONFIG, 29 - i // 4, 3 - i % 4) for i in range(120)]
    assert backwards[::-1] == all_picks()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_take_micro_batches_in_turn(world, monkeypatch):
    batches = all_picks()
    steps = [batches[i : i + 4] for i in range(0, len(batches), 4)]
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        expected = [batch for step in steps for batch in step[rank::world]]
        assert all_picks() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_and_labels_are_those_that_are_picked(tmp_path, workers):
    data = encode.LatentDataset(write_cache(tmp_path, ORDER_IMAGES))
    config = dataclasses.replace(ORDER_CONFIG, workers=workers, steps=5)
    batches = list(jlt.micro_batches(data, config, CPU, start=2))
    expected = all_picks(config, start=2)
    assert len(batches) == len(expected) == 3 * 4
    for (x, y), picks in zip(batches, expected, strict=True):
        latents = torch.stack([data.item(index, flip)[0] for index, flip in picks])
        assert torch.equal(x.float(), latents)
        assert y.tolist() == [data.item(index)[1] for index, _ in picks]


def test_a_process_reads_its_own_micro_batches(tmp_path, monkeypatch):
    data = encode.LatentDataset(write_cache(tmp_path, ORDER_IMAGES))
    config = dataclasses.replace(ORDER_CONFIG, workers=0, steps=3)
    alone = list(jlt.micro_batches(data, config, CPU))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    mine = list(jlt.micro_batches(data, config, CPU))
    for (x, y), (x_alone, y_alone) in zip(mine, alone[1::2], strict=True):
        assert torch.equal(x, x_alone)
        assert torch.equal(y, y_alone)


@pytest.mark.parametrize("mean, std", [(-0.8, 0.8), (0.0, 1.5)])
def test_times_are_logit_normal(mean, std):
    t, _, _ = drawn(logit_t=(mean, std))
    assert t.logit().mean() == pytest.approx(mean, abs=0.03)
    assert t.logit().std() == pytest.approx(std, abs=0.03)


def test_noise_in_training_is_normal():
    _, eps, _ = drawn()
    assert eps.mean().abs() < 0.02
    assert eps.std() == pytest.approx(1, abs=0.02)


def test_times_noise_and_dropped_labels_know_nothing_of_each_other():
    t, eps, labels = drawn()
    table = torch.stack([t.logit(), eps.flatten(), (labels == 9).float()])
    assert torch.corrcoef(table).fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("share", [0.1, 0.0, 1.0])
def test_dropped_labels_become_the_class_after_the_last(share):
    _, _, labels = drawn(label_drop=share)
    assert (labels == 9).float().mean() == pytest.approx(share, abs=0.01)
    assert (labels == 0).float().mean() == pytest.approx(1 - share, abs=0.01)


def test_draws_are_the_same_for_every_target():
    for t, eps, labels in (drawn(target="v"), drawn(target="eps"), drawn(loss="x")):
        expected_t, expected_eps, expected_labels = drawn(target="x")
        assert torch.equal(t, expected_t)
        assert torch.equal(eps, expected_eps)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("other", [{"step": 4}, {"m": 2}, {"seed": 1}, {"step": 1, "m": 3}])
def test_draws_differ_by_step_micro_batch_and_seed(other):
    for ours, theirs in zip(drawn(), drawn(**other), strict=True):
        assert not torch.equal(ours, theirs)


# =============================================================== configuration
@pytest.mark.parametrize(
    "name, depth, width, heads, patch",
    [
        ("B/1", 12, 768, 12, 1),
        ("B/2", 12, 768, 12, 2),
        ("L/1", 24, 1024, 16, 1),
        ("L/2", 24, 1024, 16, 2),
        ("H/1", 32, 1280, 16, 1),
        ("H/2", 32, 1280, 16, 2),
        ("nano", 4, 256, 4, 1),
    ],
)
def test_names_of_models(name, depth, width, heads, patch):
    config = jlt.configure(model=name)
    assert (config.depth, config.hidden_size) == (depth, width)
    assert (config.num_heads, config.patch_size) == (heads, patch)


def test_the_defaults_are_the_papers():
    config = jlt.configure()
    assert (config.target, config.loss, config.t_eps) == ("x", "v", 0.05)
    assert (config.logit_t, config.label_drop) == ((-0.8, 0.8), 0.1)
    assert (config.model, config.steps, config.batch) == ("B/1", 250_000, 1024)
    assert (config.lr, config.warmup_epochs, config.cooldown) == (pytest.approx(2e-4), 5, 0)
    assert config.ema == 0.9999
    assert (config.sample_steps, config.cfg, config.interval) == (50, 2.9, (0.1, 1.0))


def test_nano_brings_settings_for_a_laptop():
    config = jlt.configure(model="nano")
    assert (config.batch, config.micro_batch, config.steps) == (32, 32, 2000)
    assert (config.lr, config.ema, config.warmup_epochs) == (3e-4, 0.99, 1)


def test_what_is_given_goes_before_the_models_name():
    config = jlt.configure(model="nano", depth=2, lr=1e-3)
    assert (config.depth, config.hidden_size, config.lr) == (2, 256, 1e-3)


@pytest.mark.parametrize(
    "width, heads", [(4, 1), (64, 1), (96, 1), (128, 2), (192, 3), (200, 2), (256, 4), (576, 9)]
)
def test_heads_have_64_channels_or_a_few_more(width, heads):
    assert jlt.configure(hidden_size=width).num_heads == heads


def test_heads_may_be_given():
    assert jlt.configure(hidden_size=64, num_heads=4).num_heads == 4


@pytest.mark.parametrize("batch, lr", [(256, 5e-5), (512, 1e-4), (32, 6.25e-6)])
def test_the_learning_rate_follows_the_batch(batch, lr):
    assert jlt.configure(batch=batch).lr == pytest.approx(lr)


@pytest.mark.parametrize("batch, micro", [(1024, 256), (600, 200), (8, 8), (514, 2), (257, 1)])
def test_the_micro_batch_is_the_largest_divisor_up_to_256(batch, micro):
    assert jlt.configure(batch=batch).micro_batch == micro


@pytest.mark.parametrize(
    "given, out",
    [
        ({}, "runs/B-1-x"),
        ({"target": "v", "model": "L/2"}, "runs/L-2-v"),
        ({"loss": "x"}, "runs/B-1-x-xloss"),
        ({"out": "mine"}, "mine"),
    ],
)
def test_the_run_folder_says_what_is_trained(given, out):
    assert jlt.configure(**given).out == out


def test_help_lists_every_setting_and_its_choices(cli):
    status, out, _ = cli(jlt, "--help")
    assert status == 0
    for field in dataclasses.fields(jlt.Config):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"^  {flag} ", out, re.MULTILINE), flag
        if field.metadata["choices"]:
            assert f"{flag} {{{','.join(field.metadata['choices'])}}}" in out


def test_help_says_the_defaults(cli):
    out = " ".join(cli(jlt, "--help")[1].split())
    for words in ("the velocity (x)", "(250000)", "(0.9999)", "(-0.8 0.8)", "high (0.1 1.0)"):
        assert words in out


@pytest.mark.parametrize(
    "line, words",
    [
        # What argparse says.
        ("--foo 1", "--foo"),
        ("--out", "--out"),
        ("--steps 1e3", "--steps: invalid int value: '1e3'"),
        ("--target q", "--target: invalid choice: 'q'"),
        ("--loss eps", "--loss: invalid choice: 'eps'"),
        ("--model S/2", "--model: invalid choice: 'S/2'"),
        ("--precision fp8", "--precision: invalid choice: 'fp8'"),
        ("--interval 0.1", "--interval: expected 2 arguments"),
        ("--sample", "--sample: expected one argument"),
        ("--demo --bench", "not allowed with"),
        ("--target v --step 5", "--step"),
        # Values that mean nothing.
        ("--steps 0", "--steps 0: must be positive"),
        ("--batch -3", "--batch -3: must be positive"),
        ("--depth 0", "--depth 0: must be positive"),
        ("--patch-size 0", "--patch-size 0: must be positive"),
        ("--sample-steps 0", "--sample-steps 0: must be positive"),
        ("--log-every 0", "--log-every 0: must be positive"),
        ("--save-every -1", "--save-every -1: must be 0 or more"),
        ("--workers -1", "--workers -1: must be 0 or more"),
        ("--bottleneck -1", "--bottleneck -1: must be 0 or more"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--seed 99999999999999999999999", "must be 0 or more, and below 2^63"),
        ("--lr -1", "--lr -1.0: must be a number, 0 or more"),
        ("--lr inf", "--lr inf: must be a number"),
        ("--lr nan", "--lr nan: must be a number"),
        ("--warmup-epochs 1e308", "--warmup-epochs 1e+308: must be a number"),
        ("--cfg nan", "--cfg nan: must be a number"),
        ("--ema 1.5", "--ema 1.5: must be from 0 to below 1"),
        ("--ema 1", "--ema 1.0: must be from 0 to below 1"),
        ("--label-drop 2", "--label-drop 2.0: must be from 0 to 1"),
        ("--cooldown 2", "--cooldown 2.0: must be from 0 to 1"),
        ("--t-eps 0", "--t-eps 0.0: must be above 0"),
        ("--logit-t 0 -1", "--logit-t (0.0, -1.0): must be a mean and a standard deviation"),
        ("--interval 0.9 0.1", "--interval (0.9, 0.1): must be low < high"),
        ("--interval 0.5 1.1", "--interval (0.5, 1.1): must be low < high, from 0 to 1"),
        ("--hidden-size 30", "--hidden-size 30: must be a multiple of 4"),
        ("--hidden-size 32 --num-heads 3", "a multiple of 4 for each of 3 heads"),
        ("--batch 10 --micro-batch 3", "--micro-batch 3: must be a divisor of --batch 10"),
        ("--batch 4 --micro-batch 8", "--micro-batch 8: must be a divisor of --batch 4"),
        # Things that are not there.
        ("--data nowhere", "nowhere: no such folder; encode.py"),
        ("--sample nowhere --n 3", "nowhere: no such file"),
        ("--sample . --n 3", "no such file; --sample takes a run folder"),
        ("--export nowhere", "ckpt.pt: no such file; --export takes a run folder"),
        ("--geometry nowhere", "nowhere: no such folder"),
        # Flags that do not go together.
        ("--classes 3", "--classes, --n and --labels go with --sample"),
        ("--demo --n 3", "--classes, --n and --labels go with --sample"),
        ("--sample x", "--classes 207 360 ... or --n 50000"),
        ("--sample x --n 3 --classes 1", "--classes and --n: give one of the two"),
        ("--sample x --n 0", "--n 0: must be positive"),
        ("--sample x --n 3 --lr 1", "--lr: has no use with --sample"),
        ("--export x --lr 1", "--lr: has no use with --export"),
        ("--demo --data x", "--data: has no use with --demo"),
        ("--demo --vae x", "--vae: has no use with --demo"),
        ("--bench --out x", "--out: has no use with --bench"),
        ("--geometry --data x", "--data: has no use with --geometry"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(cli, tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    refused(cli(jlt, *line.split()), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["", "--demo", "--bench", "--sample x --n 3"])
def test_a_device_that_is_not_there_is_named(cli, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    write_cache(Path("latents"))
    refused(cli(jlt, *mode.split(), "--device", "tpu"), "--device tpu: not on this machine")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize("mode", ["--demo", "--bench", "--geometry"])
def test_what_is_for_one_process_is_refused_to_several(cli, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(cli(jlt, mode), "for one process")
    assert list(tmp_path.iterdir()) == []


# =============================================================== why x
def test_gaussian_risks_by_hand():
    # z has variance 0.36 * 4 + 0.16 = 1.6 in the first direction.
    risk = jlt.gaussian_risk([4.0, 0.0], 0.6)
    assert risk["x"] == pytest.approx((4 * 0.16 / 1.6 + 0) / 2)
    assert risk["eps"] == pytest.approx((0.36 * 4 / 1.6 + 0) / 2)
    assert risk["v"] == pytest.approx((4 / 1.6 + 0) / 2)


def test_gaussian_risks_differ_by_the_weight_of_their_readouts():
    risk = jlt.gaussian_risk([0.1, 1.0, 5.0], 0.3)
    assert risk["v"] == pytest.approx(risk["x"] / 0.7**2)
    assert risk["v"] == pytest.approx(risk["eps"] / 0.3**2)


def test_gaussian_gains_by_hand():
    assert jlt.gaussian_gain(4.0, 0.6) == pytest.approx((0.6 * 4 / 1.6, (0.6 * 4 - 0.4) / 1.6))
    # Where the data has no variance, v hands the noise on.
    assert jlt.gaussian_gain(0.0, 0.6) == pytest.approx((0, -1 / 0.4))


@pytest.mark.parametrize("rank_of", [jlt.effective_rank, jlt.participation_ratio])
@pytest.mark.parametrize("n", [1, 7])
def test_ranks_count_equal_directions(rank_of, n):
    lam = torch.cat([torch.full((n,), 3.0), torch.zeros(5)])
    assert rank_of(lam) == pytest.approx(n)


def test_effective_rank_is_the_exponential_of_the_entropy():
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert jlt.effective_rank([3.0, 1.0]) == pytest.approx(math.exp(entropy))


def test_participation_ratio_by_hand():
    assert jlt.participation_ratio([3.0, 1.0]) == pytest.approx((3 + 1) ** 2 / (9 + 1))


@pytest.mark.parametrize("share, count", [(0.1, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3)])
def test_directions_for_a_share_of_the_variance(share, count):
    assert jlt.directions_for(share, [1.0, 2.0, 1.0]) == count


@pytest.mark.parametrize("t", [0.2, 0.8])
def test_the_linear_probe_meets_the_gaussian_risk(t):
    lam = torch.tensor([4.0, 1.0, 0.2, 0.01])
    rotation = torch.linalg.qr(normal(4, 4, seed=1).float()).Q
    x = normal(60_000, 4).float() * lam.sqrt() @ rotation + 2
    fit, held_out = x.chunk(2)
    risk = jlt.gaussian_risk(lam, t)
    probe = jlt.linear_probe(fit, held_out, t)
    assert probe["x"] == pytest.approx(risk["x"], rel=0.03)
    assert probe["v"] == pytest.approx(risk["v"], rel=0.03)


def test_the_linear_probe_is_measured_on_other_tokens():
    """Of half as many tokens as dimensions, everything can be learned by heart."""
    fit, held_out = normal(200, 200).chunk(2)
    assert jlt.linear_probe(fit, held_out, 0.5)["x"] > 0.3


def test_tokens_are_patches_row_by_row():
    z = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    single = jlt.tokens(z, 1)
    assert single.shape == (2 * 16, 3)
    assert single[5].tolist() == z[0, :, 1, 1].tolist()
    assert single[16 + 7].tolist() == z[1, :, 1, 3].tolist()

    double = jlt.tokens(z, 2)
    assert double.shape == (2 * 4, 12)
    assert sorted(double[5].tolist()) == sorted(z[1, :, :2, 2:].flatten().tolist())


def test_geometry_counts_tokens_and_variances(geometry):
    line = line_with(geometry.printed, "tokens of")
    assert f"{geometry.count:,} tokens of 8 dimensions" in line
    assert numbers_in(line)[-1] == pytest.approx(geometry.lam[0], rel=1e-3)
    smallest, mean = numbers_in(line_with(geometry.printed, "on average"))
    assert smallest == 0
    assert mean == pytest.approx(geometry.lam.mean(), abs=1e-3)


def test_geometry_prints_each_targets_spectrum(geometry):
    spectra = {"x": geometry.lam, "eps": np.ones(8), "v": geometry.lam + 1}
    for target, lam in spectra.items():
        shares = lam / lam.sum()
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        held = np.cumsum(shares)
        rank, ratio, directions, half = numbers_in(row_of(geometry.printed, target))
        assert rank == pytest.approx(math.exp(entropy), abs=0.051)
        assert ratio == pytest.approx(1 / (shares**2).sum(), abs=0.051)
        assert directions == 1 + (held < 0.9).sum()
        assert half == pytest.approx(shares[4:].sum(), abs=0.00051)


@pytest.mark.parametrize("t", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_geometry_prints_risks_and_gains(geometry, t):
    lam = geometry.lam
    variance_z = t**2 * lam + (1 - t) ** 2
    row = numbers_in(row_of(geometry.printed, f"{t:.1f}"))
    time, risk_x, risk_eps, risk_v, probe_x, probe_v, gain_x, gain_v = row
    assert time == t
    assert risk_x == pytest.approx(((1 - t) ** 2 * lam / variance_z).mean(), abs=1e-4)
    assert risk_eps == pytest.approx((t**2 * lam / variance_z).mean(), abs=1e-4)
    assert risk_v == pytest.approx((lam / variance_z).mean(), abs=1e-4)
    assert probe_x == pytest.approx(risk_x, rel=0.05)
    assert probe_v == pytest.approx(risk_v, rel=0.05)
    # In the constant channel v hands the noise on, x nothing.
    assert gain_x == 0
    assert gain_v == pytest.approx(-1 / (1 - t), abs=1e-3)


def test_geometry_draws_three_curves_in_each_chart(geometry):
    with Image.open(geometry.folder / "g.png") as picture:
        assert picture.size == (2 * 560, 420)
        charts = [picture.crop((left, 0, left + 560, 420)) for left in (0, 560)]
    for chart in charts:
        pixels = {colour: count for count, colour in chart.getcolors(100_000)}
        for colour in ((31, 119, 180), (127, 127, 127), (214, 39, 40)):
            assert pixels[colour] > 500


def test_geometry_of_larger_patches(geometry):
    given = ("--geometry", "cache", "--model", "B/2", "--out", "patches.png")
    assert "2,400 tokens of 32 dimensions" in printed(geometry.folder, *given)
    assert (geometry.folder / "patches.png").exists()


def test_geometry_without_a_cache_is_of_the_digits(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "runs/digits")
    assert "2,400 tokens of 128 dimensions" in printed(tmp_path, "--geometry")
    assert (tmp_path / "geometry.png").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("cache --out g.png", "g.png: exists already"),
        ("cache --out nowhere/g.png", "there is no folder nowhere"),
        ("nowhere --out new.png", "nowhere: no such folder"),
        ("cache --out new.png --patch-size 3", "patches of 3 do not tile"),
        ("one --out new.png", "one latent has no statistics"),
    ],
)
def test_geometry_refuses(cli, geometry, monkeypatch, line, words):
    monkeypatch.chdir(geometry.folder)
    write_cache(Path("one"), n=1)
    before = Path("g.png").read_bytes()
    refused(cli(jlt, "--geometry", *line.split()), words)
    assert Path("g.png").read_bytes() == before
    assert not Path("new.png").exists()


# =============================================================== the demo
def demo_row(demo, name):
    """-> the numbers of a row of the table: loss (but for real digits), pooled pixels, features,
    low directions, read right."""
    lines = [line for line in demo.printed.splitlines() if line.startswith(name.ljust(12) + " ")]
    assert len(lines) == 1, demo.printed
    return numbers_in(lines[0].removeprefix(name))


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def config_of(run):
    return torch.load(run / "ckpt.pt", weights_only=True)["config"]


def test_demo_prints_a_row_for_real_digits_and_for_each_target(demo):
    names = [line[:12].strip() for line in demo.printed.splitlines() if line.endswith("%")]
    assert names == ["real", "real, coded", "predicts x", "predicts v"]


def test_demo_finds_real_digits_best(demo):
    pixels, features, energy, right = demo_row(demo, "real")
    assert energy == 1
    assert right > 0.9
    for target in "xv":
        _, its_pixels, its_features, _, its_right = demo_row(demo, f"predicts {target}")
        assert pixels < its_pixels
        assert features < its_features
        assert right > its_right


def test_demo_prints_the_last_logged_loss(demo):
    for target in "xv":
        loss = demo_row(demo, f"predicts {target}")[0]
        assert loss == pytest.approx(log_of(demo.folder / target)[-1]["loss"], abs=0.00051)


def test_demo_compares_runs_that_differ_in_the_target_only(demo):
    x = config_of(demo.folder / "x")
    v = config_of(demo.folder / "v")
    assert {name for name in x if x[name] != v[name]} == {"target", "out"}
    assert (x["depth"], x["steps"], x["hidden_size"]) == (1, 6, 64)


def demo_samples(demo, digits, target):
    """-> latents and images (uint8) that the averaged weights of a run give, made once more."""
    config = jlt.Config(**config_of(demo.folder / target))
    net = jlt.load_network(demo.folder / target / "ema.safetensors").net
    labels = torch.arange(DEMO_IMAGES) % 10
    latents = jlt.generate(net, labels, range(DEMO_IMAGES), config, CPU)
    codec = encode.load_vae(digits / "codec.safetensors")
    return latents, encode.to_uint8(codec.decode(latents))


@pytest.mark.parametrize("target", ["x", "v"])
def test_demo_scores_samples_of_the_averaged_weights(demo, digits, target):
    """Pooled pixels and low directions of a row, computed once more."""
    latents, samples = demo_samples(demo, digits, target)
    images, _ = encode.draw_digits(2 * DEMO_IMAGES, seed=3)
    reference, real = images.chunk(2)
    real_latents = encode.load_vae(digits / "codec.safetensors").encode(encode.to_float(real))

    def statistics(images):
        x = encode.to_float(images).double()
        pooled = x.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5)).flatten(1)
        return pooled.mean(0), torch.cov(pooled.T)

    def energy(latents):
        return latents.movedim(1, -1).flatten(0, 2)[:, 64:].var(0).sum()

    distance = fid.frechet_distance(*statistics(samples), *statistics(reference))
    ratio = energy(latents) / energy(real_latents)
    _, printed_distance, _, printed_ratio, _ = demo_row(demo, f"predicts {target}")
    assert printed_distance == pytest.approx(distance, abs=0.0051)
    assert printed_ratio == pytest.approx(ratio.item(), abs=0.0051)


def test_demo_draws_two_rows_of_real_digits_and_of_each_target(demo, digits):
    picture = pixels_of(demo.folder / "demo.png")
    assert picture.shape == (3, 3 * 192, 170 + 960)
    images, _ = encode.draw_digits(2 * DEMO_IMAGES, seed=3)
    _, of_x = demo_samples(demo, digits, "x")
    _, of_v = demo_samples(demo, digits, "v")
    shown = torch.cat([images[DEMO_IMAGES:][:20], of_x[:20], of_v[:20]])
    # Three times as large, at the right of the names.
    assert torch.equal(picture[:, 1::3, 171::3], encode.image_grid(shown, columns=10))
    for label in picture[:, :, :170].split(192, dim=1):
        assert label.amin() < 100


def test_demo_of_one_target_alone(eps_demo):
    names = [line[:12].strip() for line in eps_demo.printed.splitlines() if line.endswith("%")]
    assert names == ["real", "real, coded", "predicts eps"]
    assert not eps_demo.folder.exists()
    mine = eps_demo.folder.parent.parent / "mine"
    assert sorted(path.name for path in mine.iterdir()) == ["demo.png", "eps"]
    assert pixels_of(mine / "demo.png").shape == (3, 2 * 192, 170 + 960)
    assert config_of(mine / "eps")["target"] == "eps"


def test_the_judge_learns_to_read_digits():
    judge = jlt.digit_judge(*encode.draw_digits(1000, seed=1), steps=60)
    images, labels = encode.draw_digits(500, seed=2)
    read = judge(encode.to_float(images)).argmax(1)
    assert (read == labels).float().mean() > 0.9


# =============================================================== the benchmark
def test_benchmark_prints_the_rate_of_its_training_steps(bench):
    steps = [line for line in bench.printed.splitlines() if line.startswith("step ")]
    rates = [float(re.search(r"([\d,]+) images/s", line)[1].replace(",", "")) for line in steps]
    rate, micro_batch = numbers_in(line_with(bench.printed, "training:"))
    assert len(rates) > 2
    assert rate == pytest.approx(np.median(rates[1:]), abs=0.6)
    # On a CPU a step is one micro-batch.
    assert micro_batch == 32
    assert "batch 1 x 32 " in bench.printed


def test_benchmark_knows_no_peak_of_a_cpu(bench):
    assert "share of the device's peak is unknown" in line_with(bench.printed, "training:")


def test_benchmark_says_the_hours_of_the_whole_run(bench):
    rate, _ = numbers_in(line_with(bench.printed, "training:"))
    steps, batch, hours, _, _ = numbers_in(line_with(bench.printed, "in all:"))
    assert (steps, batch) == (100_000, 96)
    assert hours == pytest.approx(100_000 * 96 / rate / 3600, abs=0.06, rel=0.01)


def test_benchmark_counts_samples_not_batches(bench):
    """32 were sampled within its time."""
    rate, steps = numbers_in(line_with(bench.printed, "sampling:"))
    assert steps == 6
    assert rate > 32 / bench.seconds


def test_benchmark_says_the_minutes_of_50000_samples(bench):
    rate, _ = numbers_in(line_with(bench.printed, "sampling:"))
    _, _, _, samples, minutes = numbers_in(line_with(bench.printed, "in all:"))
    assert samples == 50_000
    assert minutes == pytest.approx(50_000 / rate / 60, abs=0.06, rel=0.01)


def test_benchmark_leaves_nothing_behind(bench):
    assert list(bench.folder.iterdir()) == []


def test_benchmark_with_a_vae_counts_decoding(digits, tmp_path):
    codec = digits / "codec.safetensors"
    text = printed(tmp_path, *BENCH_FLAGS, "--sample-steps", 1, "--vae", codec)
    rate, _ = numbers_in(line_with(text, "sampling:"))
    encoding, decoding = numbers_in(line_with(text, "VAE:"))
    line = line_with(text, "in all:")
    minutes = numbers_in(line)[-1]
    assert "decoded and written" in line
    assert encoding > 0
    # Writing is in it, too, and is not printed by itself.
    assert minutes > 0.99 * 50_000 * (1 / rate + 1 / decoding) / 60


# =============================================================== helpers of training and sampling
TINY = ["--depth", 2, "--hidden-size", 32, "--batch", 8, "--micro-batch", 4]
TINY += ["--workers", 0, "--device", "cpu"]


def parts_of(run):
    """-> everything that the checkpoint of a run holds."""
    return torch.load(Path(run) / "ckpt.pt", weights_only=True)


def assert_same(run, other, parts=("model", "ema", "optimizer", "step")):
    """Asserts that two runs' checkpoints are equal to the bit."""
    ours = parts_of(run)
    theirs = parts_of(other)
    for part in parts:
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)


def assert_close(run, other):
    """Asserts that two runs' weights and averages are equal but for the order of summation."""
    ours = parts_of(run)
    theirs = parts_of(other)
    assert ours["step"] == theirs["step"]
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=2e-5)


def leftovers(folder):
    return [path for path in Path(folder).rglob("*") if path.name.startswith(".tmp")]


def pixels(path):
    """-> int (H, W, 3)"""
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def tiles(path, side=32):
    """-> the pictures of a grid, in reading order: int (N, side, side, 3)"""
    grid = pixels(path)
    rows = grid.reshape(len(grid) // side, side, -1, side, 3)
    return rows.swapaxes(1, 2).reshape(-1, side, side, 3)


def alike(images, others):
    """Whether pictures are the same to one level of 255."""
    return np.shape(images) == np.shape(others) and np.abs(images - others).max() <= 1


def start(script, *arguments, processes=1):
    """Starts a command line in processes of their own, in a group that Ctrl-C would reach."""
    return subprocess.Popen(
        command(script, *arguments, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children_of(process):
    """-> the ids of the processes that torchrun started, the first rank's first."""
    output = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True)
    return sorted(map(int, output.split()))


def wait_for_step(process, step):
    """Reads what a training run prints until it has come that far."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def wait_for(condition, process=None, seconds=60):
    """Until condition() holds, or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


# =============================================================== fixtures of training
@pytest.fixture(scope="session")
def small_cache(tmp_path_factory):
    """24 latents of 8 x 4 x 4 and three classes: three steps of TINY are an epoch."""
    return write_cache(tmp_path_factory.mktemp("small") / "cache")


@pytest.fixture
def train(cli, small_cache, tmp_path):
    """train(*flags, out="run"): a short training in this process, into tmp_path / out. -> what
    cli returns"""

    def train(*flags, out="run"):
        where = ["--data", small_cache, "--out", tmp_path / out]
        return cli(jlt, *TINY, "--steps", 2, "--lr", 1e-3, "--ema", 0.9, *where, *flags)

    return train


def train_once(out, **settings):
    """A run of TINY's settings, for several tests. -> its folder"""
    tiny = {"depth": 2, "hidden_size": 32, "batch": 8, "micro_batch": 4, "workers": 0}
    config = jlt.configure(**tiny, device="cpu", sample_every=0, out=str(out), **settings)
    return jlt.train(config)


@pytest.fixture(scope="session")
def two_steps(small_cache, tmp_path_factory):
    """The folder of what train() makes."""
    out = tmp_path_factory.mktemp("two_steps") / "run"
    return train_once(out, data=str(small_cache), steps=2, lr=1e-3, ema=0.9)


@pytest.fixture
def finished(two_steps, tmp_path):
    """A copy of this run, where train() goes on."""
    return shutil.copytree(two_steps, tmp_path / "run")


@pytest.fixture
def nan_cache(small_cache, tmp_path):
    """nan_cache(step): the small cache, in which step 1, 2, ... of the first epoch meets an image
    that is not finite. -> folder"""

    def nan_cache(step):
        config = jlt.configure(batch=8, micro_batch=4)
        index, _ = jlt.picks(24, config, step - 1, 1)[0]
        tensors = load_file(small_cache / "latents_00000.safetensors")
        for name in ("latents", "latents_flip"):
            tensors[name][index, 0, 0, 0] = float("nan")
        return write_cache(tmp_path / "nan", **tensors)

    return nan_cache


Stopped = namedtuple("Stopped", "folder step status stderr")


@pytest.fixture(scope="session")
def stopped_pair(small_cache, tmp_path_factory):
    """A run of two processes that SIGTERM stopped: its folder, the step that was saved, and how
    torchrun ended."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    flags = ["--micro-batch", 2, "--log-every", 1, "--lr", 1e-3, "--ema", 0.9]
    where = ["--data", small_cache, "--out", folder]
    process = start("jlt.py", *TINY, *flags, *where, "--steps", 4000, processes=2)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    return Stopped(folder, parts_of(folder)["step"], process.returncode, stderr)


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk on which training is some steps ahead of its checkpoint."""
    save = torch.save

    def slowly(*arguments):
        time.sleep(0.3)
        save(*arguments)

    monkeypatch.setattr(torch, "save", slowly)


# =============================================================== fixtures of sampling
CLASS_NAMES = ["ant", "bee", "great white shark"]


@pytest.fixture(scope="session")
def decoder(digits):
    """The file of the codec of digits, a decoder without a network. It makes pictures of 32 x 32
    pixels of latents (128, 2, 2)."""
    return digits / "codec.safetensors"


@pytest.fixture(scope="session")
def named_cache(tmp_path_factory):
    """A cache for this decoder, with class names."""
    folder = write_cache(tmp_path_factory.mktemp("named") / "cache", shape=(128, 2, 2))
    (folder / "meta.json").write_text(json.dumps({"classes": CLASS_NAMES}))
    return folder


@pytest.fixture(scope="session")
def trained(named_cache, decoder, tmp_path_factory):
    """The folder of a run of 12 steps, after which the average is not yet what it averages."""
    return train_once(
        tmp_path_factory.mktemp("trained") / "run",
        **{"data": str(named_cache), "vae": str(decoder), "steps": 12},
        **{"lr": 2e-2, "warmup_epochs": 0.0, "ema": 0.8},
    )


@pytest.fixture
def run(trained, tmp_path):
    """A copy of this run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def with_pictures(named_cache, decoder):
    """The flags of a training that draws pictures on the way."""
    flags = ["--data", named_cache, "--vae", decoder, "--lr", 2e-2, "--warmup-epochs", 0]
    return [*flags, "--sample-steps", 2, "--sample-every", 2]


@pytest.fixture
def sample_run(cli, run):
    """sample_run(*flags): samples from the run, quickly. -> what cli returns"""

    def sample_run(*flags):
        return cli(jlt, "--sample", run, "--sample-steps", 2, "--device", "cpu", *flags)

    return sample_run


def published(net, prefix="net.", dtype=torch.float32, **changes):
    """-> what the released code saves of a network: the contents of its checkpoint-last.pth."""
    weights = {prefix + name: weight.to(dtype) for name, weight in net.state_dict().items()}
    weights[prefix + "mask_token"] = torch.ones(1, 1, 32, dtype=dtype)
    stepped = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(stepped.parameters(), lr=1e-4, betas=(0.9, 0.95))
    for parameter in stepped.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    arguments = {
        **{"model": "JiT-B/1", "img_size": 32, "flow_matching": False, "t_eps": 0.05},
        **{"class_num": 5, "P_mean": -0.8, "P_std": 0.8, "cfg": 2.9},
        **{"interval_min": 0.1, "interval_max": 1.0, "ema_decay1": 0.9999},
        **{"vae_type": "flux2", "vae_model_name_or_path": "black-forest-labs/FLUX.2-dev"},
    }
    arguments |= changes
    kept = {name: value for name, value in arguments.items() if value is not None}
    return {
        "model": {name: torch.zeros_like(weight) for name, weight in weights.items()},
        "model_ema1": weights,
        "model_ema2": {name: -weight for name, weight in weights.items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 199,
        "args": Namespace(**kept),
    }


@pytest.fixture(scope="session")
def network():
    """A network of random weights for latents (128, 2, 2) and five classes."""
    return randomized(jlt.JLT(2, 1, 128, 32, 2, 2, num_classes=5))


@pytest.fixture(scope="session")
def released(network, tmp_path_factory):
    """A small file in the layout of the published one."""
    path = tmp_path_factory.mktemp("released") / "checkpoint-last.pth"
    torch.save(published(network), path)
    return path


@pytest.fixture
def sampling(released, decoder):
    """sampling(*flags): the words of a command line that samples from it, quickly."""

    def sampling(*flags):
        quick = ["--vae", decoder, "--device", "cpu", "--sample-steps", 2]
        return ["--sample", released, *quick, *flags]

    return sampling


@pytest.fixture
def sampled(cli, sampling, tmp_path):
    """sampled(*flags, out="out.png"): the same, done, into tmp_path / out. -> tmp_path / out"""

    def sampled(*flags, out="out.png"):
        status, _, stderr = cli(jlt, *sampling(*flags, "--out", tmp_path / out))
        assert status == 0, stderr
        return tmp_path / out

    return sampled


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: {file of owner/name: path, or the error that fetching it raises}.
    The current folder is an empty one."""
    files = {}

    def download(repo_id, filename):
        assert repo_id == "owner/name"
        if isinstance(files[filename], Exception):
            raise files[filename]
        return str(files[filename])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return files


# =============================================================== training: the steps
HandStep = namedtuple("HandStep", "lr norm times errors weights averages")


def train_by_hand(folder, config, steps):
    """AdamW with warm-up, clipping and EMA, written out. -> a HandStep for each step"""
    data = encode.LatentDataset(folder)
    torch.manual_seed(config.seed)
    net = jlt.JLT(4, 1, 8, config.hidden_size, config.depth, num_heads=1, num_classes=3)
    weights = [parameter.detach() for parameter in net.parameters()]
    averages = [weight.clone() for weight in weights]
    means = [torch.zeros_like(weight) for weight in weights]
    squares = [torch.zeros_like(weight) for weight in weights]
    rows = []
    for step in range(steps):
        times = []
        errors = []
        for m in range(2):
            items = [data.item(*pick) for pick in jlt.picks(24, config, step, m)]
            x = torch.stack([latent for latent, _ in items])
            y = torch.tensor([label for _, label in items])
            t, eps, y = jlt.draws(config, step, m, x, y, 3)
            times.append(t)
            errors.append(jlt.flow_error(net, x, y, t, eps, config.target, loss=config.loss))
        errors = torch.cat(errors)
        gradients = torch.autograd.grad(errors.mean(), list(net.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()

        # Three epochs of three steps are nine steps of warm-up.
        lr = config.lr * (step + 1) / 9
        for i, gradient in enumerate(gradients):
            g = gradient / max(1, norm)
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.95 * squares[i] + 0.05 * g**2
            mean = means[i] / (1 - 0.9 ** (step + 1))
            square = squares[i] / (1 - 0.95 ** (step + 1))
            weights[i] -= lr * mean / (square.sqrt() + 1e-8)
            averages[i] = 0.75 * averages[i] + 0.25 * weights[i]
        copies = [weight.clone() for weight in weights]
        rows.append(HandStep(lr, norm, torch.cat(times), errors.detach(), copies, list(averages)))
    return rows


@pytest.mark.parametrize(
    "target, loss, loudness, clipped",
    [
        ("x", "v", 1, True),
        ("x", "v", 0.02, False),
        ("v", "v", 1, False),
        ("eps", "v", 1, True),
        ("x", "x", 1, False),
    ],
)
def test_the_first_steps_are_adamw_with_warm_up_clipping_and_ema(
    train, small_cache, tmp_path, target, loss, loudness, clipped
):
    tensors = load_file(small_cache / "latents_00000.safetensors")
    for name in ("latents", "latents_flip"):
        tensors[name] *= loudness
    cache = write_cache(tmp_path / "cache", **tensors)
    flags = ["--target", target, "--loss", loss, "--data", cache, "--log-every", 1]
    train(*flags, "--steps", 4, "--warmup-epochs", 3, "--ema", 0.75)

    settings = {"batch": 8, "micro_batch": 4, "hidden_size": 32, "depth": 2, "lr": 1e-3}
    config = jlt.configure(target=target, loss=loss, **settings)
    by_hand = train_by_hand(cache, config, steps=4)
    assert all((row.norm > 1) == clipped for row in by_hand)
    state = parts_of(tmp_path / "run")
    for part, expected in [("model", by_hand[-1].weights), ("ema", by_hand[-1].averages)]:
        torch.testing.assert_close(list(state[part].values()), expected, rtol=0, atol=2e-6)

    for row, expected in zip(log_of(tmp_path / "run"), by_hand, strict=True):
        assert row["lr"] == pytest.approx(expected.lr)
        assert row["grad_norm"] == pytest.approx(expected.norm.item(), rel=1e-3)
        assert row["loss"] == pytest.approx(expected.errors.mean().item(), rel=1e-4)
        for k, value in enumerate(row["loss_by_t"]):
            here = expected.errors[(10 * expected.times).int() == k]
            # No image fell into this tenth of t.
            wanted = pytest.approx(here.mean().item(), rel=1e-4) if len(here) else None
            assert value == wanted


def test_after_the_warm_up_the_rate_is_constant(train, tmp_path):
    train("--steps", 8, "--warmup-epochs", 2, "--log-every", 1)
    rates = [1e-3 * share / 6 for share in (1, 2, 3, 4, 5, 6, 6, 6)]
    assert [row["lr"] for row in log_of(tmp_path / "run")] == pytest.approx(rates)


def test_a_cool_down_falls_linearly_over_the_last_share_of_the_steps(train, tmp_path):
    train("--steps", 8, "--warmup-epochs", 0, "--cooldown", 0.5, "--log-every", 1)
    rates = [1e-3 * share / 4 for share in (4, 4, 4, 4, 4, 3, 2, 1)]
    assert [row["lr"] for row in log_of(tmp_path / "run")] == pytest.approx(rates)


def test_both_targets_start_from_the_same_weights(train, tmp_path):
    for target in ("x", "v"):
        train("--target", target, "--lr", 1e-30, out=target)
    x = parts_of(tmp_path / "x")["model"]
    v = parts_of(tmp_path / "v")["model"]
    torch.testing.assert_close(x, v, rtol=0, atol=1e-20)


def test_a_dropped_label_is_no_class(train, tmp_path):
    tables = []
    for lr in (1e-30, 1e-3):
        train("--label-drop", 1, "--steps", 4, "--lr", lr, out=f"{lr}")
        model = parts_of(tmp_path / f"{lr}")["model"]
        tables.append(model["y_embedder.embedding_table.weight"])
    change = tables[1] - tables[0]  # (4, 32)
    assert change.abs().amax(1).gt(1e-6).tolist() == [False, False, False, True]


# =============================================================== training: the log
def test_lines_are_logged_at_steps_1_and_10_at_each_interval_and_at_the_end(train, tmp_path):
    _, out, _ = train("--steps", 25, "--log-every", 7)
    steps = [1, 7, 10, 14, 21, 25]
    assert [row["step"] for row in log_of(tmp_path / "run")] == steps
    printed = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in printed] == [f"step {step}" for step in steps]


def test_a_row_averages_over_the_steps_since_the_last_one(train, tmp_path):
    train("--steps", 6, "--log-every", 1, out="each")
    train("--steps", 6, "--log-every", 3, out="third")
    each = log_of(tmp_path / "each")
    third = log_of(tmp_path / "third")
    for key in ("loss", "grad_norm"):
        values = [row[key] for row in each]
        expected = [values[0], np.mean(values[1:3]), np.mean(values[3:])]
        assert [row[key] for row in third] == pytest.approx(expected)


def test_the_rate_of_images_fits_the_time_of_a_step(train, tmp_path):
    train("--steps", 1)
    (row,) = log_of(tmp_path / "run")
    assert row["images_per_s"] == pytest.approx(8 / (row["ms"] / 1000))


def test_the_loss_by_t_is_printed_now_and_then(train):
    _, out, _ = train("--steps", 25, "--log-every", 2)
    lines = [line for line in out.splitlines() if line.startswith("  loss by t")]
    assert len(lines) == 1
    values = lines[0].split(":")[1].split()
    assert len(values) == 10
    assert sum(value != "-" for value in values) > 3


def test_half_a_line_at_the_end_of_the_log_is_dropped(train, finished):
    with open(finished / "log.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert train("--steps", 3)[0] == 0
    assert [row["step"] for row in log_of(finished)] == [1, 2, 3]


# =============================================================== training: interruptions
def test_killed_and_continued_is_bitwise_the_same(train, small_cache, tmp_path):
    cut = tmp_path / "cut"
    flags = ["--save-every", 10, "--log-every", 1]
    where = ["--lr", 1e-3, "--ema", 0.9, "--data", small_cache, "--out", cut]
    process = start("jlt.py", *TINY, *flags, *where, "--steps", 4000)
    wait_for_step(process, 13)
    wait_for((cut / "ckpt.pt").exists, process)
    process.kill()
    process.communicate()
    saved = parts_of(cut)["step"]
    assert saved % 10 == 0
    assert log_of(cut)[-1]["step"] > saved
    for name in ("ckpt.pt", "log.jsonl", "run.json", "ema.safetensors"):
        (cut / f".tmp.1.{name}").write_bytes(b"half")

    # Not on to step 4000.
    status, out, _ = train(*flags, "--steps", saved + 7, out="cut")
    assert status == 0
    assert f"continuing at step {saved}, up to step {saved + 7}" in out
    assert train(*flags, "--steps", saved + 7, out="whole")[0] == 0
    assert_same(tmp_path / "whole", cut)
    assert [row["step"] for row in log_of(cut)] == list(range(1, saved + 8))
    assert not leftovers(cut)


def test_a_checkpoint_on_the_way_is_that_of_a_run_that_ends_there(train, nan_cache, tmp_path):
    assert train("--steps", 2, out="short")[0] == 0
    train("--steps", 9, "--save-every", 2, "--data", nan_cache(3))
    wait_for((tmp_path / "run/ckpt.pt").exists)
    assert_same(tmp_path / "run", tmp_path / "short")


def stop_at(path, lines, number):
    """Sends a signal to this process as soon as a file has so many lines."""

    def stop():
        wait_for(lambda: path.exists() and path.read_text().count("\n") >= lines)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(train, tmp_path, number):
    flags = ["--log-every", 1]
    stop_at(tmp_path / "run/log.jsonl", 5, number)
    result = train(*flags, "--steps", 4000)
    saved = parts_of(tmp_path / "run")["step"]
    refused(result, f"stopped by a signal, saved at step {saved}; the same command", status=130)
    assert 5 <= saved == log_of(tmp_path / "run")[-1]["step"]

    for out in ("run", "whole"):
        assert train(*flags, "--steps", saved + 3, out=out)[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert [row["step"] for row in log_of(tmp_path / "run")] == list(range(1, saved + 4))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_reading_processes_too(train, small_cache, tmp_path, number):
    run = tmp_path / "run"
    # More micro-batches to a step than are read ahead.
    flags = ["--micro-batch", 1, "--workers", 2]
    where = ["--lr", 1e-3, "--ema", 0.9, "--data", small_cache, "--out", run]
    process = start("jlt.py", *TINY, *flags, *where, "--log-every", 1, "--steps", 4000)
    wait_for_step(process, 3)
    # As a terminal does with Ctrl-C, and a batch system with SIGTERM.
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    saved = parts_of(run)["step"]
    refused((process.returncode, out, err), f"saved at step {saved}", status=130)

    assert train(*flags, "--steps", saved + 2)[0] == 0
    assert train("--micro-batch", 1, "--steps", saved + 2, out="whole")[0] == 0
    assert_same(run, tmp_path / "whole")


@pytest.mark.long
def test_training_outlives_25_kills_at_random_moments(train, small_cache, tmp_path):
    flags = [*TINY, "--lr", 1e-3, "--ema", 0.9, "--data", small_cache]
    flags += ["--steps", 60, "--save-every", 3, "--log-every", 7]
    begun = time.time()
    assert call("jlt.py", *flags, "--out", tmp_path / "whole").returncode == 0
    duration = time.time() - begun
    run = tmp_path / "run"
    random = np.random.default_rng(0)
    kills = 0
    finished = False
    while kills < 25 or not finished:
        process = start("jlt.py", *flags, "--out", run)
        finished = False
        try:
            process.communicate(timeout=random.uniform(0.3, 1.02) * duration)
            finished = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        if (run / "ckpt.pt").exists():
            assert parts_of(run)["step"] % 3 == 0
        if finished:
            assert process.returncode == 0
            assert_same(run, tmp_path / "whole")
            assert not leftovers(run)
            shutil.rmtree(run)


# =============================================================== training: several processes
def test_stopped_by_sigterm_several_processes_save(stopped_pair):
    assert stopped_pair.status != 0
    line = f"run: stopped by a signal, saved at step {stopped_pair.step}; the same command"
    assert line in stopped_pair.stderr
    steps = [row["step"] for row in log_of(stopped_pair.folder)]
    assert steps == list(range(1, stopped_pair.step + 1))


def test_two_processes_train_what_one_does(train, stopped_pair, tmp_path):
    flags = ["--micro-batch", 2, "--log-every", 1]
    assert train(*flags, "--steps", stopped_pair.step)[0] == 0
    assert_close(stopped_pair.folder, tmp_path / "run")
    for ours, theirs in zip(log_of(stopped_pair.folder), log_of(tmp_path / "run"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
        # None where no image fell.
        by_time = [value or 0 for value in theirs["loss_by_t"]]
        assert [value or 0 for value in ours["loss_by_t"]] == pytest.approx(by_time, rel=1e-3)


def test_one_process_continues_what_two_began(train, stopped_pair, tmp_path):
    shutil.copytree(stopped_pair.folder, tmp_path / "run")
    for out in ("run", "alone"):
        flags = ["--micro-batch", 2, "--steps", stopped_pair.step + 5]
        status, stdout, _ = train(*flags, out=out)
        assert status == 0
        assert (f"continuing at step {stopped_pair.step}" in stdout) == (out == "run")
    assert_close(tmp_path / "run", tmp_path / "alone")


def test_a_signal_to_one_process_stops_all(small_cache, tmp_path):
    run = tmp_path / "run"
    where = ["--data", small_cache, "--out", run]
    process = start("jlt.py", *TINY, *where, "--log-every", 1, "--steps", 4000, processes=2)
    wait_for_step(process, 3)
    os.kill(children_of(process)[-1], signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    saved = parts_of(run)["step"]
    assert f"stopped by a signal, saved at step {saved}" in err
    assert [row["step"] for row in log_of(run)] == list(range(1, saved + 1))


def test_when_one_of_three_processes_is_killed_the_checkpoint_is_whole(
    train, small_cache, tmp_path
):
    run = tmp_path / "run"
    flags = ["--micro-batch", 2, "--save-every", 1, "--lr", 1e-3, "--ema", 0.9]
    assert train(*flags, "--steps", 3)[0] == 0
    # Begun by one, continued by three.
    where = ["--data", small_cache, "--out", run]
    process = start("jlt.py", *TINY, *flags, *where, "--steps", 4000, processes=3)
    wait_for_step(process, 6)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    saved = parts_of(run)["step"]
    assert saved >= 5

    for out in ("run", "alone"):
        assert train(*flags, "--steps", saved + 2, out=out)[0] == 0
    assert_close(run, tmp_path / "alone")
    assert not leftovers(run)


# =============================================================== training: files
def test_a_checkpoint_is_saved_by_time(train, nan_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(jlt.Saver, "EVERY", 0)
    train("--steps", 9, "--data", nan_cache(3))
    wait_for(lambda: parts_of(tmp_path / "run")["step"] == 2)


def test_a_checkpoint_is_of_its_step_though_training_goes_on(train, nan_cache, tmp_path, slow_disk):
    assert train("--steps", 1, out="short")[0] == 0
    train("--steps", 9, "--save-every", 1, "--data", nan_cache(2))
    wait_for((tmp_path / "run/ckpt.pt").exists)
    assert_same(tmp_path / "run", tmp_path / "short")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(train, finished, monkeypatch):
    before = (finished / "ckpt.pt").read_bytes()

    def fails(state, path):
        Path(path).write_bytes(b"half")
        # What torch makes of a full disk.
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fails)
    refused(train("--steps", 3), "ckpt.pt: cannot be written; is the disk full?", status=1)
    assert (finished / "ckpt.pt").read_bytes() == before
    assert not leftovers(finished)


def test_run_json_holds_the_settings(finished, small_cache):
    settings = json.loads((finished / "run.json").read_text())
    expected = {"target": "x", "loss": "v", "steps": 2, "batch": 8, "num_heads": 1, "lr": 1e-3}
    expected |= {"latents": "24 latents 8x4x4 of 3 classes", "torch": torch.__version__}
    assert {field.name for field in dataclasses.fields(jlt.Config)} < settings.keys()
    settings["latents"] = settings["latents"].split(" (digest")[0]
    assert expected.items() <= settings.items()


def test_ema_safetensors_is_the_average_with_its_settings_and_class_names(trained):
    weights = load_file(trained / "ema.safetensors")
    state = parts_of(trained)
    torch.testing.assert_close(weights, dict(state["ema"]), rtol=0, atol=0)
    assert any(not torch.equal(weights[name], state["model"][name]) for name in weights)
    with safe_open(trained / "ema.safetensors", "pt") as file:
        about = json.loads(file.metadata()["jlt"])
    assert about["config"]["target"] == "x"
    assert about["config"]["lr"] == 2e-2
    assert about["classes"] == CLASS_NAMES
    assert about["step"] == 12


def test_export_writes_it_earlier(cli, run):
    written = (run / "ema.safetensors").read_bytes()
    (run / "ema.safetensors").unlink()
    status, out, _ = cli(jlt, "--export", run)
    assert status == 0
    assert f"wrote {run / 'ema.safetensors'}" in out
    assert (run / "ema.safetensors").read_bytes() == written


FREE_FLAGS = (
    *("--steps 3", "--cfg 1.5", "--interval 0 0.9", "--sample-steps 9", "--vae another"),
    *("--log-every 1", "--save-every 1", "--sample-every 3", "--workers 1", "--compile off"),
)


@pytest.mark.parametrize("change", FREE_FLAGS)
def test_what_does_not_change_the_weights_may_change(train, finished, tmp_path, change):
    status, out, _ = train("--steps", 3, *change.split())
    assert status == 0
    assert "continuing at step 2" in out
    train("--steps", 3, out="whole")
    assert_same(finished, tmp_path / "whole")


def test_the_cache_may_lie_elsewhere(train, finished, small_cache, tmp_path):
    moved = shutil.copytree(small_cache, tmp_path / "moved")
    status, out, _ = train("--steps", 3, "--data", moved)
    assert status == 0
    assert "continuing at step 2" in out


# =============================================================== training: pictures on the way
def test_pictures_on_the_way_are_samples_of_the_average_of_that_step(
    train, cli, with_pictures, tmp_path
):
    train(*with_pictures, "--steps", 4, out="long")
    train(*with_pictures, "--steps", 2, out="short")
    classes = torch.linspace(0, 2, 16).long().tolist()
    for name, run in [("samples_0000002.png", "short"), ("samples_0000004.png", "long")]:
        out = tmp_path / f"{run}.png"
        flags = ["--sample-steps", 2, "--device", "cpu", "--out", out]
        cli(jlt, "--sample", tmp_path / run, *flags, "--classes", *classes)
        on_the_way = tmp_path / "long" / name
        assert pixels(on_the_way).shape == (2 * 32, 8 * 32, 3)
        assert alike(tiles(on_the_way), tiles(out))
    assert len(list((tmp_path / "long").glob("samples*"))) == 2


@pytest.mark.parametrize("name, line", [("{decoder}", "8 channels"), ("nowhere", "--vae nowhere")])
def test_without_a_vae_that_fits_training_goes_on(train, decoder, tmp_path, name, line):
    status, out, _ = train("--vae", name.format(decoder=decoder), "--sample-every", 1)
    assert status == 0
    lines = [row for row in out.splitlines() if row.startswith("no pictures on the way: ")]
    assert len(lines) == 1
    assert line in lines[0]
    assert parts_of(tmp_path / "run")["step"] == 2


def test_a_picture_that_fails_does_not_end_the_run(train, with_pictures, tmp_path):
    (tmp_path / "run/samples_0000002.png").mkdir(parents=True)
    status, out, _ = train(*with_pictures)
    assert status == 0
    assert "no picture at step 2: " in out


def test_photos_become_samples(cache, cli, tmp_path):
    run = tmp_path / "run"
    quick = ["--sample-steps", 2, "--device", "cpu"]
    flags = ["--data", cache.folder, "--out", run, "--lr", 0.02, "--warmup-epochs", 0]
    status, out, _ = cli(jlt, *TINY, *flags, *quick, "--steps", 2, "--sample-every", 2)
    assert status == 0
    assert "no picture" not in out
    assert np.ptp(pixels(run / "samples_0000002.png")) > 20

    status, _, _ = cli(jlt, "--sample", run, *quick, "--n", 5, "--micro-batch", 2)
    assert status == 0
    samples = run / "n5_cfg2.9_steps2_seed0"
    images = [pixels(samples / f"{i:06d}.png") for i in range(5)]
    assert {image.shape for image in images} == {(32, 32, 3)}
    assert np.ptp(images) > 20


# =============================================================== the published checkpoint
def load_published(cli, tmp_path, decoder, state):
    """Samples from what the released code would have saved. -> stdout, pictures"""
    path = tmp_path / "checkpoint.pth"
    torch.save(state, path)
    flags = ["--vae", decoder, "--sample-steps", 2, "--device", "cpu"]
    flags += ["--classes", 0, 4, "--out", tmp_path / "published.png"]
    status, out, err = cli(jlt, "--sample", path, *flags)
    assert status == 0, err
    images = tiles(tmp_path / "published.png")
    (tmp_path / "published.png").unlink()
    return out, images


@pytest.mark.parametrize("prefix", ["net.", "module.net."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_published_weights_are_loaded_exactly(network, tmp_path, prefix, dtype):
    path = tmp_path / "checkpoint-last.pth"
    torch.save(published(network, prefix, dtype), path)
    loaded = jlt.load_network(path).net.state_dict()
    expected = {name: w.to(dtype).float() for name, w in network.state_dict().items()}
    torch.testing.assert_close(dict(loaded), expected, rtol=0, atol=0)


@pytest.mark.parametrize("flow_matching, target", [(False, "x"), (None, "x"), (True, "v")])
def test_flow_matching_says_what_the_published_network_predicts(
    cli, network, decoder, tmp_path, flow_matching, target
):
    state = published(network, flow_matching=flow_matching)
    out, images = load_published(cli, tmp_path, decoder, state)
    assert f"checkpoint.pth: {target}-prediction, first EMA (model_ema1) of epoch 199" in out
    assert out.count("-prediction") == out.count(f"{target}-prediction") == 2

    config = jlt.configure(sample_steps=2, target=target)
    labels = torch.tensor([0, 4])
    latents = jlt.generate(network, labels, range(2), config, torch.device("cpu"))
    expected = encode.to_uint8(encode.load_vae(decoder).decode(latents))
    assert alike(images, expected.permute(0, 2, 3, 1).int().numpy())
    assert np.ptp(images) > 20


def test_the_published_floor_is_used(cli, network, decoder, tmp_path):
    _, images = load_published(cli, tmp_path, decoder, published(network))
    _, same = load_published(cli, tmp_path, decoder, published(network, t_eps=None))
    _, other = load_published(cli, tmp_path, decoder, published(network, t_eps=0.8))
    assert np.array_equal(images, same)
    assert not alike(images, other)


@pytest.mark.parametrize("bottleneck", [0, 32, 4])
def test_our_checkpoint_gives_back_its_network(train, tmp_path, bottleneck):
    train("--bottleneck", bottleneck, "--patch-size", 2)
    loaded = jlt.load_network(tmp_path / "run")
    ema = parts_of(tmp_path / "run")["ema"]
    torch.testing.assert_close(dict(loaded.net.state_dict()), dict(ema), rtol=0, atol=0)


# =============================================================== sampling: one picture
def test_classes_are_a_picture_about_as_wide_as_high(sampled):
    picture = sampled("--classes", 0, 1, 2, 3, 4, 0)
    assert pixels(picture).shape == (2 * 32, 3 * 32, 3)
    assert np.ptp(tiles(picture), axis=(1, 2, 3)).min() > 20


def test_a_picture_may_be_made_in_parts(sampled):
    whole = sampled("--classes", 0, 1, 2, 3, 4)
    parts = sampled("--classes", 0, 1, 2, 3, 4, "--micro-batch", 2, out="parts.png")
    assert alike(pixels(whole), pixels(parts))


def test_classes_have_their_own_pictures(sampled):
    first = tiles(sampled("--classes", 0, 1))
    second = tiles(sampled("--classes", 0, 2, out="other.png"))
    assert alike(first[0], second[0])
    assert not alike(first[1], second[1])


@pytest.mark.parametrize("flag", ["--cfg 1", "--seed 1", "--sample-steps 3", "--interval 0 0.5"])
def test_sampling_flags_change_the_picture(sampled, flag):
    first = sampled("--classes", 0)
    second = sampled("--classes", 0, *flag.split(), out="other.png")
    assert not alike(pixels(first), pixels(second))


def test_a_class_may_be_given_by_its_name(sample_run, tmp_path):
    for out, classes in [("names.png", ("bee", "great white shark")), ("numbers.png", (1, 2))]:
        assert sample_run("--classes", *classes, "--out", tmp_path / out)[0] == 0
    assert (tmp_path / "names.png").read_bytes() == (tmp_path / "numbers.png").read_bytes()


def test_labels_add_a_strip_with_the_name_under_each_picture(sample_run, tmp_path):
    sample_run("--classes", 0, 1, "--out", tmp_path / "plain.png")
    sample_run("--classes", 0, 1, "--labels", "--out", tmp_path / "labels.png")
    labelled = pixels(tmp_path / "labels.png")
    assert np.array_equal(labelled[:32], pixels(tmp_path / "plain.png"))
    strips = labelled[32:, :32], labelled[32:, 32:]
    for strip in strips:
        assert strip.shape == (16, 32, 3)
        assert strip.min() < 100
        assert np.median(strip) == 255
    assert not np.array_equal(*strips)


def test_the_default_name_in_the_runs_folder_says_what_made_it(sample_run, run):
    assert sample_run("--classes", 2, "bee")[0] == 0
    assert (run / "classes_2_1_cfg2.9_steps2_seed0.png").exists()
    assert sample_run("--classes", 2, "bee", "--cfg", 1.5)[0] == 0
    assert (run / "classes_2_1_cfg1.5_steps2_seed0.png").exists()
    refused(sample_run("--classes", 2, "bee"), "classes_2_1_cfg2.9_steps2_seed0.png: exists")
    assert sample_run("--n", 1)[0] == 0
    assert (run / "n1_cfg2.9_steps2_seed0/000000.png").exists()


def test_samples_of_a_foreign_file_go_to_the_current_folder(cli, sampling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(jlt, *sampling("--classes", 3))[0] == 0
    assert Path("classes_3_cfg2.9_steps2_seed0.png").exists()


def test_the_average_is_what_samples(cli, sample_run, run, decoder, tmp_path):
    weights = load_file(run / "ema.safetensors")
    assert sample_run("--classes", 0, 1, "--out", tmp_path / "ckpt.png")[0] == 0

    net = jlt.JLT(2, 1, 128, 32, 2, num_heads=1, num_classes=3)
    net.load_state_dict(weights)
    config = jlt.configure(sample_steps=2)
    latents = jlt.generate(net, torch.tensor([0, 1]), range(2), config, torch.device("cpu"))
    expected = encode.to_uint8(encode.load_vae(decoder).decode(latents))
    assert alike(tiles(tmp_path / "ckpt.png"), expected.permute(0, 2, 3, 1).int().numpy())


@pytest.mark.parametrize("name", ["ema.safetensors", ""])
def test_a_run_that_was_given_away_samples(cli, sample_run, run, tmp_path, name):
    sample_run("--classes", "bee", "--out", tmp_path / "whole.png")
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(run / "ema.safetensors", given)
    flags = ["--sample-steps", 2, "--device", "cpu", "--out", tmp_path / "given.png"]
    status, out, _ = cli(jlt, "--sample", given / name, "--classes", "bee", *flags)
    assert status == 0
    assert "ema.safetensors: x-prediction, EMA of step 12" in out
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "given.png").read_bytes()


@pytest.mark.parametrize("name", ["ckpt.pt", "ema.safetensors"])
def test_a_run_samples_with_its_own_settings_but_for_those_given(
    cli, named_cache, decoder, tmp_path, name
):
    run = train_once(
        tmp_path / "run",
        **{"data": str(named_cache), "vae": str(decoder), "steps": 1, "t_eps": 0.1},
        **{"target": "v", "sample_steps": 3, "cfg": 1.5, "interval": (0.0, 0.5)},
    )
    flags = ["--sample", run / name, "--device", "cpu", "--n", 1, "--out"]
    status, out, _ = cli(jlt, *flags, tmp_path / "own")
    assert status == 0
    assert "v-prediction, 3 Heun steps, guidance 1.5 on (0.0, 0.5), seed 0" in out
    status, out, _ = cli(jlt, *flags, tmp_path / "given", "--cfg", 2, "--interval", 0.2, 1)
    assert status == 0
    assert "v-prediction, 3 Heun steps, guidance 2 on (0.2, 1.0), seed 0" in out
    settings = json.loads((tmp_path / "given/settings.json").read_text())
    assert (settings["t_eps"], settings["vae"]) == (0.1, str(decoder))


# =============================================================== sampling: a folder
def test_n_images_are_a_folder_of_numbered_pictures_and_their_settings(sampled, decoder):
    folder = sampled("--n", 6, out="folder")
    assert sorted(files_of(folder)) == [*(f"{i:06d}.png" for i in range(6)), "settings.json"]
    assert {pixels(folder / f"{i:06d}.png").shape for i in range(6)} == {(32, 32, 3)}
    settings = json.loads((folder / "settings.json").read_text())
    expected = {"target": "x", "cfg": 2.9, "interval": [0.1, 1.0], "sample_steps": 2, "seed": 0}
    expected |= {"vae": str(decoder), "t_eps": 0.05}
    assert expected.items() <= settings.items()
    assert settings["weights"] == "first EMA (model_ema1) of epoch 199"


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_images_are_of_all_classes_in_turn_whatever_the_batch(sampled, batch):
    folder = sampled("--n", 7, "--micro-batch", batch, out="folder")
    # Of a prime number the grid is one row.
    picture = sampled("--classes", 0, 1, 2, 3, 4, 0, 1)
    images = [pixels(folder / f"{i:06d}.png") for i in range(7)]
    assert alike(images, tiles(picture))


def test_killed_sampling_is_continued_to_the_same_bytes(sampled, sampling, tmp_path):
    flags = ["--n", 24, "--micro-batch", 1, "--sample-steps", 8]
    whole = files_of(sampled(*flags, out="whole"))
    cut = tmp_path / "cut"
    process = start("jlt.py", *sampling(*flags, "--out", cut))
    wait_for((cut / "000002.png").exists, process)
    process.kill()
    process.communicate()
    (cut / ".tmp.1.000023.png").write_bytes(b"half")
    finished = {path: path.stat().st_mtime_ns for path in cut.glob("0*.png")}
    assert 3 <= len(finished) < 24
    for path in finished:
        assert path.read_bytes() == whole[path.name]

    sampled(*flags, out="cut")
    assert files_of(cut) == whole
    for path, written in finished.items():
        assert path.stat().st_mtime_ns == written


def test_a_removed_image_comes_back_and_the_others_stay(sampled):
    folder = sampled("--n", 5, "--micro-batch", 2, out="folder")
    whole = files_of(folder)
    (folder / "000003.png").unlink()  # the second one of its batch
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    sampled("--n", 5, "--micro-batch", 2, out="folder")
    assert files_of(folder) == whole
    for path, before in written.items():
        assert path.stat().st_mtime_ns == before


def test_more_images_may_be_added(sampled):
    folder = sampled("--n", 3, "--micro-batch", 1, out="folder")
    sampled("--n", 5, "--micro-batch", 1, out="folder")
    whole = sampled("--n", 5, "--micro-batch", 1, out="whole")
    assert files_of(folder) == files_of(whole)


def test_three_processes_make_the_same_bytes(sampled, sampling, tmp_path):
    flags = ["--n", 7, "--micro-batch", 1]
    alone = sampled(*flags, out="alone")
    result = call("jlt.py", *sampling(*flags, "--out", tmp_path / "three"), processes=3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote") == 1
    assert files_of(tmp_path / "three") == files_of(alone)


def test_each_process_makes_its_own_share(sampled, monkeypatch):
    # The others wait for the first one's settings.json, and it waits for their pictures.
    sampled("--n", 1, out="folder")
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = {"1": {2, 3}, "2": {4, 5}, "0": {1, 6}}
    there = {"settings.json", "000000.png"}
    for rank, numbers in shares.items():
        monkeypatch.setenv("RANK", rank)
        folder = sampled("--n", 7, "--micro-batch", 2, out="folder")
        there |= {f"{i:06d}.png" for i in numbers}
        assert set(files_of(folder)) == there


def test_the_first_process_ends_when_all_pictures_are_there(sampled, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    last = tmp_path / "folder/000001.png"
    threading.Timer(3, last.write_bytes, [b""]).start()
    sampled("--n", 2, "--micro-batch", 1, out="folder")
    assert last.exists()


def test_one_process_draws_the_picture_of_classes(cli, sampling, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert cli(jlt, *sampling("--classes", 1, "--out", tmp_path / "out.png"))[0] == 0
    assert not list(tmp_path.iterdir())


def test_a_process_leaves_alone_what_the_first_one_is_writing(sampled, tmp_path, monkeypatch):
    settings = (sampled("--n", 1, out="first") / "settings.json").read_text()
    folder = tmp_path / "folder"
    folder.mkdir()
    temporary = folder / f".tmp.{os.getppid()}.settings.json"
    temporary.write_text(settings + " ")
    threading.Timer(0.5, os.replace, (temporary, folder / "settings.json")).start()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    sampled("--n", 2, "--micro-batch", 1, out="folder")
    wait_for(lambda: not temporary.exists())
    assert (folder / "settings.json").read_text() == settings + " "
    assert set(files_of(folder)) == {"settings.json", "000001.png"}


@pytest.mark.long
def test_sampling_outlives_25_kills_at_random_moments(sampling, tmp_path):
    flags = ["--n", 24, "--micro-batch", 1, "--sample-steps", 20]
    begun = time.time()
    assert call("jlt.py", *sampling(*flags, "--out", tmp_path / "whole")).returncode == 0
    duration = time.time() - begun
    whole = files_of(tmp_path / "whole")
    folder = tmp_path / "folder"
    random = np.random.default_rng(0)
    kills = 0
    finished = False
    while kills < 25 or not finished:
        process = start("jlt.py", *sampling(*flags, "--out", folder))
        finished = False
        try:
            process.communicate(timeout=random.uniform(0.3, 1.02) * duration)
            finished = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        found = files_of(folder) if folder.exists() else {}
        for name, contents in found.items():
            if not name.startswith(".tmp"):
                assert contents == whole[name]
        if finished:
            assert process.returncode == 0
            assert found == whole
            shutil.rmtree(folder)


# =============================================================== sampling: the hub
HUB = ["--sample", "owner/name", "--classes", 1, "--sample-steps", 2, "--device", "cpu"]
NO_ENTRY = huggingface_hub.errors.EntryNotFoundError("404: no such file in the repository")


def test_a_repository_of_the_published_checkpoint_samples(cli, hub, released, decoder, sampled):
    hub["checkpoint-last.pth"] = released
    assert cli(jlt, *HUB, "--vae", decoder)[0] == 0
    picture = Path("classes_1_cfg2.9_steps2_seed0.png")
    assert picture.read_bytes() == sampled("--classes", 1).read_bytes()


def test_a_repository_of_our_own_samples(cli, hub, run, sample_run, tmp_path):
    hub["checkpoint-last.pth"] = NO_ENTRY
    hub["ema.safetensors"] = shutil.copy(run / "ema.safetensors", tmp_path)
    assert cli(jlt, *HUB)[0] == 0
    sample_run("--classes", 1, "--out", "run.png")
    picture = Path("classes_1_cfg2.9_steps2_seed0.png")
    assert picture.read_bytes() == Path("run.png").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set"),
        huggingface_hub.errors.LocalEntryNotFoundError("cannot find the file in the cache"),
        OSError("Network is unreachable"),
        NO_ENTRY,
    ],
)
def test_what_cannot_be_fetched_is_refused_with_the_command_to_fetch_it(cli, hub, error):
    hub["checkpoint-last.pth"] = error
    hub["ema.safetensors"] = error
    by_hand = "fetch it by hand: hf download owner/name checkpoint-last.pth --local-dir ."
    refused(cli(jlt, *HUB), "owner/name: not to be had", by_hand, str(error), status=1)


def test_without_a_network_the_hub_itself_is_one_line(cli):
    result = cli(jlt, "--sample", "owner/no-such-name", "--n", 1)
    refused(result, "owner/no-such-name: not to be had", "hf download", status=1)


# =============================================================== full disks
def room_for(disk, contents, name):
    """Fills a disk so that the files before `name` fit, but not `name`."""
    names = list(contents)
    written = names[: names.index(name)]
    fill_but_for(disk, [contents[file] for file in [*written, name]])
    return set(written)


@pytest.mark.parametrize("name", ["run.json", "log.jsonl", "ckpt.pt", "ema.safetensors"])
def test_a_full_disk_ends_training_in_one_line(train, small_disk, name):
    assert train(out="whole")[0] == 0
    out = small_disk / "run"
    whole = files_of(Path(small_disk).parent / "whole")
    order = ["run.json", "log.jsonl", "ckpt.pt", "ema.safetensors"]
    written = room_for(small_disk, {file: whole[file] for file in order}, name)
    refused(train("--out", out), f"{name}: ", status=1)
    assert set(files_of(out)) - {"log.jsonl"} == written - {"log.jsonl"}
    if name == "ema.safetensors":
        assert_same(out, small_disk.parent / "whole")

    (small_disk / "rest").unlink()
    assert train("--out", out)[0] == 0
    assert_same(out, small_disk.parent / "whole")
    assert len(log_of(out)) == 2


def test_a_full_disk_leaves_the_last_checkpoint(train, small_disk):
    run = small_disk / "run"
    assert train("--out", run)[0] == 0
    before = (run / "ckpt.pt").read_bytes()
    fill_but_for(small_disk, [before])
    refused(train("--out", run, "--steps", 4), "ckpt.pt: cannot be written", status=1)
    assert (run / "ckpt.pt").read_bytes() == before

    (small_disk / "rest").unlink()
    assert train("--out", run, "--steps", 4)[0] == 0
    assert train("--steps", 4, out="whole")[0] == 0
    assert_same(run, small_disk.parent / "whole")


@pytest.mark.parametrize("name", ["settings.json", "000000.png", "000002.png"])
def test_a_full_disk_ends_sampling_in_one_line(cli, sampling, sampled, small_disk, name):
    flags = ["--n", 4, "--micro-batch", 1]
    whole = files_of(sampled(*flags, out="whole"))
    order = ["settings.json", *sorted(file for file in whole if file.endswith(".png"))]
    written = room_for(small_disk, {file: whole[file] for file in order}, name)
    folder = small_disk / "folder"
    refused(cli(jlt, *sampling(*flags, "--out", folder)), f"{name}: cannot be written", status=1)
    assert files_of(folder) == {file: whole[file] for file in written}

    (small_disk / "rest").unlink()
    assert cli(jlt, *sampling(*flags, "--out", folder))[0] == 0
    assert files_of(folder) == whole


def test_a_full_disk_under_a_picture_of_classes(cli, sampling, sampled, small_disk):
    whole = sampled("--classes", 1).read_bytes()
    fill_but_for(small_disk, [whole])
    words = sampling("--classes", 1, "--out", small_disk / "out.png")
    refused(cli(jlt, *words), "out.png: cannot be written", status=1)
    assert set(files_of(small_disk)) == {"rest"}


# =============================================================== faults: training
@pytest.mark.parametrize("flags", ["--log-every 1", "--log-every 4", "--save-every 3"])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_named(
    train, finished, nan_cache, flags
):
    before = (finished / "ckpt.pt").read_bytes()
    result = train("--steps", 12, "--data", nan_cache(3), *flags.split())
    refused(result, "the loss or gradient of step 3 is not finite", "--lr", status=1)
    time.sleep(0.2)  # as a thread writes checkpoints
    assert (finished / "ckpt.pt").read_bytes() == before
    assert max(row["step"] for row in log_of(finished)) == 2


def save_encoded(folder, encoder, files="", shards=1):
    """A cache of the small one's shape as encode.py would write it."""
    tensors = load_file(write_cache(folder) / "latents_00000.safetensors")
    names = ("latents", "latents_flip", "labels")
    for number in range(shards):
        encode.save_shard(
            folder / f"latents_{number:05d}.safetensors",
            *(tensors[name] for name in names),
            **{"encoder": encoder, "files": files, "number": number, "shards": shards},
        )


@pytest.mark.parametrize(
    "change, words",
    [
        ("--target v", "target x (now v)"),
        ("--loss x", "loss v (now x)"),
        ("--lr 0.5", "lr 0.001 (now 0.5)"),
        ("--ema 0.5", "ema 0.9 (now 0.5)"),
        ("--seed 1", "seed 0 (now 1)"),
        ("--batch 16", "batch 8 (now 16)"),
        ("--micro-batch 2", "micro_batch 4 (now 2)"),
        ("--depth 1", "depth 2 (now 1)"),
        ("--label-drop 0.2", "label_drop 0.1 (now 0.2)"),
        ("--logit-t 0 1", "logit_t (-0.8, 0.8) (now (0.0, 1.0))"),
        ("--t-eps 0.1", "t_eps 0.05 (now 0.1)"),
        ("--precision bf16", "precision auto (now bf16)"),
        ("--cooldown 0.5", "cooldown 0.0 (now 0.5)"),
        ("--target v --seed 1", "target x (now v), seed 0 (now 1)"),
        ("--data {base}/more", "latents 24 latents 8x4x4 of 3 classes"),
        ("--data {base}/more", "(now 30 latents 8x4x4 of 3 classes"),
        ("--data {base}/encoded", "latents 24 latents 8x4x4 of 3 classes"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(train, finished, tmp_path, change, words):
    write_cache(tmp_path / "more", n=30)
    save_encoded(tmp_path / "encoded", encoder="a")
    before = files_of(finished)
    result = train(*change.format(base=tmp_path).split())
    refused(result, "ckpt.pt: made with other settings: ", words, "give another --out")
    assert files_of(finished) == before


@pytest.mark.parametrize("key", ["encoder", "files"])
def test_a_run_is_not_continued_with_another_encoder_or_other_pictures(train, tmp_path, key):
    settings = {"encoder": "a", "files": "a"}
    save_encoded(tmp_path / "first", **settings)
    save_encoded(tmp_path / "second", **settings | {key: "b"})
    assert train("--data", tmp_path / "first")[0] == 0
    refused(train("--data", tmp_path / "second"), "made with other settings: latents", "digest")


def test_with_a_cool_down_the_number_of_steps_is_a_setting(train):
    assert train("--cooldown", 0.5)[0] == 0
    refused(train("--cooldown", 0.5, "--steps", 3), "steps 2 (now 3)")


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def flip_a_bit(contents):
    """... in the middle, where the weights are."""
    place = len(contents) // 2
    return contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :]


def damaged(good):
    """-> {kind: contents} of a file that was a good checkpoint."""
    return {
        "cut": good[:-700],
        "beginning": good[:100],
        "flipped": flip_a_bit(good),
        "empty": b"",
        "text": b"just text",
        "pickle": pickle.dumps({"step": 1}),
        "trap": pickle.dumps(Trap()),
        "zipped trap": pickled({"step": 1, "ema": Trap()}),
        "tensor": pickled(torch.ones(3)),
        "another's": pickled({"state_dict": {"a": torch.ones(3)}}),
    }


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("kind", damaged(bytes(1000)))
def test_a_damaged_checkpoint_is_refused_and_left_alone(train, finished, monkeypatch, kind):
    monkeypatch.chdir(finished)
    contents = damaged((finished / "ckpt.pt").read_bytes())[kind]
    (finished / "ckpt.pt").write_bytes(contents)
    before = files_of(finished)
    refused(train("--steps", 3), "ckpt.pt: ")
    assert files_of(finished) == before


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--patch-size 3", "--patch-size 3: does not divide latents of 4"),
        ("--data nowhere", "nowhere: no such folder; encode.py IMAGES --out nowhere makes it"),
        ("--data {base}", "holds no latents_*.safetensors"),
        ("--data {base}/cut", "latents_00000.safetensors: no shard of latents"),
        ("--data {base}/mixed", "mixes latents of different shape or origin"),
        ("--data {base}/growing", "1 of 3 shards; the same encode.py command finishes it"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(train, tmp_path, flags, words):
    shard = write_cache(tmp_path / "cut") / "latents_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    first = write_cache(tmp_path / "other", shape=(8, 2, 2)) / "latents_00000.safetensors"
    shutil.copy(first, write_cache(tmp_path / "mixed") / "latents_00001.safetensors")
    save_encoded(tmp_path / "growing", encoder="a", shards=3)
    for number in (1, 2):
        (tmp_path / f"growing/latents_0000{number}.safetensors").unlink()
    status = 1 if "cut" in flags else 2
    refused(train(*flags.format(base=tmp_path).split()), words, status=status)
    assert not (tmp_path / "run").exists()


def test_of_a_mistake_under_torchrun_only_the_first_process_tells(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(train("--data", "nowhere"), "nowhere: no such folder")

    def ended_by_torchrun(seconds):
        sys.exit(-signal.SIGTERM)

    # The first process says it and leaves, whereupon torchrun ends the others while they wait.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", ended_by_torchrun)
    status, _, stderr = train("--data", "nowhere")
    assert status == -signal.SIGTERM
    assert stderr == ""


def test_more_processes_than_micro_batches_are_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(train(), "3 processes for 2 micro-batches; give --micro-batch 2 or less")


# =============================================================== faults: sampling
BAD_FILES = {
    "trap.pth": "mkdir",
    "raw.pth": "damaged, or no checkpoint",
    "class.pth": "PurePosixPath, and no code is run for a checkpoint",
    "tensor.pth": "holds no JLT",
    "dict.pth": "holds no JLT",
    "short.pth": "holds no JLT",
    "no_args.pth": "holds no JLT",
    "text.pth": "damaged, or no checkpoint",
    "text.safetensors": "no averaged weights of this program",
    "other.safetensors": "no averaged weights of this program",
}


def write_bad_file(name, state):
    contents = {
        "trap.pth": pickled(state | {"optimizer": Trap()}),
        "raw.pth": pickle.dumps(Trap()),
        "class.pth": pickled(state | {"optimizer": PurePosixPath("a")}),
        "tensor.pth": pickled(torch.ones(3)),
        "dict.pth": pickled({"a": torch.ones(3)}),
        "short.pth": pickled(state | {"model_ema1": {"net.a": torch.ones(1)}}),
        "no_args.pth": pickled(state | {"args": Namespace()}),
        "text.pth": b"just text",
        "text.safetensors": b"just text",
        "other.safetensors": save({"a": torch.ones(3)}),
    }
    Path(name).write_bytes(contents[name])


@pytest.mark.parametrize("name, words", BAD_FILES.items())
def test_no_code_runs_from_a_file_and_other_files_are_refused(
    cli, network, tmp_path, monkeypatch, name, words
):
    monkeypatch.chdir(tmp_path)
    write_bad_file(name, published(network))
    refused(cli(jlt, "--sample", name, "--n", 1, "--device", "cpu"), f"{name}: ", words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere", "nowhere: no such file or run folder, and no repository's name"),
        ("a/b/c", "a/b/c: no such file or run folder, and no repository's name"),
        ("empty", "ema.safetensors: no such file; --sample takes a run folder or a checkpoint"),
    ],
)
def test_a_name_of_nothing_is_refused(cli, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    refused(cli(jlt, "--sample", name, "--n", 3), words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--classes 3", "--classes 3: the checkpoint has classes 0 to 2"),
        ("--classes -1", "--classes -1: no class of that name"),
        ("--classes wasp", "--classes wasp: no class of that name; there are, for"),
        ("--classes been", "there are, for instance, bee"),
        ("--classes whiteshark", "there are, for instance, great white shark"),
        ("--classes 1 --out out.jpg", "--out out.jpg: needs the ending .png with --classes"),
        ("--classes 1 --out {run}/no/out.png", "there is no folder"),
        ("--n 0", "--n 0: must be positive"),
        ("--n many", "--n: invalid int value: 'many'"),
        ("--n 3 --classes 1", "--classes and --n: give one of the two"),
        ("", "say what, --classes 207 360 ... or --n 50000"),
        ("--n 3 --target v", "--target: has no use with --sample; the checkpoint decides it"),
        ("--n 3 --depth 2", "--depth: has no use with --sample; the checkpoint decides it"),
        ("--n 3 --vae nowhere", "--vae nowhere: no AutoencoderKLFlux2 there"),
        ("--n 3 --out {run}/run.json", "run.json: is a file; --n writes a folder of images"),
    ],
)
def test_mistakes_in_sampling_are_one_line(sample_run, run, monkeypatch, tmp_path, flags, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*.png"))
    refused(sample_run(*flags.format(run=run).split()), words)
    assert sorted(tmp_path.rglob("*.png")) == before


def test_names_are_refused_where_the_checkpoint_has_none(cli, sampling):
    result = cli(jlt, *sampling("--classes", "bee"))
    refused(result, "--classes bee: give numbers, 0 to 4; the checkpoint knows no names")


def test_a_vae_of_other_latents_is_refused(cli, finished, decoder, tmp_path):
    flags = ["--vae", decoder, "--device", "cpu", "--out", tmp_path / "out.png"]
    result = cli(jlt, "--sample", finished, "--classes", 1, *flags)
    refused(result, f"--vae {decoder}: decodes 128 channels, the network makes 8")


@pytest.mark.parametrize("what", ["--classes 1 --out {base}/out.png", "--n 3 --out {base}/out"])
def test_weights_that_are_not_finite_are_refused(cli, network, decoder, tmp_path, what):
    state = published(network)
    state["model_ema1"]["net.final_layer.linear.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    flags = ["--vae", decoder, "--device", "cpu", *what.format(base=tmp_path).split()]
    result = cli(jlt, "--sample", tmp_path / "nan.pth", "--sample-steps", 1, *flags)
    refused(result, "the sampled latents are not finite", status=1)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    "change, words",
    [
        ("--cfg 1.5", "cfg 2.9 (now 1.5)"),
        ("--interval 0 1", "interval [0.1, 1.0] (now [0.0, 1.0])"),
        ("--sample-steps 3", "sample_steps 2 (now 3)"),
        ("--seed 1", "seed 0 (now 1)"),
        ("--t-eps 0.1", "t_eps 0.05 (now 0.1)"),
        ("--precision bf16", "precision auto (now bf16)"),
        ("--vae {run}", "vae "),
        ("--sample {run}", "weights first EMA (model_ema1) of epoch 199 (now EMA of step 12)"),
        ("--sample {run}", "num_classes 5 (now 3)"),
    ],
)
def test_a_folder_of_other_settings_is_refused(cli, sampling, sampled, run, change, words):
    folder = sampled("--n", 2, out="folder")
    before = files_of(folder)
    change = change.format(run=run).split()
    result = cli(jlt, *sampling("--n", 3, "--out", folder, *change))
    refused(result, f"{folder}: made with other settings: ", words, "give another --out")
    assert files_of(folder) == before


def test_a_folder_with_other_images_is_refused(cli, sampling, tmp_path):
    noise(8, 8).save(tmp_path / "photo.png")
    before = files_of(tmp_path)
    result = cli(jlt, *sampling("--n", 2, "--out", tmp_path))
    refused(result, f"{tmp_path}: holds other files; give another --out")
    assert files_of(tmp_path) == before


def test_damaged_settings_are_refused(cli, sampling, sampled):
    folder = sampled("--n", 1, out="folder")
    (folder / "settings.json").write_text("half")
    refused(cli(jlt, *sampling("--n", 2, "--out", folder)), "settings.json: damaged")


def test_export_takes_a_run_folder(cli, tmp_path):
    refused(cli(jlt, "--export", tmp_path), "ckpt.pt: no such file; --export takes a run folder")


@pytest.mark.parametrize("number", [40, pytest.param(600, marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_read_right_or_refused(
    cli, trained, released, decoder, tmp_path, number
):
    random = np.random.default_rng(number)
    flags = ["--sample-steps", 1, "--vae", decoder, "--device", "cpu", "--classes", 1]
    out = tmp_path / "out.png"
    expected = {}
    for path in (trained / "ckpt.pt", released):
        assert cli(jlt, "--sample", path, *flags, "--out", out)[0] == 0
        expected[path] = out.read_bytes()
        out.unlink()
    refusals = 0
    for i in range(number):
        # Not of ema.safetensors, a format without checksums.
        path = list(expected)[i % 2]
        good = path.read_bytes()
        a, b = sorted(random.integers(0, min(len(good), 10 ** random.integers(1, 8)), 2))
        kinds = [
            good[:a] + bytes([good[a] ^ 1 << random.integers(8)]) + good[a + 1 :],
            good[:a] + good[b + 1 :],
            good[:b] + good[a:],
            good[:a] + bytes(b - a) + good[b:],
        ]
        bad = tmp_path / "bad.pt"
        bad.write_bytes(kinds[random.integers(4)])
        result = cli(jlt, "--sample", bad, *flags, "--out", out)
        if result[0]:
            refused(result, bad, status=result[0])
            refusals += 1
        else:
            assert out.read_bytes() == expected[path]
            out.unlink()
    assert refusals > number / 3


# =============================================================== the README
def test_the_readmes_method_is_that_of_the_file():
    text = (HERE / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    source = (HERE / "jlt.py").read_text()
    lines = [line.strip() for block in blocks[:3] for line in block.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line in source
