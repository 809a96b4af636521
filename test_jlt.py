"""What must hold of JLT, checked from first principles: exact values by hand or in float64,
properties, and the command lines as a user types them. CPU, offline, 90 seconds on two cores:

    pytest
"""

import argparse
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from unittest.mock import Mock

# Before torch is imported: two threads on two busy cores wait for each other more than they work.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import huggingface_hub
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import encode
import fid
import jlt

# A shell may start pytest so that it ignores Ctrl-C. What it starts would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)


# =============================================================== for all
@pytest.fixture
def cli(monkeypatch, capsys):
    """A command line in this process: (module, *arguments) -> exit status, stdout, stderr."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            encode.run_command(module.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        # Python prints a status that is a text, and exits with 1.
        if isinstance(status, str):
            return 1, out, f"{err}{status}\n"
        return status, out, err

    return run


def one_line(result, *words, status=1):
    """Asserts that a program ended with this status and, last on stderr, a line that has all
    `words`, and without a traceback."""
    code, _, err = result
    assert code == status, err
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.split()[0] in ("jlt.py:", "encode.py:", "fid.py:")
    for word in words:
        assert str(word) in line


def files_of(folder):
    """-> {name: bytes} of all files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fill_the_disk(path):
    """The next file that is written to `path` finds the disk full."""
    path.with_name(f".tmp.{path.name}").symlink_to("/dev/full")


class PickledPrint:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("this must not run",)


def noise(width, height, seed=0):
    """-> an RGB image of which no two places are alike."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


# What a camera writes into a picture that is to be turned by 90 degrees.
ON_ITS_SIDE = Image.Exif()
ON_ITS_SIDE[0x0112] = 6


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a small FLUX.2 autoencoder with random weights and BatchNorm statistics."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32))
    autoencoder.bn.running_mean.normal_(0, 0.1)
    autoencoder.bn.running_var.uniform_(0.05, 0.15)
    folder = tmp_path_factory.mktemp("model")
    autoencoder.save_pretrained(folder / "vae")
    return folder / "vae"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of a cache of 600 digits. Its codec encodes photos in no time."""
    folder = tmp_path_factory.mktemp("digits")
    encode.cache_digits(str(folder), n=600)
    return folder


READABLE = [f"{folder}/{i}.png" for folder in "ab" for i in range(5)]
UNREADABLE = ["a/cut.jpg", "b/float.pfm", "b/float.tif", "b/integers.tif", "b/new\nline.png"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The folder фото: ten photos of two classes that can be read, and five that cannot."""
    root = tmp_path_factory.mktemp("photos") / "фото"
    for number, name in enumerate(READABLE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(40 + 9 * number, 50, number).save(root / name, exif=ON_ITS_SIDE)
    noise(99, 99).save(root / "a/cut.jpg")
    os.truncate(root / "a/cut.jpg", 5000)
    Image.new("F", (40, 40)).save(root / "b/float.tif")
    Image.new("F", (40, 40)).save(root / "b/float.pfm")
    Image.new("I", (40, 40)).save(root / "b/integers.tif")
    (root / "b/new\nline.png").write_bytes(b"no picture")
    return root


def start_encoding(*arguments, launcher=(), pause=0):
    """-> a process that runs encode.py with five images in a shard, and so many seconds between two
    shards."""
    program = (
        "import encode, time; encode.SHARD = 5; save = encode.save_shard; "
        f"encode.save_shard = lambda *parts: (save(*parts), time.sleep({pause})); "
        "encode.run_command(encode.main)"
    )
    # A code page without Cyrillic letters.
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(encode.__file__).parent,
        env=environment,
    )


@pytest.fixture(scope="session")
def cache(photos, digits, tmp_path_factory):
    """The photos encoded by the command, five to a shard: its `folder`, the `arguments` but for
    --out, and what it wrote (`out`, `err`)."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    arguments = [photos, "--vae", digits / "codec.safetensors", "--size", 32]
    arguments += ["--batch", 2, "--workers", 1, "--device", "cpu"]
    out, err = start_encoding(*arguments, "--out", folder).communicate(timeout=60)
    return SimpleNamespace(folder=folder, arguments=arguments, out=out, err=err)


# =============================================================== pictures
@pytest.mark.parametrize(
    "width, height, halved, left, top",
    [
        (230, 150, [], 21, 0),  # 123 wide at the end, of which 43 are cut away
        (160, 300, [(80, 150)], 0, 35),  # at exactly twice the size, too
        (750, 321, [(375, 160), (187, 80)], 53, 0),  # a half pixel is dropped
    ],
)
def test_center_crop_is_adms(width, height, halved, left, top):
    image = noise(width, height)
    scaled = image
    for size in halved:
        scaled = scaled.resize(size, Image.BOX)
    scale = 80 / min(scaled.size)
    size = [round(scale * side) for side in scaled.size]
    expected = scaled.resize(size, Image.BICUBIC).crop((left, top, left + 80, top + 80))
    assert encode.center_crop(image, 80) == expected


RGB = noise(20, 30)
GRAY = RGB.convert("L")
PALETTE = RGB.quantize(16)
SIXTEEN = Image.fromarray(np.array([[128, 129, 65406, 65407]], np.uint16))
EIGHT = Image.fromarray(np.array([[0, 1, 254, 255]], np.uint8))
TEXT = PngInfo()
TEXT.add_text("Comment", "long" * 10**6, zip=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, image, options, expected",
    [
        ("cmyk.tif", RGB.convert("CMYK"), {}, RGB),
        ("alpha.png", Image.merge("RGBA", [*RGB.split(), GRAY]), {}, RGB),
        ("bit.png", GRAY.convert("1"), {}, GRAY.convert("1")),
        ("deep.png", SIXTEEN, {}, EIGHT),
        ("deep.tif", SIXTEEN, {}, EIGHT),
        ("deep.pgm", SIXTEEN, {}, EIGHT),
        ("palette.png", PALETTE, {"transparency": bytes(range(16))}, PALETTE),
        ("animated.gif", PALETTE, {"save_all": True, "append_images": [GRAY]}, PALETTE),
        ("long_text.png", RGB, {"pnginfo": TEXT}, RGB),
        ("large_profile.png", RGB, {"icc_profile": bytes(3 * 10**6)}, RGB),
        ("side.png", RGB, {"exif": ON_ITS_SIDE}, RGB),
    ],
)
def test_every_kind_of_picture_is_read_as_rgb(tmp_path, name, image, options, expected):
    image.save(tmp_path / name, **options)
    assert np.array_equal(encode.open_rgb(tmp_path / name), expected.convert("RGB"))


WHOLE = ON_ITS_SIDE.tobytes()


@pytest.mark.parametrize("ending", ["png", "webp", "jpg"])
@pytest.mark.parametrize("exif, turns", [(WHOLE, -1), (WHOLE[:10], 0), (b"Exif\0\0garbage", 0)])
def test_exif_data_turn_a_picture_and_if_damaged_do_not_cost_it(tmp_path, ending, exif, turns):
    path = tmp_path / f"picture.{ending}"
    RGB.save(path, exif=exif)
    stored = Image.open(path).convert("RGB")
    assert np.array_equal(encode.open_rgb(path, upright=True), np.rot90(stored, turns))


def touch(root, names, text=""):
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    "tree, root, classes",
    [
        ("bus/1.png car/a/b/1.png 1.png", "", ["bus", "car"]),
        ("bus/1.png car/1.png train/1.png train/@eaDir/1/1.jpg", "", ["bus", "car", "train"]),
        ("train/bus/1.png train/car/1.png val/bus/1.png", "train", ["bus", "car"]),
        ("bus/1.png @eaDir/1.png __MACOSX/1.png .git/1.png @me/1.png", "", ["@me", "bus"]),
        ("bus/1.png bus/._1.png bus/@eaDir/1.png bus/n.txt empty/n.txt", "", ["bus"]),
        ("bus/1.png dog.png/1.png", "", ["bus", "dog.png"]),
    ],
)
def test_which_folders_are_classes(tmp_path, tree, root, classes):
    touch(tmp_path, tree)
    photos = encode.Photos(tmp_path, 32)
    assert (photos.root, photos.classes) == (tmp_path / root, classes)
    assert len(photos) == len(classes)


def test_folders_of_our_own_are_no_classes_but_others_may_have_a_settings_json(tmp_path):
    touch(tmp_path, "bus/1.png car/1.png a/1.png b/1.png c/1.png")
    for name, text in {
        "a": '{"vae": "flux", "shards": 3}',
        "b": '{"target": "x", "latents": "0f"}',
        "c": '{"cfg": 2.9, "weights": "EMA"}',
        "bus": '{"editor.fontSize": 12}',
        "car": "// no json",
    }.items():
        (tmp_path / name / "settings.json").write_text(text)
    assert encode.Photos(tmp_path, 32).classes == ["bus", "car"]


def test_files_are_listed_through_links_which_may_lead_back(tmp_path):
    touch(tmp_path, "far/b.JPEG far/deep/a.TIFF all/c.webp all/notes.txt")
    (tmp_path / "all/far").symlink_to("../far")
    (tmp_path / "far/deep/up").symlink_to("..")
    files = ["c.webp", "far/b.JPEG", "far/deep/a.TIFF", "notes.txt"]
    assert encode.list_files(tmp_path / "all") == files
    (tmp_path / "far/itself").symlink_to("itself")
    assert len(encode.list_files(tmp_path / "all")) == 5


def test_pictures_are_what_pillow_knows_and_other_files_are_counted(tmp_path):
    touch(tmp_path, "a/1.jfif a/2.jpe b/3.avif b/4.jp2 b/5.TGA why?/6.mpo c/7.jpg?size=large")
    touch(tmp_path, "a/1.mp4 a/2.txt b/3.TXT notes readme.txt")
    photos = encode.Photos(tmp_path, 32)
    assert len(photos) == 7
    assert photos.others == {".mp4": 1, ".txt": 3, "": 1}


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(encode.Stop, match="no regular file"):
        encode.open_rgb(tmp_path / "pipe.png")


def test_floats_become_the_nearest_bytes():
    floats = torch.tensor([-1.2, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1, 3])
    assert encode.to_uint8(floats).tolist() == [0, 0, 1, 255, 255]


# =============================================================== the VAE
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


def as_batch(image):
    """A PIL image -> (1, 3, H, W) in [-1, 1], as diffusers does it."""
    return VaeImageProcessor(vae_scale_factor=16).preprocess(image)


def test_latents_and_pictures_are_those_of_diffusers_pipeline(vae, pipeline):
    # Found in the folder vae of a model.
    model = encode.load_vae(vae.parent)
    autoencoder = model.autoencoder
    assert {(w.dtype, w.requires_grad) for w in autoencoder.parameters()} == {
        (torch.float32, False)
    }
    # All that the method asks of the pipeline.
    theirs = SimpleNamespace(vae=autoencoder, _patchify_latents=pipeline._patchify_latents)
    x = as_batch(noise(48, 32))
    latent = pipeline._encode_vae_image(theirs, x, None)
    assert (model.channels, model.pixels) == (latent.shape[1], 16)
    torch.testing.assert_close(encode.encode(model, x), latent, rtol=1e-5, atol=2e-5)
    # The way the pipeline decodes: normalised by the statistics of the VAE's bn.
    bn = autoencoder.bn
    std = (bn.running_var + autoencoder.config.batch_norm_eps).sqrt()
    latents = latent * std.view(-1, 1, 1) + bn.running_mean.view(-1, 1, 1)
    picture = autoencoder.decode(pipeline._unpatchify_latents(latents)).sample
    torch.testing.assert_close(encode.decode(model, latent), picture, rtol=1e-4, atol=1e-4)


def test_weights_of_another_model_are_refused(vae, tmp_path):
    shutil.copy(vae / "config.json", tmp_path)
    (file,) = vae.glob("*.safetensors")
    weights = {"another." + name: w for name, w in load_file(file).items()}
    save_file(weights, tmp_path / file.name)
    with pytest.raises(encode.Stop, match=f"--vae {tmp_path}: holds the weights of another model"):
        encode.load_vae(tmp_path)


# =============================================================== the cache that the command makes
@pytest.fixture(scope="session")
def codec(digits):
    return encode.load_vae(digits / "codec.safetensors")


def test_a_cache_holds_every_readable_picture_its_mirror_image_and_its_label(cache, photos, codec):
    data = encode.LatentDataset(cache.folder)
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    for i, name in enumerate(READABLE):
        x = as_batch(encode.center_crop(encode.open_rgb(photos / name, upright=True), 32))
        for flip, image in enumerate((x, x.flip(-1))):
            # Half a unit of fp16.
            expected = codec.encode(image)[0]
            latent, label = data[i, flip]
            torch.testing.assert_close(latent.float(), expected, rtol=2**-11, atol=1e-5)
            assert label == (i >= 5)


def test_shards_are_what_the_released_code_reads(cache):
    for path, n in zip(sorted(cache.folder.glob("latents_0000?.*")), (5, 4, 1), strict=True):
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
        latents = ((n, 128, 2, 2), torch.float16)
        assert found == {
            "latents": latents,
            "latents_flip": latents,
            "labels": ((n,), torch.int32),
        }


def test_the_command_says_what_it_found_skipped_and_made(cache):
    first, _, last = cache.out.splitlines()
    start = "\\u0444\\u043e\\u0442\\u043e: 15 files, 2 classes, ['a', 'b'] ...; other files: {}"
    assert first.endswith(start)
    for name in UNREADABLE:
        assert f"skipped {name!a}: " in cache.err
    assert "latents: 10 images and their mirror images; 5 files skipped; channel means -" in last


def test_reconstructions_show_originals_and_what_their_latents_decode_to(cache, photos, codec):
    sheet = encode.from_pil(Image.open(cache.folder / "reconstructions.png"))
    # In the second column stands the third photo.
    original = encode.Photos(photos, 32)[2][0]
    decoded = encode.to_uint8(codec.decode(codec.encode(encode.to_float(original[None]))))[0]
    expected = torch.cat([original, decoded], 1)
    torch.testing.assert_close(sheet[:, :, 32:64], expected, rtol=0, atol=1)


def shard(n=4, shape=(8, 4, 4), dtype=torch.float16):
    """-> the contents of a shard of another program. Labels go down, from n - 1 to 0."""
    return {
        "latents": torch.randn(n, *shape).to(dtype),
        "latents_flip": torch.randn(n, *shape).to(dtype),
        "labels": torch.arange(n).flip(0),
    }


def write_cache(folder, *shards, name="latents_{:05d}"):
    for number, contents in enumerate(shards):
        save_file(contents, folder / f"{name.format(number)}.safetensors")
    return folder


def read_all(data, flip=False):
    """-> all latents of a cache and their labels."""
    latents, labels = zip(*[data[i, flip] for i in range(len(data))], strict=True)
    return torch.stack(latents), torch.stack(labels).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mirrored", [True, False])
def test_caches_of_other_programs_are_read_to_the_bit(tmp_path, dtype, mirrored):
    shards = [shard(n, dtype=dtype) for n in (3, 5, 1)]
    if not mirrored:
        # The picture stands for its mirror image.
        for contents in shards:
            del contents["latents_flip"]
    # The names that the released encoder gives.
    data = encode.LatentDataset(write_cache(tmp_path, *shards, name="latents_rank00_shard{:03d}"))
    assert (*data.shape, data.num_classes, data.class_names) == (8, 4, 4, 5, [])
    for flip, name in enumerate(("latents", "latents_flip" if mirrored else "latents")):
        expected = torch.cat([contents[name] for contents in shards])
        latents, labels = read_all(data, flip)
        assert torch.equal(latents, expected)
        assert labels == [2, 1, 0, 4, 3, 2, 1, 0, 0]


@pytest.mark.parametrize(
    "shards, words",
    [
        ([], "holds no latents_.*; encode.py IMAGES --out"),
        ([shard()], "lacks 1 of 2 shards; the same encode.py command goes on"),
        ([shard()] * 3, "00002.safetensors'. do not belong to it"),
        ([shard(n=0), shard(n=0)], "holds no latents; was no image readable?"),
        ([shard(), shard(shape=(8, 2, 2))], "mixes latents"),
        ([shard(), shard(shape=(8, 4, 2))], "00001.safetensors: no shard of square latents"),
        ([shard(), shard(shape=(8,))], "00001.safetensors: no shard of square latents"),
        ([shard(), shard() | {"labels": torch.zeros(3)}], "; delete it and encode again"),
        ([shard(), shard(dtype=torch.float64)], "no shard of square latents"),
        ([shard() | {"labels": torch.tensor([1, 2, 3, 4])}] * 2, "labels are 1 to 4, not 0 to 4"),
        ([shard() | {"labels": torch.tensor([0, 0, 3, -1])}] * 2, "labels are -1 to 3, not 0 to 3"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(tmp_path, shards, words):
    (write_cache(tmp_path, *shards) / "settings.json").write_text('{"shards": 2}')
    with pytest.raises(encode.Stop, match=f"{tmp_path}.*{words}"):
        encode.LatentDataset(tmp_path)


def test_a_class_with_a_name_may_have_no_picture_but_every_label_has_a_name(tmp_path):
    first = shard() | {"labels": torch.tensor([1, 1, 3, 1])}
    (write_cache(tmp_path, first) / "settings.json").write_text('{"classes": ["a", "b", "c", "d"]}')
    assert encode.LatentDataset(tmp_path).num_classes == 4
    (tmp_path / "settings.json").write_text('{"classes": ["a", "b", "c"]}')
    with pytest.raises(encode.Stop, match="labels are 1 to 3, not 0 to 2"):
        encode.LatentDataset(tmp_path)


@pytest.mark.parametrize("settings", [None, '{"shards": 2}'])
def test_copies_of_shards_are_named(tmp_path, settings):
    write_cache(tmp_path, shard(), shard())
    shutil.copy(tmp_path / "latents_00001.safetensors", tmp_path / "latents_00001 (1).safetensors")
    if settings:
        (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(encode.Stop, match=r"latents_00001 \(1\).safetensors'. do not belong"):
        encode.LatentDataset(tmp_path)


def test_a_damaged_shard_is_one_line_also_from_a_reader(tmp_path):
    data = encode.LatentDataset(write_cache(tmp_path, shard()))
    path = data.paths[0]
    os.truncate(path, 500)
    with pytest.raises(encode.Stop, match=f"{path}: no shard of square latents"):
        encode.LatentDataset(tmp_path)
    for workers in (0, 1):
        with pytest.raises(encode.Stop, match=rf"^{path}: cannot be read \([^\n]*\)\n?$"):
            list(DataLoader(data, sampler=[(0, False)], num_workers=workers))


@pytest.mark.parametrize(
    "sign, status, words", [(signal.SIGINT, 1, "\n-c: interrupted\n"), (signal.SIGKILL, -9, "")]
)
def test_an_interrupted_command_continues_to_the_same_bytes(
    cli, cache, tmp_path, monkeypatch, sign, status, words
):
    first = tmp_path / "latents/latents_00000.safetensors"
    arguments = [*cache.arguments, "--out", first.parent]
    process = start_encoding(*arguments, pause=60)
    for _ in range(6000):
        if first.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    # To all of its processes, as a terminal does.
    os.killpg(process.pid, sign)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err
    assert words in err

    monkeypatch.setattr(encode, "SHARD", 5)
    assert "makes 2 of 3 shards" in cli(encode, *arguments)[1]
    assert files_of(first.parent) == files_of(cache.folder)


def test_two_processes_make_the_same_bytes(cache, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--no-python", sys.executable]
    process = start_encoding(*cache.arguments, "--out", tmp_path / "latents", launcher=launcher)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert files_of(tmp_path / "latents") == files_of(cache.folder)
    # The first process speaks for both.
    assert len(out.splitlines()) == 3


def test_processes_take_shards_by_number_not_by_what_is_missing(cli, cache, tmp_path, monkeypatch):
    out = shutil.copytree(cache.folder, tmp_path / "latents")
    for k in (1, 2):
        (out / f"latents_0000{k}.safetensors").unlink()
    monkeypatch.setattr(encode, "SHARD", 5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(encode, *cache.arguments, "--out", out)[:2] == (0, "")
    last = "latents_00002.safetensors"
    assert set(files_of(cache.folder)) - set(files_of(out)) == {last}
    # The first process waits for the others' shards.
    monkeypatch.setenv("RANK", "0")
    (out / "latents_00001.safetensors").rename(tmp_path / "late")
    comes = mock.Mock(
        side_effect=lambda _: os.rename(tmp_path / "late", out / "latents_00001.safetensors")
    )
    monkeypatch.setattr(time, "sleep", comes)
    assert "10 images" in cli(encode, *cache.arguments, "--out", out)[1]
    assert files_of(out) == files_of(cache.folder)


def test_a_drive_that_fails_stops_the_command_which_then_misses_nothing(
    cli, photos, cache, tmp_path
):
    root = shutil.copytree(photos, tmp_path / "photos")
    picture = (root / "a/3.png").rename(tmp_path / "picture")
    # Whoever reads this gets an Input/output error.
    (root / "a/3.png").symlink_to("/proc/self/mem")
    arguments = [root, *cache.arguments[1:], "--out", tmp_path / "latents"]
    words = [sys.executable, encode.__file__, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    # The reader may have skipped other files since.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("skipped")]
    one_line((result.returncode, "", "\n".join(lines)), "a/3.png: [Errno 5]")
    (root / "a/3.png").unlink()
    picture.rename(root / "a/3.png")
    assert "10 images and their mirror images; 5 files skipped" in cli(encode, *arguments)[1]


def test_a_class_of_which_nothing_can_be_read_is_named(cli, cache, tmp_path):
    for name in "ab":
        touch(tmp_path, f"photos/{name}/none.png")
        noise(40, 40).save(tmp_path / f"photos/{name}/one.png")
    touch(tmp_path, "photos/c/none.png")
    out = tmp_path / "latents"
    assert (
        "in the classes ['c']"
        in cli(encode, tmp_path / "photos", *cache.arguments[1:], "--out", out)[1]
    )
    assert encode.LatentDataset(out).num_classes == 3


def test_a_file_is_replaced_when_it_is_whole_without_a_look_through_its_folder(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "listdir", None)
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(encode.Stop, match=f"{path}: cannot"), encode.replacing(path) as half:
        half.write_text("ne")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    # The same hidden name each time: what a kill leaves is written over.
    with encode.replacing(path) as temporary:
        assert temporary.read_text() == "ne"
        temporary.write_text("new")
    monkeypatch.undo()
    assert half.name.startswith(".")
    assert files_of(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(bytes(9**7))])
def test_a_full_disk_is_one_line_and_what_was_there_is_intact(tmp_path, save):
    path = tmp_path / "file"
    path.write_text("old")
    fill_the_disk(path)
    full = pytest.raises(encode.Stop, match=f"^{path}: cannot be written; is the disk full")
    with full, encode.replacing(path) as temporary:
        save(torch.zeros(9**6), temporary)
    assert path.read_text() == "old"


def test_whoever_may_read_other_files_may_read_caches_and_weights(cache, four_steps):
    for folder in (cache.folder, four_steps):
        modes = {path.stat().st_mode for path in folder.iterdir()}
        assert len(modes) == 1


OWN = {"count": 3, "nested": {"numbers": [0.1, 1.0]}}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"count": 4}, "count 3 .now 4.; give another --out"),
        ({"count": 4, "nested": {}}, "count 3 .now 4., nested {'numbers': .0.1, 1.0.} .now {}."),
        ({"newer": 2}, "newer 1 .now 2."),
    ],
)
def test_a_folder_refuses_other_settings(tmp_path, changed, words):
    folder = tmp_path / "in/a/folder"
    touch(folder, ".tmp.settings.json")
    encode.claim_folder(folder, OWN)
    touch(folder, "another.file")
    # A setting that the folder lacks has its default.
    defaults = {"count": 5, "newer": 1}
    encode.claim_folder(folder, OWN | {"newer": 1}, defaults)
    with pytest.raises(encode.Stop, match=f"{folder}: made with other settings: {words}"):
        encode.claim_folder(folder, OWN | changed, defaults)
    assert encode.read_settings(folder) == OWN


def test_two_processes_with_one_number_do_not_write_into_one_folder(tmp_path, monkeypatch):
    program = (
        "import encode, os, pathlib, time; "
        f"encode.claim_folder(pathlib.Path({str(tmp_path / 'out')!r}), dict(a=1)); "
        "os.fork() and print('claimed', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout.readline() == "claimed\n"
    with pytest.raises(encode.Stop, match=f"{tmp_path}/out: another process writes here"):
        encode.claim_folder(tmp_path / "out", {"a": 1})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    encode.claim_folder(tmp_path / "out", {"a": 1})
    # A child that lives on, as readers do for some seconds, is in nobody's way.
    first.kill()
    first.wait()
    monkeypatch.setenv("RANK", "0")
    encode.claim_folder(tmp_path / "out", {"a": 1})
    os.killpg(first.pid, signal.SIGKILL)


def test_no_process_waits_for_another_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PATIENCE", 0.3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        encode.Stop, match=r"out/settings\.json: another process has not written it"
    ):
        encode.claim_folder(tmp_path / "out", {})


def test_damaged_settings_are_one_line(tmp_path):
    touch(tmp_path, "settings.json")
    with pytest.raises(encode.Stop, match=f"^{tmp_path}/settings.json: damaged"):
        encode.LatentDataset(write_cache(tmp_path, shard()))


@pytest.mark.parametrize(
    "rank, world, expected",
    [("", "", (0, 1)), ("0", "1", (0, 1)), ("3", "4", (3, 4))]
    + [(*pair, None) for pair in (("", "2"), ("1", ""), ("2", "2"), ("x", "2"), ("0", "two"))],
)
def test_a_launcher_says_both_numbers_or_none(monkeypatch, rank, world, expected):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    if expected:
        assert encode.processes() == expected
    else:
        with pytest.raises(encode.Stop, match=f"RANK={rank} WORLD_SIZE={world}: .* torchrun"):
            encode.processes()


@pytest.mark.parametrize("local, gpu", [("", 0), ("3", 3)])
def test_processes_of_a_machine_share_its_gpus_and_cores(monkeypatch, local, gpu):
    for name, value in {
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": "8",
        "RANK": "9",
        "WORLD_SIZE": "32",
    }.items():
        monkeypatch.setenv(name, value)
    picked = mock.Mock()
    monkeypatch.setattr(torch.cuda, "set_device", picked)
    monkeypatch.setattr(torch, "ones", mock.Mock())
    assert encode.pick_device("cuda") == torch.device("cuda", gpu)
    picked.assert_called_once_with(torch.device("cuda", gpu))
    monkeypatch.setattr(encode, "cores", lambda: 96)
    monkeypatch.setattr(sys, "argv", ["encode.py", "images"])
    assert encode.read_flags().workers == 12


def test_a_folder_of_a_vae_is_kept_in_full_and_a_repository_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "flux/config.json")
    assert encode.full_path("flux") == str(tmp_path / "flux")
    assert encode.full_path("nobody/flux") == "nobody/flux"
    assert from_flags("--vae flux").vae == str(tmp_path / "flux")


@pytest.mark.parametrize(
    "error, line",
    [
        (encode.Stop("a:\n  wrong"), "a: wrong\n"),
        (KeyboardInterrupt(), "interrupted\n"),
        (PermissionError(13, "Permission denied", "a"), "[Errno 13] Permission denied: 'a'\n"),
        (ConnectionResetError(104, "Connection reset"), "a process that reads was killed"),
        (EOFError(), "a process that reads was killed"),
        (
            RuntimeError(
                "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible"
            ),
            "a process that reads was killed",
        ),
        (
            RuntimeError("Caught\nunable to allocate shared memory(shm) for file </torch_1_2_3>"),
            "a process that reads was killed, or had no memory: try fewer --workers",
        ),
        (torch.OutOfMemoryError("CUDA"), "out of memory; lower --batch"),
    ],
)
def test_mistakes_are_one_line(cli, error, line):
    main = mock.Mock(side_effect=error)
    status, _, err = cli(SimpleNamespace(__name__="folder/program", main=main))
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"program.py: {line}")


@pytest.mark.parametrize("error", [ValueError(), RuntimeError("Caught ValueError in DataLoader")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)):
        encode.run_command(mock.Mock(side_effect=error))


def test_a_closed_output_is_one_line_and_a_notebooks_is_no_error(monkeypatch):
    program = "import encode; encode.run_command(lambda: [print('line') for _ in range(10**6)])"
    command = f'{sys.executable} -c "{program}" | head -1'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("line\n", "-c: nobody reads the output any more\n")
    monkeypatch.setattr(sys, "stdout", SimpleNamespace())
    assert encode.run_command(lambda: 5) == 5


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("Bad magic. And more"), r"^a: no zip \(Bad magic\)$"),
        (RuntimeError("long" * 100), r"^a: no zip \((long){50}\)$"),
        (EOFError(), r"^a: no zip \(EOFError\)$"),
        (encode.Stop("b: of another kind"), "^b: of another kind$"),
    ],
)
def test_it_is_explained_what_went_wrong(error, line):
    with pytest.raises(encode.Stop, match=line), encode.stop_on_error("a", "no zip"):
        raise error


def test_a_killed_reader_is_no_trouble_of_the_file_at_hand():
    killed = RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
    with pytest.raises(RuntimeError), encode.stop_on_error("log.jsonl", "cannot be written"):
        raise killed


def test_a_gpu_that_is_not_there_is_not_picked(monkeypatch):
    # As a build for CUDA says it on a machine without.
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: cuda)
    assert encode.pick_device() == torch.device("cpu")


def test_digits_are_the_same_everywhere_and_of_all_classes_in_turn():
    images, labels = encode.draw_digits(12, seed=5)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    # Across the eight, in blue: three edges of its stroke.
    row = images[8, 2, 20, 12:20].tolist()
    assert row == pytest.approx([134, 2, 2, 2, 2, 2, 38, 196], abs=1)


def test_a_cache_of_digits_is_read_like_any_other(digits, codec):
    before = files_of(digits)
    encode.cache_digits(digits, n=30)
    assert files_of(digits) == before

    data = encode.LatentDataset(digits)
    images = encode.to_float(encode.draw_digits(600, seed=1)[0])
    latents = read_all(data)[0].float()
    torch.testing.assert_close(latents, codec.encode(images), rtol=2**-10, atol=1e-4)
    # A digit is not mirrored.
    assert torch.equal(data[3, True][0], data[3, False][0])
    # The codec is an orthonormal projection onto the directions of large variance.
    again = codec.encode(codec.decode(latents))
    torch.testing.assert_close(again, latents, rtol=0, atol=1e-3)
    variances = latents.var((0, 2, 3))
    assert variances[0] > 100 * variances[127]
    assert variances.mean().item() == pytest.approx(1, abs=0.01)


def test_rows_of_digits_are_labelled_and_enlarged():
    images, _ = encode.draw_digits(40, seed=5)
    picture = encode.labelled_rows({"real": images[:20], "predicts x": images[20:]})
    assert torch.equal(picture[:, 2::3, 171::3], encode.image_grid(images, columns=10))
    assert (picture[0, 192:, :170] < 128).sum() > 500


@pytest.mark.parametrize(
    "line, status, words",
    [
        ("", 2, "arguments are required: images"),
        ("few --batch 0", 2, "--batch: invalid positive value: '0'"),
        ("few --workers -1", 2, "--workers: invalid natural value: '-1'"),
        ("few --siz 64", 2, "unrecognized arguments: --siz 64"),
        ("nowhere", 1, "nowhere: no images in class folders; arrange them as CLASS/image.jpg"),
        ("few --device tpu", 1, "--device tpu: not on this machine, which has"),
        ("few --vae nobody/no-such-vae", 1, "--vae nobody/no-such-vae: no AutoencoderKLFlux2"),
        ("few --vae few", 1, "few: no AutoencoderKLFlux2 there; to fetch one: hf download"),
        ("few --vae few/codec.safetensors", 1, "No such file or directory: few/codec.safetensors"),
        ("few --vae {codec} --size 40", 1, "--size 40: no multiple of 16"),
        ("few --vae {codec} --out file", 1, "File exists: 'file'"),
        ("few --vae {codec} --out few", 1, "few: has files, but no settings.json; give another"),
        ("few --vae {codec} --out out", 1, "made with other settings: size 32 (now 256); give"),
        ("few --vae {vae} --size 32 --out out", 1, "settings: vae {codec} (now {vae}); give "),
        (". --vae {codec} --size 32 --out out", 1, "made with other settings: files "),
    ],
)
def test_a_mistake_is_one_line(
    cli, photos, cache, digits, vae, tmp_path, monkeypatch, line, status, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode, "SHARD", 5)
    shutil.copytree(photos, "few")
    shutil.copytree(cache.folder, "out")
    Path("file").touch()
    before = sorted(tmp_path.rglob("*"))
    names = {"codec": digits / "codec.safetensors", "vae": vae}
    code, _, err = cli(encode, *line.format(**names).split())
    assert (code, err.strip().count("\n")) == (status, 0), err
    assert words.format(**names) in err
    assert sorted(tmp_path.rglob("*")) == before


# =============================================================== score
# ---------------------------------------------------------------- resize
@pytest.mark.parametrize(
    "size, digest", [((7, 33), "1c0c997f5aa18d41"), ((301, 611), "f582b4f3a8af683f")]
)
def test_resize_is_tensorflows_bit_for_bit(size, digest):
    """torch-fidelity 0.4.0 has these, interpolate_bilinear_2d_like_tensorflow1x and scaled."""
    images = np.random.default_rng(1).integers(0, 256, (1, 3, *size), dtype=np.uint8)
    resized = fid.tf_resize(torch.from_numpy(images)).contiguous()
    assert encode.digest(resized.numpy().tobytes()) == digest


def test_images_of_another_type_are_refused():
    with pytest.raises(encode.Stop, match="uint8"):
        fid.tf_resize(torch.zeros(2, 3, 8, 8))


# ---------------------------------------------------------------- the network
@pytest.fixture(scope="session")
def weights():
    """A random state dict under which activations neither die nor explode."""
    # A network that is given none, for its names and shapes.
    with mock.patch.multiple(fid.Inception, load_state_dict=mock.DEFAULT):
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        shapes = {name: tuple(x.shape) for name, x in fid.Inception(empty).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in sorted(shapes):
        x = torch.randn(shapes[name], generator=generator)
        state[name] = 0.1 * x
        if name.endswith("conv.weight"):
            state[name] = x * (2 / x[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "bn.running_var")):
            state[name] = (1 + 0.2 * x).clamp(min=0.3)
    return state


def switches():
    names = ("allow_tf32", "enabled", "benchmark", "deterministic")
    return {name: getattr(torch.backends.cudnn, name) for name in names}


@pytest.fixture(scope="session")
def one_pass(weights, tmp_path_factory):
    """One pass of two images through a new network, and the process's switches before, inside and
    after."""
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    # As the real file is.
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 20, 31), dtype=torch.uint8, generator=generator)
    seen = [switches()]
    net = fid.Inception(path)
    hook = net.Mixed_7a.register_forward_hook(lambda *_: seen.append(switches()))
    features, logits = net(images)
    hook.remove()
    seen.append(switches())
    return SimpleNamespace(net=net, images=images, features=features, logits=logits, seen=seen)


def test_the_network_is_that_of_torch_fidelity(one_pass, weights):
    """Its FeatureExtractorInceptionV3 (version 0.4.0) has tensors of these names and shapes and,
    with these weights and images, gave these features and logits (without the bias)."""
    shapes = sorted((name, tuple(x.shape)) for name, x in weights.items())
    digest = "d1c9a52dc8072dcb7e0b68516f97ca745d703c7a19a5e36e1037e47adfdb0487"
    assert hashlib.sha256(repr(shapes).encode()).hexdigest() == digest
    features = [
        [0.288912, 0.360311, 0.034087, 1.050620, 0.859340, 1.501612, 0.001435, 0.449443],
        [0.353980, 0.344943, 0.048826, 1.056633, 0.846407, 1.454723, 0.006883, 0.462970],
    ]
    logits = [
        [1.476565, 0.277085, -9.706324, -3.229227, 13.026404, 5.963418, 1.099218, 11.294584],
        [1.501699, 0.472557, -10.126723, -3.609482, 13.034040, 5.708123, 0.813080, 11.437288],
    ]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(one_pass.features[:, ::256], torch.tensor(features))
    close(one_pass.logits[:, ::126], torch.tensor(logits))


def test_tf32_is_off_inside_and_as_it_was_outside(one_pass):
    before, inside, after = one_pass.seen
    assert before["allow_tf32"] is True
    assert inside == before | {"allow_tf32": False}
    assert after == before


# ---------------------------------------------------------------- weights
def test_weights_in_the_new_format(weights, tmp_path):
    torch.save(weights, tmp_path / "w.pth")
    assert torch.equal(fid.Inception(tmp_path / "w.pth").fc.bias, weights["fc.bias"])


@pytest.mark.parametrize("contents", [{}, PickledPrint()])
def test_other_files_of_weights_are_refused(sets, cli, tmp_path, contents):
    path = tmp_path / "w.pth"
    torch.save(contents, path)
    one_line(cli(fid, sets / "photos.npz", "--weights", path), path, fid.URL, "--weights")


def test_weights_are_downloaded_with_their_hash_checked(weights, sets, cli, monkeypatch):
    download = mock.Mock(return_value=weights)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    assert torch.equal(fid.Inception().fc.bias, weights["fc.bias"])
    (url,) = download.call_args.args
    assert url.endswith("fid_weights/pt_inception-2015-12-05-6726825d.pth")
    assert download.call_args.kwargs.items() >= {"check_hash": True, "weights_only": True}.items()

    download.side_effect = OSError("<urlopen error [Errno -2] Name or service not known>")
    one_line(cli(fid, sets / "photos.npz"), url, "--weights", "not known")


# ---------------------------------------------------------------- Frechet distance
def random_covariance(seed):
    root = np.random.default_rng(seed).normal(size=(12, 12))
    return root @ root.T


def test_distance_in_closed_form():
    a, b = np.random.default_rng(4).uniform(size=(2, 12))
    sigma1 = random_covariance(1)
    sigma2 = random_covariance(2)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    # As of fewer images than dimensions; rounding may make eigenvalues barely below 0.
    singular = np.diag(4 * np.eye(12)[0] - 1e-15)
    cases = [
        (sigma1, sigma1, 0),
        (np.diag(a), np.diag(b), ((a**0.5 - b**0.5) ** 2).sum()),
        # These two do not commute.
        (sigma1, sigma2, np.trace(sigma1 + sigma2 - 2 * root)),
        (singular, np.eye(12), 4 + 12 - 2 * 2),
        (np.eye(12), singular, 4 + 12 - 2 * 2),
    ]
    for one, other, expected in cases:
        distance = fid.frechet_distance(np.full(12, 3), one, np.ones(12), other)
        assert distance == pytest.approx(expected + 12 * 2**2, rel=1e-9)


# ---------------------------------------------------------------- Inception Score
def test_score_of_certainty_is_the_number_of_classes():
    # Probabilities too small for a float: all but one of an image, all of the sixth class.
    certain = F.pad(torch.eye(5).repeat(20, 1) * 2000, (0, 1))
    assert fid.inception_score(certain, splits=1) == pytest.approx((5, 0))


def test_the_score_is_that_of_torch_fidelity():
    """53 images in the order of their classes, which are shuffled. Version 0.4.0 gave this."""
    generator = np.random.default_rng(5)
    labels = np.sort(generator.integers(0, 6, 53))
    logits = torch.from_numpy(generator.normal(size=(53, 6)) + 4 * np.eye(6)[labels]).float()
    expected = (2.3319490672145236, 0.3334467915022)
    assert fid.inception_score(logits) == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize("sizes", [[1] * 157, [5, 41, 111]])
def test_statistics_do_not_depend_on_batches(sizes):
    x = np.random.default_rng(6).normal(size=(157, 12)) * np.arange(1, 13) + 1e6
    statistics = fid.Statistics(dim=12)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        statistics.update(torch.from_numpy(batch))
    assert statistics.n == 157
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.cov, np.cov(x.T), rtol=1e-8, atol=1e-8)


def test_features_that_are_not_finite_are_refused():
    statistics = fid.Statistics(dim=2)
    with pytest.raises(encode.Stop, match="NaN"):
        statistics.update(np.array([[1, np.nan]]))
    assert statistics.n == 0


# ---------------------------------------------------------------- files
class StandIn(nn.Module):
    """A quick network whose features and logits are means of pixels. It remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.seen = []

    def forward(self, images):
        self.seen.append(images.cpu())
        means = F.adaptive_avg_pool2d(images / 16, 4).flatten(1)  # (B, 48)
        return means, means


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a StandIn where the command makes its network from w.pth; batches of five images."""
    net = StandIn()
    monkeypatch.setattr(fid, "Inception", lambda weights: {"w.pth": net}[str(weights)])
    monkeypatch.setattr(fid, "BATCH", 5)
    monkeypatch.setattr(fid, "FEATURES", 48)
    monkeypatch.setattr(fid, "CLASSES", 48)
    monkeypatch.setattr(fid, "Statistics", functools.partial(fid.Statistics, 48))
    return net


def random_images(n, height, width, seed=0):
    """-> uint8 (n, H, W, 3), brighter and darker ones."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return images // generator.integers(1, 9, (n, 1, 1, 1), dtype=np.uint8)


def save_images(folder, images, first=0):
    """Writes 000.png and so on."""
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images, first):
        Image.fromarray(image).save(folder / f"{i:03d}.png", exif=ON_ITS_SIDE)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of sets of images and of files that are none."""
    root = tmp_path_factory.mktemp("sets")
    # 24 images, in a folder, some of them by a link, and as an npz.
    images = random_images(24, 24, 40)
    np.savez(root / "samples.npz", arr_0=images)
    save_images(root / "samples", images[:20])
    save_images(root / "elsewhere", images[20:], first=20)
    (root / "samples" / "link").symlink_to(root / "elsewhere")
    photos = random_images(24, 24, 40, seed=1) // 2
    np.savez(root / "photos.npz", arr_0=photos)
    # Of two sizes, in batches of one size each.
    save_images(root / "mixed", random_images(5, 33, 21))
    save_images(root / "mixed", random_images(5, 16, 50), first=5)

    (root / "text.txt").write_text("no zip")
    np.savez(root / "few.npz", arr_0=images[:9])
    np.savez(root / "float.npz", arr_0=images / 255)
    np.savez(root / "code.npz", arr_0=[PickledPrint()])
    np.savez(root / "dino.npz", mu=np.zeros(768), sigma=np.eye(768))
    np.savez(root / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    return root


@pytest.mark.parametrize(("prefix", "n"), [("", {"n": 50_000}), ("ref_", {})])
def test_reference_files(tmp_path, prefix, n):
    mu = np.arange(2048, dtype=np.float32)
    sigma = np.eye(2048)
    # As in ADM's file, with images beside; these cannot be read, and must not be.
    arrays = {f"{prefix}mu": mu, f"{prefix}sigma": sigma, "arr_0": [PickledPrint()]}
    np.savez(tmp_path / "adm.npz", **arrays, **n)
    reference = fid.read_statistics(tmp_path / "adm.npz")
    assert np.array_equal(reference.mean, mu)
    assert np.array_equal(reference.cov, sigma)
    assert reference.n == n.get("n")


def test_one_batch_is_read_ahead_and_no_more(stand_in):
    images = mock.MagicMock()
    images.__len__.return_value = 23
    images.__getitem__.side_effect = int
    batches = fid.batches(images)
    assert next(batches) == [0, 1, 2, 3, 4]
    time.sleep(0.3)
    assert images.__getitem__.call_count == 10
    assert [i for batch in batches for i in batch] == [*range(5, 23)]


# ---------------------------------------------------------------- the command line
@pytest.fixture
def score(cli, sets, monkeypatch):
    """fid.py in the folder of sets, with the stand-in's weights."""
    monkeypatch.chdir(sets)
    return functools.partial(cli, fid, "--weights", "w.pth")


def images_in(name):
    """-> an npz's images as the network gets them."""
    return torch.from_numpy(np.load(name)["arr_0"]).permute(0, 3, 1, 2)


def warnings_in(err):
    return [line for line in err.splitlines() if line.startswith("fid.py: ")]


def test_folder_against_npz(score, stand_in):
    status, out, err = score("samples", "photos.npz")
    assert status == 0, err
    images = images_in("samples.npz")
    photos = images_in("photos.npz")
    assert torch.equal(torch.cat(stand_in.seen), torch.cat([photos, images]))

    x, logits = stand_in(images.double())
    y, _ = stand_in(photos.double())
    distance = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    mean, deviation = fid.inception_score(logits)
    scores = f"FID {distance:.3f} | Inception Score {mean:.2f} +- {deviation:.2f}"
    assert out == f"{scores} | n = 24 (samples) against n = 24 (photos.npz)\n"
    # Progress, and one warning.
    assert "samples: 100%" in err
    (warning,) = warnings_in(err)
    assert "24 images" in warning


def test_saved_statistics_are_a_reference(score, stand_in, tmp_path):
    # A name that np.savez would add .npz to.
    path = tmp_path / "saved.stats"
    status, out, _ = score("samples", "--save", path)
    assert status == 0
    assert [path] == list(tmp_path.iterdir())
    with np.load(path, allow_pickle=False) as saved:
        assert (saved["mu"].dtype, saved["sigma"].dtype) == (np.float32, np.float64)
        assert "samples --save" in str(saved["source"])
    fill_the_disk(tmp_path / "full.npz")
    result = score("samples", "--save", tmp_path / "full.npz")
    one_line(result, "full.npz: cannot be written")
    assert "Inception Score" in result[1]
    _, out, _ = score("samples.npz", path)
    distance = float(out.split()[1])
    assert distance == pytest.approx(0, abs=1e-2)
    assert "against n = 24" in out


@pytest.mark.parametrize(("n", "m", "lines"), [(50_000, 0, 0), (49_999, 0, 1), (50_000, 7, 1)])
def test_fewer_than_50_000_images_are_one_warning(
    score, stand_in, monkeypatch, tmp_path, n, m, lines
):
    mean = np.zeros(48)
    cov = np.eye(48)
    measured = SimpleNamespace(n=n, mean=mean, cov=cov), torch.zeros(10, 1)
    monkeypatch.setattr(fid, "measure", lambda *_: measured)
    np.savez(tmp_path / "s.npz", mu=mean, sigma=cov, n=m)
    _, out, err = score("photos.npz", tmp_path / "s.npz")
    assert f"against n = {m or 'unknown'}" in out
    assert len(warnings_in(err)) == lines


@pytest.mark.parametrize(("n", "width"), [(23, 40), (24, 39)])
def test_sets_that_differ_are_one_warning(score, stand_in, tmp_path, n, width):
    np.savez(tmp_path / "photos.npz", arr_0=random_images(n, 24, width))
    _, _, err = score("samples", tmp_path / "photos.npz")
    (differ,) = [line for line in warnings_in(err) if "differ" in line]
    assert f"(24, (24, 40, 3)) and ({n}, (24, {width}, 3))" in differ


def test_size_crops_and_turns_as_encode_does(score, sets, stand_in):
    score("mixed", "mixed", "--size", 16)
    files = sorted((sets / "mixed").iterdir())
    # Their EXIF data ask for a turn of 90 degrees.
    turned = [Image.open(path).rotate(-90, expand=True) for path in files]
    crops = [np.array(encode.center_crop(image, 16)) for image in turned]
    assert np.array_equal(torch.cat(stand_in.seen).permute(0, 2, 3, 1), crops + crops)


def test_a_reference_of_several_sizes_is_refused_before_the_samples(score, stand_in):
    code, out, err = score("samples", "mixed")
    assert (code, out) == (1, "")
    assert "mixed: holds images of several sizes; crop them with --size" in err
    assert [images.shape for images in stand_in.seen] == [(5, 3, 33, 21)]


def test_unreadable_picture_is_refused_by_name(score, stand_in, tmp_path):
    save_images(tmp_path, random_images(12, 60, 60))
    path = tmp_path / "007.png"
    path.write_text("not a picture")
    code, out, err = score(tmp_path, "--size", 16)
    assert (code, out) == (1, "")
    assert f"{path}: unreadable" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("missing", "missing: give a folder"),
        ("text.txt", "text.txt: give a folder"),
        ("float.npz", "float.npz: arr_0 is float64"),
        ("code.npz", "allow_pickle"),
        ("few.npz", "few.npz: 9 images"),
        ("dino.npz samples", "statistics goes second"),
        ("samples.npz --size 16", "--size"),
        ("samples text.txt", "mu and sigma"),
        ("samples dino.npz", "dino.npz: mu (768,)"),
        ("samples nan.npz", "nan.npz: mu or sigma hold NaN"),
        ("samples few.npz", "few.npz: 9 images"),
        ("samples --save dino.npz", "dino.npz: exists already"),
        ("samples --save nowhere/x.npz", "no such folder"),
    ],
)
def test_mistakes_are_one_line_before_the_network_runs(score, monkeypatch, arguments, words):
    monkeypatch.setattr(fid, "Inception", None)
    one_line(score(*arguments.split()), words)


@pytest.mark.parametrize("flag", ["--frobnicate", "--size=0"])
def test_flags_that_are_none(score, flag):
    one_line(score("samples", flag), flag.split("=")[0], status=2)


every_target = pytest.mark.parametrize("target", jlt.TARGETS)


def from_flags(line):
    """-> the settings of this command line."""
    return jlt.read_flags(line.split())[0]


def normals(*shape):
    """The same normal numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# =============================================================== path, readouts and loss
# The floor of 0.05 holds at both ends.
TIMES = torch.tensor([0, 0.02, 0.3, 0.7, 0.97, 1]).double()
X, EPS, OUT = normals(3, 6, 8, 4, 4).double()
CLASSES = torch.arange(6)
PERFECT = {"x": X, "eps": EPS, "v": X - EPS}


def loss_of(out, *settings):
    return jlt.flow_loss(Mock(return_value=out), X, CLASSES, TIMES, EPS, *settings)


@every_target
def test_on_the_path_that_the_network_sees_perfect_outputs_mean_the_velocity(target):
    net = Mock(return_value=OUT)
    jlt.flow_loss(net, X, CLASSES, TIMES, EPS, target)
    z, *others = net.call_args.args
    assert others == [TIMES, CLASSES]  # the same tensors
    assert_close(z[2], 0.3 * X[2] + 0.7 * EPS[2])
    v = jlt.velocity(PERFECT[target], z, TIMES, target)
    assert_close(v[2:4], PERFECT["v"][2:4])  # where no floor holds


@every_target
@pytest.mark.parametrize("t_eps", [0.05, 0.5])
@pytest.mark.parametrize("loss", jlt.TARGETS)
def test_the_loss_is_the_error_of_the_velocity_times_a_factor(target, t_eps, loss):
    # v has no divisor: for target v and loss v the floor does nothing.
    divisor = {"x": (1 - TIMES).clamp(min=t_eps), "eps": TIMES.clamp(min=t_eps), "v": 1}
    error = (OUT - PERFECT[target]).square().mean((1, 2, 3))
    expected = error / divisor[target] ** 2 * divisor[loss] ** 2
    assert_close(loss_of(OUT, target, t_eps, loss), expected)
    assert not loss_of(PERFECT[target], target, t_eps, loss).any()


def test_the_loss_is_a_pure_function_with_the_papers_defaults():
    assert torch.equal(loss_of(OUT), loss_of(OUT, "x", 0.05, "v"))
    assert jlt.velocity.__defaults__ == (0.05,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: loss_of(OUT, "flow"),
        lambda: loss_of(OUT, "x", 0.05, "flow"),
        lambda: jlt.velocity(OUT, X, TIMES, "flow"),
        lambda: jlt.sample(Mock(num_classes=7), CLASSES, X, "flow"),
    ],
)
def test_an_unknown_target_or_loss_is_an_error_that_lists_those_there_are(call):
    with pytest.raises(ValueError, match=r"'flow' .*('x', 'eps', 'v')"):
        call()


# =============================================================== the sampler
# For Gaussian data of these variances, one for each channel, E[target | z] is known.
VARIANCES = torch.logspace(-2, 1, 8).view(8, 1, 1)


def follow_field(target, steps, **settings):
    def best(z, t, y):
        gains = jlt.gaussian_gain(VARIANCES, t.view(-1, 1, 1, 1))
        return z * gains["xv".index(target)]

    net = Mock(num_classes=7, side_effect=best)
    return jlt.sample(net, CLASSES, EPS, target, steps, cfg=1, **settings)


def test_the_sampler_converges_with_the_order_of_heun_on_a_known_field():
    fields = [follow_field("v", steps) for steps in (100, 200)]
    coarse, fine = [(z - VARIANCES.sqrt() * EPS).abs().max() for z in fields]
    assert (coarse / fine).log2() == pytest.approx(2, abs=0.2)


def test_x_and_v_sample_alike_from_perfect_answers():
    assert_close(follow_field("x", 40, t_eps=1e-9), follow_field("v", 40))


def test_the_floor_leaves_a_trace_of_noise_after_50_steps_with_a_perfect_x():
    z = jlt.sample(Mock(num_classes=7, return_value=1), CLASSES, torch.zeros(6, 1, 1, 1))
    assert 1 - z[0].item() == pytest.approx(0.017, abs=5e-4)


def probe(**settings):
    """Samples two images of five channels from noise 0 with a network that answers 3 with a class
    and 1 without.
    -> the times at which it is asked with classes (0 is one, too) and without, and the samples"""
    times = {(5, 0): [], (7, 7): []}

    def answer(z, t, y):
        times[tuple(y.tolist())].append(t[0].item())
        return torch.where(y == 7, 1, 3).view(-1, 1, 1, 1)

    noise = torch.zeros(2, 5, 1, 1).double()
    z = jlt.sample(
        Mock(num_classes=7, side_effect=answer), torch.tensor([5, 0]), noise, "v", **settings
    )
    return *times.values(), z.flatten().tolist()


def test_50_steps_take_187_calls_and_99_at_weight_1():
    assert [*map(len, probe()[:2])] == [99, 88]
    assert [*map(len, probe(cfg=1)[:2])] == [99, 0]


def test_heun_looks_at_both_ends_of_a_step_but_the_last_is_eulers():
    assert probe(steps=4)[0] == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


# With 30, 60, ... steps, linspace in float32 is above 0.1 at a tenth of the way.
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 60, 90, 130, 250])
@pytest.mark.parametrize("low, high", [(0.1, 1), (0.3, 0.7), (0.2, 0.6)])
def test_guidance_is_off_at_exactly_low_and_high_and_on_between(steps, low, high):
    times, guided, _ = probe(steps=steps, interval=(low, high))
    inside = range(round(low * steps) + 1, round(high * steps))
    assert guided == [t for t in times if round(t * steps) in inside]


def test_the_guided_velocity_by_hand_and_a_low_of_0_includes_0():
    # Of two steps the first begins guided by 2.9 and ends without; the second has one velocity.
    z = probe(steps=2, interval=(0, 0.5))[2]
    assert z == pytest.approx([((1 + 2.9 * (3 - 1) + 3) / 2 + 3) / 2] * 10)


def test_bfloat16_networks_are_integrated_in_float32():
    # A quarter each of the first two, half of the third: bfloat16 could not hold the sum.
    net = Mock(num_classes=7, side_effect=torch.tensor([1, 1 + 2**-7, 1]).bfloat16())
    z = jlt.sample(net, CLASSES[:1], torch.zeros(1, 1, 1, 1), "v", 2, cfg=1)
    assert z.item() == 1 + 2**-9


# =============================================================== why x
def test_gaussian_risks_and_gains_by_hand():
    # z has the variance 0.36 * 4 + 0.16 = 1.6 in the first direction; the second is noise alone.
    # Risks in the first: 4 * 0.16 / 1.6, 4 * 0.36 / 1.6 and 4 / 1.6; R_v is R_x / (1 - t)^2.
    risks = {"x": 0.2, "eps": 0.45, "v": 0.2 / 0.16}
    assert jlt.gaussian_risk([4, 0], 0.6) == pytest.approx(risks)
    # 0.6 * 4 / 1.6, and (0.6 * 4 - 0.4) / 1.6.
    assert jlt.gaussian_gain(4, 0.6) == pytest.approx((1.5, 1.25))
    assert jlt.gaussian_gain(0, 0.6) == pytest.approx((0, -2.5))


def test_the_participation_ratio_by_hand():
    # (3 + 1)^2 / (9 + 1).
    assert jlt.participation_ratio([3, 1]) == pytest.approx(1.6)


def test_the_spectrum_is_that_of_the_covariance_of_all_tokens():
    # Twelve of sixteen channels are copies: rounding may leave eigenvalues below 0.
    latents = normals(70, 4, 2, 2).repeat(1, 4, 1, 1)
    rows = latents.permute(0, 2, 3, 1).reshape(280, 16)
    assert torch.equal(jlt.positions(latents), rows)
    lam = jlt.spectrum(SimpleNamespace(some=lambda most: latents))
    assert_close(lam, torch.linalg.eigvalsh(rows.T.double().cov()).flip(0))
    assert lam.min() >= 0


# =============================================================== the network
# For latents (8, 4, 4) of 6 classes. New, it answers 0; with random numbers for all parameters, no
# zero hides a path.
tiny_jlt = partial(jlt.JLT, 4, in_channels=8, hidden_size=32, depth=2, num_heads=2, num_classes=6)


def random_jlt(scale=0.3, **changes):
    torch.manual_seed(0)
    net = tiny_jlt(**changes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=scale)
    return net


# What it is given: z, t and y.
GIVEN = (X.float(), TIMES.float(), CLASSES)


@pytest.mark.parametrize(
    "name, parameters", [("B/1", 130_508_672), ("L/1", 458_090_592), ("H/1", 951_293_120)]
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    config = from_flags(f"--model {name}")
    with torch.device("meta"):
        net = jlt.JLT(16, 1, 128, config.hidden_size, config.depth, config.num_heads)
    assert sum(p.numel() for p in net.parameters()) == parameters


RELEASED = """
x_embedder.proj.weight (768, 128, 1, 1)
x_embedder.proj.bias (768,)
t_embedder.mlp.0.weight (768, 256)
t_embedder.mlp.0.bias (768,)
t_embedder.mlp.2.weight (768, 768)
t_embedder.mlp.2.bias (768,)
y_embedder.embedding_table.weight (1001, 768)
blocks.0.norm1.weight (768,)
blocks.0.attn.qkv.weight (2304, 768)
blocks.0.attn.qkv.bias (2304,)
blocks.0.attn.proj.weight (768, 768)
blocks.0.attn.proj.bias (768,)
blocks.0.attn.q_norm.weight (64,)
blocks.0.attn.k_norm.weight (64,)
blocks.0.norm2.weight (768,)
blocks.0.mlp.w12.weight (4096, 768)
blocks.0.mlp.w12.bias (4096,)
blocks.0.mlp.w3.weight (768, 2048)
blocks.0.mlp.w3.bias (768,)
blocks.0.adaLN_modulation.1.weight (4608, 768)
blocks.0.adaLN_modulation.1.bias (4608,)
final_layer.norm_final.weight (768,)
final_layer.linear.weight (128, 768)
final_layer.linear.bias (128,)
final_layer.adaLN_modulation.1.weight (1536, 768)
final_layer.adaLN_modulation.1.bias (1536,)
"""


def test_the_state_dict_has_the_names_and_shapes_of_the_release():
    with torch.device("meta"):
        state = jlt.JLT(depth=1).state_dict()
    lines = {f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()}
    assert lines == set(RELEASED.strip().splitlines())


def forward_by_hand(net, z, t, y):
    """The network once more, from its description, in float64. Of its modules it takes torch's own
    and the weights of norms. Heads are letters of an einsum, RoPE multiplies complex numbers."""
    p = net.patch_size
    n = net.input_size // p
    head_dim = len(net.blocks[0].attn.q_norm.weight)

    def norm(h, layer):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    # Row and column of each token: (N, 2, 1).
    places = torch.cartesian_prod(torch.arange(n), torch.arange(n))[:, :, None]
    angles = places * 10000 ** (-2 * torch.arange(head_dim // 4).double() / (head_dim / 2))
    turns = torch.exp(1j * angles.flatten(1))[:, None]  # (N, 1, head_dim/2)

    def turned(h):
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(3)

    angles = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    first, _, second = net.t_embedder.mlp
    time = second(F.silu(first(torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(time + net.y_embedder.embedding_table(y))[:, None]  # (B, 1, D)
    h = net.x_embedder.proj(z).flatten(2).mT
    for block in net.blocks:
        shift, scale, gate, *others = block.adaLN_modulation[1](c).chunk(6, 2)
        qkv = block.attn.qkv(norm(h, block.norm1) * (1 + scale) + shift)
        q, k, value = qkv.unflatten(2, (3, -1, head_dim)).unbind(2)
        q = turned(norm(q, block.attn.q_norm))
        k = turned(norm(k, block.attn.k_norm))
        attention = (torch.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5).softmax(-1)
        answer = torch.einsum("bhqk,bkhd->bqhd", attention, value).flatten(2)
        h = h + gate * block.attn.proj(answer)
        shift, scale, gate = others
        a, b = block.mlp.w12(norm(h, block.norm2) * (1 + scale) + shift).chunk(2, 2)
        h = h + gate * block.mlp.w3(F.silu(a) * b)
    last = net.final_layer
    shift, scale = last.adaLN_modulation[1](c).chunk(2, 2)
    h = last.linear(norm(h, last.norm_final) * (1 + scale) + shift)
    # A token's output is (row, column, channel).
    return torch.einsum("bnmijc->bcnimj", h.view(6, n, n, p, p, 8)).reshape(z.shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": 1e-3},  # the mean squares are about the 1e-6 that norms add to them
        {"patch_size": 2},
        {"hidden_size": 160},  # heads of 80 channels, as in H
        {"num_heads": 8},  # of 4, the fewest
        {"num_heads": 1},
    ],
)
def test_the_network_equals_an_independent_one_in_float64(changes):
    net = random_jlt(**changes)
    out = net(*GIVEN)
    expected = forward_by_hand(net.double(), X, TIMES, CLASSES)
    assert (out - expected).abs().max() < 3e-6 * expected.abs().max()


def test_every_token_sees_every_other():
    net = random_jlt()
    z, t, y = GIVEN
    moved = z.clone()
    moved[:, :, 1, 2] += 1
    assert (net(moved, t, y) - net(z, t, y)).abs().amax(1).min() > 1e-6


def test_a_new_network_answers_0_which_costs_2_for_v_and_about_3_for_x():
    assert not tiny_jlt()(*GIVEN).any()
    x, eps, n = normals(3, 200_000, 1, 1, 1)
    t = torch.sigmoid(0.8 * n - 0.8)
    # The mean of 1 / (1 - t)^2 = (1 + exp(n))^2 for n ~ N(-0.8, 0.8^2).
    about_3 = 1 + 2 * math.exp(-0.48) + math.exp(-0.32)
    for target, expected in {"v": 2, "x": about_3}.items():
        loss = jlt.flow_loss(Mock(return_value=0), x, CLASSES, t, eps, target)
        assert loss.mean() == pytest.approx(expected, rel=0.02)


def test_weights_start_as_in_dit():
    state = tiny_jlt(hidden_size=128, patch_size=2, num_classes=99).state_dict()
    deviations = {
        # Xavier, for a patch of 8 * 2 * 2 values as for a Linear.
        "x_embedder.proj.weight": (2 / (32 + 128)) ** 0.5,
        "blocks.1.attn.qkv.weight": (2 / (128 + 384)) ** 0.5,
        "blocks.1.adaLN_modulation.1.weight": 0,
        "t_embedder.mlp.0.weight": 0.02,
        "t_embedder.mlp.2.weight": 0.02,
        "y_embedder.embedding_table.weight": 0.02,
    }
    found = {name: state[name].std().item() for name in deviations}
    assert found == pytest.approx(deviations, rel=0.03)


def test_every_parameter_gets_a_finite_gradient_from_the_loss():
    net = random_jlt()
    z, t, y = GIVEN
    jlt.flow_loss(net, z, y, t, -z).mean().backward()
    for name, p in net.named_parameters():
        assert 0 < p.grad.abs().max() < math.inf, name


def test_bfloat16_products_stay_near_float32_and_norms_are_float32():
    net = random_jlt(hidden_size=64)
    exact = net(*GIVEN)
    norm = net.blocks[0].norm1
    h = normals(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < (net(*GIVEN) - exact).abs().max() < 0.03 * exact.abs().max()
        assert torch.equal(norm(h), norm(h.float()).bfloat16())


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 3}, "patch_size 3 does not divide 4"),
        ({"num_heads": 3}, "hidden_size 32 .* 3 heads"),
        ({"hidden_size": 12}, "hidden_size 12 .*multiple of 4"),  # two heads of 6
    ],
)
def test_sizes_that_do_not_fit_are_an_error_that_names_them(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_jlt(**changes)


# =============================================================== data order and noise
def literal_generator(*numbers):
    """A generator that is seeded as jlt.rng says."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


# 16 epochs of 30 images, most of which end within a micro-batch.
ORDER_FLAGS = "--batch 16 --micro-batch 4 --steps 30 --seed 5 --device cpu"


def test_every_epoch_shows_every_image_once_and_half_of_them_mirrored():
    config = from_flags(ORDER_FLAGS)
    picks = [
        pick for step in range(30) for m in range(4) for pick in jlt.picks(30, config, step, m)
    ]
    for i in range(0, 480, 30):
        assert {index for index, _ in picks[i : i + 30]} == set(range(30))
    assert 190 < sum(flip for _, flip in picks) < 290


def test_the_data_order_is_that_of_literal_generators():
    # Micro-batch 3 of step 1 takes the positions 28 to 31, which lie in epochs 0 and 1.
    orders = [torch.randperm(30, generator=literal_generator(0, 2, 5, epoch)) for epoch in (0, 1)]
    # What is random is drawn for all 16 images of the step.
    flips = torch.rand(16, generator=literal_generator(1, 2, 5, 1)) < 0.5
    expected = zip(torch.cat(orders)[28:32].tolist(), flips[12:].tolist(), strict=True)
    assert jlt.picks(30, from_flags(ORDER_FLAGS), 1, 3) == list(expected)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_read_their_micro_batches_in_turn_from_any_step_on(
    world, workers, monkeypatch, tmp_path
):
    data = encode.LatentDataset(write_cache(tmp_path, shard(30, (1, 2, 2))))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        config = Namespace(batch=16, micro_batch=4, seed=5, steps=30, workers=workers, device="cpu")
        batches = jlt.micro_batches(data, config, start=25)
        expected = [(s, m) for s in range(25, 30) for m in range(rank, 4, world)]
        for (x, y), (step, m) in zip(batches, expected, strict=True):
            picks = jlt.picks(30, config, step, m)
            assert torch.equal(x, torch.stack([data[pick][0] for pick in picks]).float())
            assert y.tolist() == [29 - i for i, _ in picks]


@pytest.mark.parametrize(
    "flags", ["", "--target v", "--loss eps", "--seed 5 --logit-t 0 1.5 --label-drop 0.5"]
)
def test_draws_are_logit_normal_times_noise_and_hidden_classes_of_one_stream(flags):
    """The same for every target."""
    config = from_flags(f"{flags} --batch 6 --device cpu")
    generator = literal_generator(2, 2, config.seed, 7)
    mean, std = config.logit_t
    times = torch.randn(6, generator=generator) * std + mean
    noise = torch.randn(6, 8, 4, 4, generator=generator)
    hidden = torch.rand(6, generator=generator) < config.label_drop
    drawn = jlt.draws(config, 7, (8, 4, 4))
    torch.testing.assert_close(drawn, (times.sigmoid(), noise, hidden))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_sampled_from_noise_of_their_number_as_the_settings_say(precision):
    net = random_jlt()
    flags = "--target eps --sample-steps 4 --cfg 1.7 --interval 0.2 0.6 --t-eps 0.3 --seed 5"
    config = from_flags(f"{flags} --device cpu --precision {precision}")
    latents = jlt.generate(net, CLASSES, range(3, 9), config)
    noise = [torch.randn(8, 4, 4, generator=literal_generator(3, 2, 5, i)) for i in range(3, 9)]
    given = (net, CLASSES, torch.stack(noise), "eps", 4, 1.7, (0.2, 0.6), 0.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert torch.equal(latents, jlt.sample(*given))
    assert not latents.requires_grad


# =============================================================== helpers of runs
# The 12 classes as encode.py sorts folders, so that class 10 is the third. Three steps are an epoch
# of 24 latents.
NUMBERS = sorted(str(i) for i in range(12))
LABELS = torch.arange(24) % 12
TINY = shlex.split(
    "--depth 2 --hidden-size 32 --batch 8 --micro-batch 4 --lr 0.01 --ema 0.8 --target v --seed 3 "
    "--t-eps 0.1 --cfg 1.5 --interval 0 0.5 --sample-steps 3 --workers 0 --device cpu --log-every 1"
)


def write_latents(folder, latents, labels=LABELS, **settings):
    """A cache. The latent of a mirrored image is another one. -> folder"""
    folder.mkdir(parents=True)
    shard = folder / "latents_00000.safetensors"
    encode.save_shard(shard, latents, latents.flip(1), labels)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def checkpoint_of(run):
    return torch.load(run / "ckpt.pt", weights_only=True)


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def numbers_of(row):
    """A row of log.jsonl without its time. (No image may have fallen into a bin of t: None, or not
    a number.)"""
    values = [row[name] for name in ("step", "loss", "grad_norm", "lr")]
    return np.array([*values, *row["loss_by_t"]], float)


def assert_same_runs(run, other, tolerance=0):
    """Asserts that two runs have the same weights, averages, moments, steps and logs."""
    ours, theirs = map(checkpoint_of, (run, other))
    for part in ("model", "ema", "optimizer", "step"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=tolerance)
    ours, theirs = ([numbers_of(row) for row in log_of(folder)] for folder in (run, other))
    np.testing.assert_allclose(ours, theirs, rtol=10 * tolerance)


def flag_of(name):
    """sample_steps -> --sample-steps"""
    return "--" + name.replace("_", "-")


FLAGS = argparse.ArgumentParser()
for group in (jlt.fixed_flags, jlt.sampling_flags, jlt.free_flags):
    group(FLAGS)
CHOICES = {action.dest: action.choices for action in FLAGS._actions}


def changed(name, value):
    """-> the words of a command line that give a setting of that run another value."""
    if CHOICES.get(name):
        # For the model: B/2.
        others = [choice for choice in CHOICES[name] if choice not in (value, "B/1")][:1]
    elif isinstance(value, list):
        others = [number + 0.1 for number in value]
    elif name in ("vae", "init"):
        others = ["another"]
    else:
        others = [2 * (value or 1)]
    return [flag_of(name), *map(str, others)]


def pixels_of(path):
    """-> int (H, W, 3)"""
    return np.array(Image.open(path)).astype(int)


@pytest.fixture(scope="session")
def digit_file(digits):
    """The file of a codec of drawn digits: a decoder of latents (128, 2, 2)."""
    return digits / "codec.safetensors"


@pytest.fixture(scope="session")
def latents(digit_file):
    return load_file(digit_file.parent / "latents_00000.safetensors")["latents"][:24]


@pytest.fixture(scope="session")
def run_cache(latents, digit_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cache"
    return write_latents(folder, latents, classes=NUMBERS, vae=str(digit_file))


@pytest.fixture
def train(cli, run_cache, tmp_path):
    """train(*flags, out="run"): four steps, or what the flags say, in tmp_path / out. -> what cli
    returns"""

    def train(*flags, out="run"):
        where = ["--data", run_cache, "--out", tmp_path / out]
        return cli(jlt, *TINY, "--steps", 4, *where, *flags)

    return train


@pytest.fixture(scope="session")
def four_steps(run_cache, tmp_path_factory):
    """The folder of a run of what train() does, and of a picture on the way."""
    run = tmp_path_factory.mktemp("four_steps") / "run"
    flags = [*TINY, "--steps", "4", "--data", str(run_cache), "--out", str(run)]
    jlt.train(jlt.read_flags([*flags, "--sample-every", "4"])[0])
    return run


@pytest.fixture
def finished(four_steps, tmp_path):
    """A copy of it, where train() goes on."""
    return shutil.copytree(four_steps, tmp_path / "run")


@pytest.fixture
def nan_cache(latents, tmp_path):
    """A cache that makes large gradients, with an image that is not finite, which step 3 meets in
    its last micro-batch."""
    config = Namespace(batch=8, micro_batch=4, seed=3)
    index, _ = jlt.picks(24, config, step=2, m=1)[0]
    latents = 20 * latents
    latents[index] = torch.nan
    return write_latents(tmp_path / "nan", latents)


@pytest.fixture
def start(run_cache, tmp_path):
    """start(*flags, launcher=()): train() in a process of its own, in a group that Ctrl-C would
    reach."""

    def start(*flags, launcher=()):
        where = ["--data", run_cache, "--out", tmp_path / "run"]
        words = [sys.executable, *launcher, jlt.__file__, *TINY, *where, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, words)], start_new_session=True, **pipes)

    return start


# =============================================================== settings
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"target": "x", "loss": "v", "t_eps": 0.05, "logit_t": [-0.8, 0.8], "ema": 0.9999}),
        ("", {"steps": 250_000, "batch": 1024, "micro_batch": 256, "lr": 2e-4, "label_drop": 0.1}),
        ("", {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 1, "cooldown": 0}),
        ("", {"warmup_epochs": 5, "sample_steps": 50, "cfg": 2.9, "interval": [0.1, 1.0]}),
        # The model's name.
        ("--model B/2 --target v", {"patch_size": 2, "out": "runs/B-2-v"}),
        ("--model L/1", {"depth": 24, "hidden_size": 1024, "num_heads": 16, "micro_batch": 128}),
        ("--model H/1", {"depth": 32, "hidden_size": 1280, "num_heads": 16, "micro_batch": 64}),
        ("--model nano", {"depth": 4, "hidden_size": 256, "num_heads": 4, "batch": 32, "lr": 3e-4}),
        ("--model nano", {"warmup_epochs": 1, "ema": 0.99, "steps": 2000, "out": "runs/nano-x"}),
        ("--model nano --depth 2", {"depth": 2, "save_every": 100, "sample_every": 500}),
        # The demo's.
        ("--demo", {"depth": 3, "hidden_size": 64, "batch": 64, "lr": 3e-3, "warmup_epochs": 0.3}),
        ("--demo", {"cooldown": 1, "ema": 0.99, "sample_steps": 10, "cfg": 1.5, "log_every": 250}),
        ("--demo", {"interval": [0, 1], "sample_every": 0, "workers": 0, "device": "cpu"}),
        ("--demo", {"data": "runs/digits", "out": "runs/demo", "model": "demo", "seed": 0}),
        ("--demo --model nano --steps 7", {"depth": 3, "steps": 7, "model": "demo"}),
        # What follows from others.
        ("--lr 0", {"lr": 0}),
        ("--batch 512 --micro-batch 3", {"micro_batch": 2, "lr": 1e-4}),
        ("--hidden-size 32", {"num_heads": 1}),
        ("--hidden-size 256 --num-heads 2", {"num_heads": 2}),
    ],
)
def test_defaults_lie_in_layers(flags, expected):
    config, _ = jlt.read_flags(["--device", "cpu", *flags.split()])
    assert vars(config).items() >= expected.items()


@pytest.mark.parametrize(
    "program, words",
    [
        (jlt, map(flag_of, vars(jlt.read_flags([])[0]))),
        (encode, ["images", "--out", "--vae", "--size", "--batch", "--workers", "--device"]),
        (fid, ["samples", "reference", "--size", "--save", "--weights"]),
    ],
)
def test_help_mentions_every_flag(cli, program, words):
    status, out, _ = cli(program, "--help")
    assert status == 0
    for word in words:
        assert re.search(rf"\n  {word}\b", out)


def test_what_is_fixed_when_a_run_continues():
    names = "target loss t_eps logit_t label_drop model depth hidden_size num_heads patch_size "
    names += "batch lr warmup_epochs cooldown ema seed init precision"
    assert list(jlt.FIXED) == names.split()


def test_products_on_cuda_are_bfloat16(monkeypatch):
    monkeypatch.setattr(encode, "pick_device", lambda name: torch.device("cuda", 0))
    assert from_flags("").precision == "bf16"
    assert from_flags("--precision fp32").precision == "fp32"


@pytest.mark.parametrize(
    "flags, world, micro_batch",
    [
        ("", 1, 256),
        ("", 8, 128),
        ("--model L/1", 4, 128),
        ("--batch 96 --micro-batch 50", 1, 48),
        ("--batch 6", 4, 1),
    ],
)
def test_the_micro_batch_divides_the_batch_and_is_at_most_a_processs_share(
    monkeypatch, flags, world, micro_batch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert from_flags(f"{flags} --device cpu").micro_batch == micro_batch


@pytest.mark.parametrize(
    "flags",
    [
        *("--step 5", "--steps 1e3", "--batch 0", "--lr fast", "--target q", "--model S/2"),
        *("--precision fp8", "--interval 0.1", "--sample", "--n 0", "--classes 1 --n 3"),
        *("--demo --sample x", "--geometry a --demo", "--seed -1", "--workers -1"),
        *("--sample-every -1", "--geometry"),
    ],
)
def test_a_mistake_in_a_flag_names_it(cli, flags):
    status, out, err = cli(jlt, *flags.split())
    assert (status, out) == (2, "")
    assert flags.split()[0] in err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data nowhere", "nowhere: holds no latents_*.safetensors; encode.py IMAGES --out nowhe"),
        ("--data {cache} --patch-size 3", "patch_size 3 does not divide 2"),
        ("--data {cache} --hidden-size 30", "hidden_size 30 "),
        ("--interval 0.9 0.1", "--interval LOW HIGH"),
        ("--classes 3 --n 3", "not allowed with"),
        ("--data {cache} --device tpu", "--device tpu: not on this machine"),
        ("--classes 3", "--sample NAME goes with --classes 207 360"),
        ("--sample {run}", "--sample NAME goes with --classes 207 360"),
        ("--sample nowhere --n 3", "nowhere: no such run folder or checkpoint"),
        ("--sample {run}/ema --n 3", "ema: no such run folder or checkpoint"),
        ("--sample . --n 3", "holds none of ema.safetensors, ckpt.pt"),
        ("--sample {run}/log.jsonl --n 3", "log.jsonl: damaged, or no checkpoint"),
        ("--sample {cache}/latents_00000.safetensors --n 3", "safetensors: holds no JLT"),
        ("--sample {run} --n 3 --target x", "is another network; it takes --target v"),
        ("--sample {run} --n 3 --depth 3", "is another network; it takes --depth 2"),
        ("--sample {run} --n 3 --vae no/codec.safetensors", "no/codec.safetensors"),
        ("--sample {run} --classes 12", "--classes 12: "),
        ("--sample {run} --classes 1 bee", "--classes bee: "),
        ("--sample {run} --classes -1", "--classes -1: "),
        ("--sample {run} --classes 1 --out new/p.png", "--out new/p.png: name a file"),
        ("--sample {run} --classes 1 --out {run}/", "/: name a file, in a folder that is there"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    cli, four_steps, run_cache, tmp_path, monkeypatch, flags, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jlt, "generate", None)
    result = cli(jlt, *flags.format(run=four_steps, cache=run_cache).split())
    one_line(result, words, status=2 if "not allowed" in words else 1)
    assert not any(tmp_path.iterdir())


# =============================================================== training: the steps
@pytest.mark.parametrize(
    "flags, loudness, clipped",
    [
        ("--target x --seed 0", 20, True),
        ("--target x --t-eps 0.6", 0.02, False),
        ("--target v", 1, False),
        ("--target x --loss x", 1, False),
    ],
)
def test_the_first_steps_are_adamw_with_warm_up_clipping_and_an_average(
    train, latents, tmp_path, flags, loudness, clipped
):
    cache = write_latents(tmp_path / "cache", latents * loudness)
    flags = [*TINY, *flags.split(), "--warmup-epochs", "3"]
    train(*flags, "--data", cache)

    config, _ = jlt.read_flags(flags)
    data = encode.LatentDataset(cache)
    torch.manual_seed(config.seed)
    net = jlt.JLT(2, 1, 128, 32, depth=2, num_heads=1, num_classes=12)
    weights = list(net.parameters())
    averages = [weight.detach().clone() for weight in weights]
    adamw = torch.optim.AdamW(weights, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    settings = (config.target, config.t_eps, config.loss)
    for step, row in enumerate(log_of(tmp_path / "run")):
        # The whole batch at once; train() takes two micro-batches.
        config.micro_batch = 8
        picks = jlt.picks(24, config, step, 0)
        x = torch.stack([data[pick][0] for pick in picks]).float()
        y = data.labels[[index for index, _ in picks]]
        t, eps, hidden = jlt.draws(config, step, (128, 2, 2))
        losses = jlt.flow_loss(net, x, y.masked_fill(hidden, 12), t, eps, *settings)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1)
        assert (norm > 1) == clipped
        # Three epochs of three steps are nine steps of warm-up.
        lr = 0.01 * (step + 1) / 9
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        for average, weight in zip(averages, weights, strict=True):
            average += 0.2 * (weight.detach() - average)
        losses = losses.detach()
        by_time = [losses[(10 * t).int() == k].mean() for k in range(10)]
        expected = [step + 1, losses.mean(), norm, lr, *by_time]
        np.testing.assert_allclose(numbers_of(row), np.array(expected, float), rtol=1e-3)
    state = checkpoint_of(tmp_path / "run")
    assert state["optimizer"]["param_groups"][0]["lr"] == row["lr"]
    torch.testing.assert_close(list(state["model"].values()), weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(list(state["ema"].values()), averages, rtol=0, atol=1e-5)


def test_the_rate_rises_stays_and_falls():
    config = Namespace(warmup_epochs=2, cooldown=0.25, steps=8, batch=8, lr=4)
    rates = [jlt.learning_rate(config, step, images=16) for step in range(8)]
    assert rates == [1, 2, 3, 4, 4, 4, 4, 2]
    config.cooldown = 1
    assert jlt.learning_rate(config, 7, images=16) == 4 / 8


def test_every_target_starts_from_the_same_weights_and_sees_the_same_draws(train, monkeypatch):
    calls = []
    flow_loss = jlt.flow_loss

    def watched(net, *rest):
        weights = [weight.detach().clone() for weight in net.parameters()]
        calls.append([weights, *rest[:4]])
        return flow_loss(net, *rest)

    monkeypatch.setattr(jlt, "flow_loss", watched)
    for target in ("x", "v"):
        train("--target", target, "--lr", 1e-30, out=target)
    assert len(calls) == 16
    torch.testing.assert_close(calls[:8], calls[8:], rtol=0, atol=1e-20)


@pytest.fixture(scope="session")
def learn(run_cache, tmp_path_factory):
    """learn(*flags): the average after three steps, target x, of one micro-batch each."""

    def learn(*flags):
        where = ["--data", run_cache, "--out", tmp_path_factory.mktemp("learn") / "run"]
        settings = ["--target", "x", "--steps", 3, "--micro-batch", 8, "--warmup-epochs", 2]
        config, _ = jlt.read_flags([*TINY, *map(str, [*settings, *where, *flags])])
        return jlt.train(config).ema.state_dict()

    return learn


@pytest.fixture(scope="session")
def learned(learn):
    return learn()


@pytest.mark.parametrize("name", jlt.FIXED)
def test_each_fixed_flag_changes_what_is_learned(learn, learned, four_steps, name):
    # Where twice the value would not do: steps that are late enough, heads that divide the width.
    values = {"t_eps": [0.9], "lr": [0.02], "ema": [0.5], "hidden_size": [64], "init": [four_steps]}
    values |= {"model": ["B/2"], "label_drop": [1], "cooldown": [1], "batch": [16], "depth": [3]}
    flags = changed(name, jlt.FIXED[name] or 1)
    if name in values:
        flags = [flag_of(name), *values[name]]
    if name == "init":
        flags += ["--target", "v"]
    if name == "target":
        flags = ["--target", "v"]
    other = learn(*flags)
    alike = [
        torch.equal(weight, other[name])
        for name, weight in learned.items()
        if name in other and weight.shape == other[name].shape
    ]
    assert not all(alike) or len(alike) < len(learned)


def test_the_micro_batch_changes_the_order_of_sums_only(learn, learned):
    for size in (1, 2):
        other = learn("--micro-batch", size)
        torch.testing.assert_close(other, learned, rtol=0, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train, nan_cache, tmp_path):
    # It is looked at before a checkpoint.
    flags = ["--log-every", 100, "--save-every", 5, "--steps", 9]
    words = "loss or gradient is not finite in steps 2 to 5"
    one_line(train("--data", nan_cache, *flags), words)
    assert not (tmp_path / "run/ckpt.pt").exists()


# =============================================================== training: interruptions
@pytest.mark.parametrize(
    "command, reason",
    [
        ("kill -9 -{group}", r"^$"),
        # As a terminal does with Ctrl-C.
        ("kill -2 -{group}", r"^jlt.py: interrupted\n$"),
        (
            # The newest of its processes, however they are started, is a reader.
            "kill -9 $(pgrep -n -g {group})",
            r"^jlt.py: a process that reads was killed[^\n]*\n$",
        ),
        ("rm {shard}", r"^jlt.py: {shard}: cannot be read \(.*\)\n$"),
    ],
)
def test_a_run_that_was_ended_continues_to_the_same_bits(
    train, start, run_cache, tmp_path, command, reason
):
    run = tmp_path / "run"
    shard = shutil.copytree(run_cache, tmp_path / "cache") / "latents_00000.safetensors"
    # A run that nobody ends is over in a minute.
    flags = ["--save-every", 5, "--sample-every", 13, "--workers", 2, "--steps", 3000]
    process = start(*flags, "--data", shard.parent)
    deadline = time.monotonic() + 60
    while not (run / "samples_0000013.png").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    subprocess.run(command.format(group=process.pid, shard=shard), shell=True, check=True)
    _, err = process.communicate(timeout=20)
    assert re.search(reason.format(shard=shard), err)

    saved = checkpoint_of(run)["step"]
    assert saved % 5 == 0 < saved
    assert f"from step {saved} to" in train("--steps", saved + 3)[1]
    train("--steps", saved + 3, out="whole")
    assert_same_runs(run, tmp_path / "whole")


@pytest.mark.parametrize("name", jlt.FIXED)
def test_what_is_learned_may_not_change(train, finished, name):
    old = encode.read_settings(finished)[name]
    before = files_of(finished)
    result = train("--steps", 5, *changed(name, old))
    one_line(result, f"{finished}: made with other settings: ", f"{name} {old} (now ")
    assert files_of(finished) == before


def test_everything_else_may_change(train, finished, run_cache, tmp_path):
    free = jlt.SAMPLING | jlt.defaults_of(jlt.free_flags)
    flags = ["--steps", 6, "--data", shutil.copytree(run_cache, tmp_path / "moved")]
    # Another micro-batch changes the order of sums.
    for name in free.keys() - {"steps", "data", "out", "device", "micro_batch"}:
        flags += changed(name, free[name])
    assert "from step 4 to 6" in train(*flags)[1]
    train("--steps", 6, out="whole")
    ours, theirs = map(checkpoint_of, (finished, tmp_path / "whole"))
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    rows, expected = ([numbers_of(row) for row in state["log"]] for state in (ours, theirs))
    np.testing.assert_allclose(rows, expected)


def test_a_run_goes_on_with_its_own_latents_only(train, finished, latents, run_cache, tmp_path):
    settings = encode.read_settings(run_cache)
    write_latents(tmp_path / "labels", latents, LABELS.flip(0), **settings)
    write_latents(tmp_path / "settings", latents, **settings, size=512)
    for name in ("labels", "settings"):
        one_line(train("--data", tmp_path / name), "made with other settings: latents ")
    # Without settings.json, too, other shapes are other latents.
    for name, size in {"small": 2, "large": 4}.items():
        tensors = {"latents": torch.zeros(24, 128, size, size), "labels": LABELS}
        (tmp_path / name).mkdir()
        write_cache(tmp_path / name, tensors)
    assert train("--data", tmp_path / "small", out="other")[0] == 0
    one_line(train("--data", tmp_path / "large", out="other"), "made with other settings: latents ")


def test_latents_that_are_not_normalised_are_spoken_of(train, latents, tmp_path):
    out = train(out="usual")[1]
    assert re.search(
        r"24 latents of mean -?0\.\d\d and deviation [01]\.\d\d, batch 2 x 4 on 1 x cpu", out
    )
    assert "normalised" not in out
    for name, cache in {"wide": 9 * latents, "shifted": latents + 2}.items():
        write_latents(tmp_path / name, cache)
        assert "not normalised?" in train("--data", tmp_path / name, out=f"run_{name}")[1]


def test_the_first_line_of_the_log_comes_at_once_and_the_second_soon(train, tmp_path):
    flags = ["--log-every", 100, "--save-every", 12]
    train(*flags, "--steps", 12)
    train(*flags, "--steps", 24)
    steps = [row["step"] for row in log_of(tmp_path / "run")]
    assert steps == [1, 10, 12, 13, 22, 24]


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA out of memory")])
def test_a_picture_that_fails_does_not_end_the_training(train, monkeypatch, error):
    flags = ["--sample-every", 3]
    if error:
        monkeypatch.setattr(jlt, "generate", mock.Mock(side_effect=error))
    else:
        # Without a decoder nothing is sampled.
        monkeypatch.setattr(jlt, "generate", None)
        flags += ["--vae", "nowhere/codec.safetensors"]
    status, out, _ = train(*flags)
    assert status == 0
    assert f"no picture at step 3: {error or '--vae nowhere/codec.safetensors: no codec'}" in out


def test_the_average_is_written_before_the_checkpoint(train, finished):
    """A run that is killed between them samples the newer weights, and does both again."""
    fill_the_disk(finished / "ckpt.pt")
    one_line(train("--steps", 5), "ckpt.pt: cannot be written")
    with safe_open(finished / "ema.safetensors", "pt") as file:
        assert json.loads(file.metadata()["jlt"])["step"] == 5
    assert checkpoint_of(finished)["step"] == 4


def test_processes_that_see_different_folders_are_refused(train, finished, monkeypatch):
    def add_the_others(steps):
        steps += torch.tensor([0, 2])

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(jlt.dist, "init_process_group", mock.Mock())
    monkeypatch.setattr(jlt.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(jlt.dist, "all_reduce", add_the_others)
    one_line(train("--steps", 5), "its processes find it at steps [4.0, 2.0]")


def test_where_a_run_ends_is_fixed_if_it_cools_down(train):
    assert train("--cooldown", 0.5)[0] == 0
    one_line(train("--cooldown", 0.5, "--steps", 5), "steps 4 (now 5)")


@pytest.mark.parametrize(
    "gone, flags, words",
    [("ckpt.pt", ["--lr", 1], "lr 0.01 (now 1.0)"), ("settings.json", [], "no settings.json")],
)
def test_a_run_of_which_a_file_is_gone_is_not_overwritten(train, finished, gone, flags, words):
    (finished / gone).unlink()
    before = files_of(finished)
    one_line(train(*flags), finished, words)
    assert files_of(finished) == before


def test_a_setting_that_an_older_version_did_not_know_has_its_default(train, finished):
    settings = encode.read_settings(finished)
    del settings["loss"]
    (finished / "settings.json").write_text(json.dumps(settings))
    one_line(train("--loss", "x"), "made with other settings: loss v (now x)")
    assert train("--loss", "v")[0] == 0


# =============================================================== training: processes
def test_two_processes_train_what_one_does_and_stop_together(train, start, nan_cache, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    # Each has readers, which must not keep it from ending.
    flags = ["--data", nan_cache, "--save-every", 2, "--steps", 100, "--workers", 2]
    process = start(*flags, launcher=launcher)
    out, err = process.communicate(timeout=60)
    assert process.returncode
    assert out.count("step 2/100") == 1
    assert "not finite in steps 3 to 3" in err
    train(*flags, out="alone")
    assert_same_runs(tmp_path / "run", tmp_path / "alone", tolerance=1e-5)
    # So large that a sum of clipped gradients would be another than the clipped sum.
    assert min(row["grad_norm"] for row in log_of(tmp_path / "run")) > 2
    assert checkpoint_of(tmp_path / "run")["step"] == 2


def test_only_the_first_process_prints_and_writes(train, finished, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(jlt.dist, "init_process_group", mock.Mock())
    before = files_of(finished)
    result = train("--steps", 5, "--sample-every", 1)
    assert result == (0, "", "")
    assert files_of(finished) == before


def test_more_processes_than_images_are_refused(train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "300")
    one_line(train(), "--batch 8: fewer images than there are processes, 300")


# =============================================================== sampling
HOW_TO_SAMPLE = sorted(jlt.SAMPLING.keys() - {"vae"})


@pytest.fixture
def sampled(cli, finished, tmp_path):
    """sampled(*flags, out="out"): samples of that run, or of what the flags say, in tmp_path / out.
    -> what cli returns"""

    def sampled(*flags, out="out"):
        where = ["--sample", finished, "--out", tmp_path / out]
        return cli(jlt, *where, "--device", "cpu", *flags)

    return sampled


@pytest.fixture
def given(sampled, monkeypatch):
    """given(*flags): what `sample` is given for pictures of classes 2 and 1, by the names of its
    parameters. It returns the noise."""
    signature = inspect.signature(jlt.sample)
    calls = []

    def watched(*arguments, **named):
        call = signature.bind(*arguments, **named)
        call.apply_defaults()
        calls.append(call.arguments)
        return call.arguments["noise"]

    def given(*flags):
        monkeypatch.setattr(jlt, "sample", watched)
        sampled("--classes", "2", "1", *flags)
        return calls.pop()

    return given


@pytest.mark.parametrize("other", ["ckpt.pt", "ema.safetensors"])
def test_a_run_samples_from_its_average_with_its_own_settings(
    given, finished, digit_file, tmp_path, other
):
    state = checkpoint_of(finished)
    # Whoever is given a run may be given only one of its files.
    (finished / other).unlink()
    own = given()
    expected = {"target": "v", "steps": 3, "cfg": 1.5, "interval": [0.0, 0.5], "t_eps": 0.1}
    assert own.items() >= expected.items()
    weights = own["net"].state_dict()
    torch.testing.assert_close(dict(weights), dict(state["ema"]), rtol=0, atol=0)
    assert own["y"].tolist() == [4, 1]
    # Not the seed of the run.
    assert torch.equal(own["noise"], given("--seed", 0)["noise"])
    images = encode.to_uint8(encode.load_vae(digit_file).decode(own["noise"]))
    row = torch.cat([*images], 2).permute(1, 2, 0)
    np.testing.assert_allclose(pixels_of(tmp_path / "out.png"), row, atol=1)


@pytest.mark.parametrize("name", [*HOW_TO_SAMPLE, "seed", "t_eps"])
def test_each_sampling_flag_changes_what_sample_is_given(given, finished, name):
    own = given()
    value = 0 if name == "seed" else checkpoint_of(finished)["config"][name]
    other = given(*changed(name, value))
    del own["net"]
    assert len([key for key in own if str(own[key]) != str(other[key])]) == 1


def test_a_setting_that_a_checkpoint_lacks_has_its_default(given, finished, tmp_path):
    state = checkpoint_of(finished)
    del state["config"]["cfg"]
    torch.save(state, tmp_path / "old.pt")
    assert given("--sample", tmp_path / "old.pt").items() >= {"cfg": 2.9, "steps": 3}.items()


def test_the_average_is_given_away_with_settings_and_class_names(finished, sampled, monkeypatch):
    with safe_open(finished / "ema.safetensors", "pt") as file:
        about = json.loads(file.metadata()["jlt"])
    assert about["config"].items() >= {"cfg": 1.5, "target": "v", "seed": 3}.items()
    assert (about["classes"], about["step"]) == (NUMBERS, 4)
    # It goes before ckpt.pt, which is four times as large.
    monkeypatch.setattr(torch, "load", None)
    assert "out.png: 4 2, 2 10" in sampled("--classes", "2", "10")[1]


def test_another_decoder_may_make_the_pictures(sampled, digit_file, tmp_path):
    sampled("--n", 1)
    tensors = load_file(digit_file)
    other = tmp_path / "codec.safetensors"
    flags = ["--n", 1, "--vae", other]
    save_file(tensors | {"basis": -tensors["basis"]}, other)
    one_line(sampled(*flags), "made with other settings: vae ")
    sampled(*flags, out="other")
    assert len({path.read_bytes() for path in tmp_path.glob("o*/*.png")}) == 2


def test_pictures_on_the_way_are_of_the_average(sampled, finished, tmp_path):
    grid = pixels_of(finished / "samples_0000004.png")
    words = [NUMBERS[label] for label in torch.linspace(0, 11, 16).long()]
    sampled("--classes", *words, "--seed", 3)
    row = np.concatenate([grid[:32], grid[32:]], 1)
    np.testing.assert_allclose(pixels_of(tmp_path / "out.png"), row, atol=1)


@pytest.mark.parametrize(
    "names, word, label",
    [
        (["ant", "bee", "cow"], "bee", 1),
        (["ant", "bee", "cow"], "2", 2),
        (["ant", "bee", "cow"], "3", None),
        ([], "2", 2),
        (["1", "10", "2"], "2", 2),
        (["1", "10", "2"], "10", 1),
        # Not the class of number 0, which is called 1.
        (["1", "10", "2"], "0", None),
    ],
)
def test_a_class_is_meant_by_its_name_or_where_no_name_is_a_number_by_its_number(
    names, word, label
):
    trained = SimpleNamespace(class_names=names, net=SimpleNamespace(num_classes=3))
    if label is None:
        with pytest.raises(encode.Stop, match=f"--classes {word}: is none of"):
            jlt.class_label(word, trained)
    else:
        assert jlt.class_label(word, trained) == label


# =============================================================== sampling: a folder
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_folder_has_all_classes_in_turn_whatever_the_micro_batch(
    sampled, digit_file, tmp_path, micro_batch
):
    torch.save(published(), tmp_path / "any.pth")
    flags = ["--sample", tmp_path / "any.pth", "--vae", digit_file, "--sample-steps", 2]
    assert "holds 7 images" in sampled(*flags, "--n", 7, "--micro-batch", micro_batch)[1]
    sampled(*flags, "--classes", 0, 1, 2, 3, 4, 0, 1, out="row")
    row = np.concatenate([*map(pixels_of, sorted((tmp_path / "out").glob("0*")))], 1)
    np.testing.assert_allclose(pixels_of(tmp_path / "row.png"), row, atol=1)


def test_an_interrupted_folder_is_completed_to_the_same_bytes(sampled, tmp_path):
    folder = tmp_path / "out"
    sampled("--n", 6, "--micro-batch", 2)
    whole = files_of(folder)
    for name in ("000001.png", "000004.png", "000005.png"):
        (folder / name).rename(folder / f".tmp.{name}")
    (folder / "000000.png").write_bytes(b"what is there")
    # One is made, and what lies there is what will be scored.
    assert "holds 4 images" in sampled("--n", 2, "--micro-batch", 2)[1]
    sampled("--n", 6, "--micro-batch", 2)
    assert files_of(folder) == whole | {"000000.png": b"what is there"}


@pytest.mark.parametrize("name", [*HOW_TO_SAMPLE, "seed", "t_eps", "precision"])
def test_a_folder_keeps_its_settings(sampled, tmp_path, name):
    sampled("--n", 1)
    before = files_of(tmp_path / "out")
    value = encode.read_settings(tmp_path / "out")[name]
    result = sampled("--n", 2, *changed(name, value))
    one_line(result, f"made with other settings: {name} {value} (now ")
    assert files_of(tmp_path / "out") == before


def test_a_folder_keeps_its_weights_wherever_they_lie(train, finished, sampled, tmp_path):
    sampled("--n", 1)
    shutil.move(finished, tmp_path / "moved")
    assert "holds 2 images" in sampled("--n", 2, "--sample", tmp_path / "moved")[1]
    # Of the same step, by another run.
    train("--lr", 0.02)
    one_line(sampled("--n", 3), "made with other settings: weights EMA of step 4, ")
    train("--lr", 0.02, "--steps", 5)
    one_line(sampled("--n", 3), "made with other settings: weights ", "step 4", "step 5")


def test_nothing_that_is_there_is_made_again(sampled, monkeypatch):
    sampled("--n", 3)
    monkeypatch.setattr(jlt, "generate", None)
    assert "holds 3 images" in sampled("--n", 3)[1]


def test_a_picture_that_cannot_be_written_is_one_line(sampled, tmp_path):
    sampled("--n", 1)
    fill_the_disk(tmp_path / "out/000001.png")
    one_line(sampled("--n", 3), "000001.png: cannot be written")


def test_the_decoder_runs_in_float32(sampled, monkeypatch):
    seen = []
    decode = encode.DigitCodec.decode

    def watched(codec, latents):
        seen.append((torch.is_autocast_enabled("cpu"), latents.dtype))
        return decode(codec, latents)

    monkeypatch.setattr(encode.DigitCodec, "decode", watched)
    sampled("--n", 1, "--precision", "bf16")
    assert seen == [(False, torch.float32)]


def test_the_files_that_samples_go_to(cli, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--sample", finished, "--device", "cpu", "--classes"]
    assert "wrote samples.png: 2 10" in cli(jlt, *flags, 10)[1]
    assert "replaced samples.png: " in cli(jlt, *flags, 11)[1]
    assert "wrote a.png: " in cli(jlt, *flags, 10, "--out", "a.png")[1]
    cli(jlt, *flags[:-1], "--n", 1)
    assert Path("samples/000000.png").exists()


def test_processes_share_a_folder(sampled, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    sampled("--n", 7, "--micro-batch", 2, out="whole")
    # The second one waits for the first one's settings.json.
    sampled("--n", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert sampled("--n", 7, "--micro-batch", 2) == (0, "", "")
    assert sampled("--classes", "10", out="row") == (0, "", "")
    assert not (tmp_path / "row.png").exists()
    there = [".lock", "000000.png", "000002.png", "000003.png", "000006.png", "settings.json"]
    assert sorted(files_of(folder)) == there
    # The first one waits for the other's images.
    late = folder / "000006.png"
    late.unlink()
    monkeypatch.setattr(time, "sleep", lambda _: os.link(tmp_path / "whole/000006.png", late))
    monkeypatch.setenv("RANK", "0")
    assert "holds 7 images" in sampled("--n", 7, "--micro-batch", 2)[1]


# =============================================================== checkpoints
def random_weights(channels=128):
    """-> weights of a network for latents (C, 2, 2) and five classes, always the same."""
    torch.manual_seed(2)
    shapes = jlt.JLT(2, 1, channels, 32, depth=3, num_heads=2, num_classes=5).state_dict()
    return {name: torch.randn(weight.shape) / 8 for name, weight in shapes.items()}


def published(prefix="net.", dtype=torch.float32, **changes):
    """-> what the released program saves. A field of args that is changed to None is left out."""
    weights = {prefix + name: weight.to(dtype) for name, weight in random_weights().items()}
    weights[prefix + "mask_token"] = torch.ones(1, 1, 32, dtype=dtype)
    others = {name: -weight for name, weight in weights.items()}
    fields = {"img_size": 32, "flow_matching": False, "t_eps": 0.07} | changes
    return {
        "model": others,
        "model_ema1": weights,
        "model_ema2": others,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "epoch": 199,
        "args": Namespace(**{name: field for name, field in fields.items() if field is not None}),
    }


@pytest.mark.parametrize(
    "prefix, dtype, changes, target, t_eps",
    [
        ("net.", torch.float32, {}, "x", 0.07),
        ("module.net.", torch.bfloat16, {"flow_matching": True}, "v", 0.07),
        ("module.net.", torch.float32, {"flow_matching": None, "t_eps": None}, "x", 0.05),
    ],
)
def test_the_published_checkpoint_is_read_exactly(
    given, digit_file, tmp_path, prefix, dtype, changes, target, t_eps
):
    torch.save(published(prefix, dtype, **changes), tmp_path / "any.pth")
    call = given("--sample", tmp_path / "any.pth", "--vae", digit_file)
    expected = {"target": target, "t_eps": t_eps, "steps": 50, "cfg": 2.9, "interval": [0.1, 1.0]}
    assert call.items() >= expected.items()
    assert call["noise"].shape == (2, 128, 2, 2)
    weights = {name: weight.to(dtype).float() for name, weight in random_weights().items()}
    torch.testing.assert_close(dict(call["net"].state_dict()), weights, rtol=0, atol=0)


def test_the_published_checkpoint_is_fetched_by_its_name(given, digit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(published(), "checkpoint-last.pth")
    fetch = mock.Mock(return_value=str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert given("--sample", "dawn-neo/JLT", "--vae", digit_file)["t_eps"] == 0.07
    # Not also ckpt.pt, which is four times as large.
    patterns = ["ema.safetensors", "checkpoint-last.pth"]
    fetch.assert_called_once_with("dawn-neo/JLT", allow_patterns=patterns)


def test_without_a_network_a_line_says_how_to_fetch_it(cli):
    by_hand = "hf download nobody/none "
    one_line(cli(jlt, "--sample", "nobody/none", "--n", 1), "nobody/none: not ", by_hand)


NAN = torch.full((128,), torch.nan)


def test_half_a_checkpoint_is_refused_and_left_alone(train, finished):
    os.truncate(finished / "ckpt.pt", 100_000)
    before = files_of(finished)
    one_line(train("--steps", 5), "ckpt.pt: damaged, or no checkpoint")
    assert files_of(finished) == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optimizer": PickledPrint()}, "any.pth: damaged, or no checkpoint"),
        ({"args": Namespace()}, "any.pth: holds no JLT"),
        ({"model_ema1": random_weights() | {"blocks.1.mlp.w3.bias": NAN}}, "holds no JLT"),
        ({"model_ema1": random_weights() | {"final_layer.linear.bias": NAN}}, "not finite"),
        ({"model_ema1": random_weights(channels=8)}, "decodes 128 channels, not 8"),
    ],
)
def test_anything_else_is_refused_and_runs_no_code(
    cli, digit_file, tmp_path, monkeypatch, change, words
):
    monkeypatch.chdir(tmp_path)
    torch.save(published() | change, "any.pth")
    result = cli(jlt, "--sample", "any.pth", "--vae", digit_file, "--n", 1)
    one_line(result, words)
    assert "must not run" not in result[1]
    assert not list(tmp_path.rglob("*.png"))


# =============================================================== geometry and demo
def numbers_in(line):
    return np.array([float(word.rstrip("%")) for word in line.split() if word[0] in "-0123456789"])


def test_geometry_prints_the_formulas_of_a_cache(cli, digits):
    _, out, _ = cli(jlt, "--geometry", digits)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if line)
    # 600 digits make 2,400 positions.
    tokens = read_all(encode.LatentDataset(digits))[0].movedim(1, -1).flatten(0, 2).double()
    lam = torch.linalg.eigvalsh(tokens.T.cov()).flip(0)
    v = lam + 1
    expected = [v.sum() ** 2 / v.square().sum(), 1 + sum((v / v.sum()).cumsum(0) < 0.9)]
    np.testing.assert_allclose(numbers_in(rows["v"]), expected, atol=0.06)
    expected = [*jlt.gaussian_risk(lam, 0.5).values(), *jlt.gaussian_gain(lam[-1], 0.5)]
    np.testing.assert_allclose(numbers_in(rows["0.5"]), expected, atol=1e-3)


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    """A demo of few digits, in an empty folder. -> the words of its command line"""
    monkeypatch.setattr(encode, "cache_digits", functools.partial(encode.cache_digits, n=200))
    monkeypatch.setattr(jlt, "digit_judge", functools.partial(jlt.digit_judge, steps=30))
    monkeypatch.setattr(jlt, "demo", functools.partial(jlt.demo, n=300))
    monkeypatch.chdir(tmp_path)
    sizes = "--demo --depth 1 --hidden-size 32 --steps 40 --sample-steps 2 --ema 0.9"
    return sizes.split()


def test_the_demo_compares_x_and_v(cli, small_demo, monkeypatch):
    _, out, _ = cli(jlt, *small_demo)
    x, v = (encode.read_settings(Path("runs/demo") / target) for target in "xv")
    assert [name for name in x if x[name] != v[name]] == ["target"]
    table = [line for line in out.splitlines() if line.endswith("%")]
    assert [line[:12].strip() for line in table] == ["real", "predicts x", "predicts v"]
    # Two rows of each, with names at the left.
    rows = pixels_of("runs/demo/demo.png").reshape(3, 192, 170 + 960, 3)
    assert rows[:, :, :170].min((1, 2, 3)).max() < 100
    notebook = Path(jlt.__file__).with_name("assets") / "experiments.md"
    from_python = r"Ten digits from a run:\n\n```python\n(.*?)```"
    (snippet,) = re.findall(from_python, notebook.read_text(), re.DOTALL)
    exec(snippet, {})
    assert pixels_of("digits.png").shape == (32, 320, 3)
    _, again, _ = cli(jlt, *small_demo)
    assert again.count("from step 40 to 40") == 2
    assert "goes on with the networks" in again and "goes on with" not in out
    assert all(line in again for line in table)


def test_the_demos_numbers_by_hand(cli, small_demo):
    """Of the averages, in features of the judge, against digits that it has not seen."""
    _, out, _ = cli(jlt, *small_demo)
    table = [numbers_in(line[12:]) for line in out.splitlines() if line.endswith("%")]
    images, labels = (part[:600] for part in encode.draw_digits(600, seed=3))
    judge = jlt.digit_judge(*encode.draw_digits(600, seed=2))
    codec = encode.load_vae("runs/digits/codec.safetensors")
    noise = [torch.randn(128, 2, 2, generator=literal_generator(3, 2, 0, i)) for i in range(300)]
    latents = [codec.encode(images[300:] / 127.5 - 1)]
    for target in "xv":
        net = tiny_demo_network(Path("runs/demo") / target)
        arguments = (net, labels[:300], torch.stack(noise), target, 2, 1.5, (0, 1))
        latents.append(jlt.sample(*arguments))
    digits = [images[300:]] + [encode.to_uint8(codec.decode(part)) for part in latents[1:]]

    def features(pictures):
        return judge[:-1](pictures / 127.5 - 1).double()

    def low(part):
        return part[:, 64:].var((0, 2, 3)).sum()

    reference = features(images[:300])
    for row, pictures, part in zip(table, digits, latents, strict=True):
        x = features(pictures)
        distance = fid.frechet_distance(
            x.mean(0), np.cov(x.T), reference.mean(0), np.cov(reference.T)
        )
        right = (judge(pictures / 127.5 - 1).argmax(1) == labels[:300]).double().mean()
        expected = [distance, low(part) / low(latents[0]), 100 * right]
        np.testing.assert_allclose(row, expected, atol=0.06, rtol=0.01)


def tiny_demo_network(run):
    """-> the average of a run of the small demo."""
    net = jlt.JLT(2, 1, 128, hidden_size=32, depth=1, num_heads=1, num_classes=10)
    net.load_state_dict(checkpoint_of(run)["ema"])
    return net


# =============================================================== --init
@pytest.mark.parametrize(
    "classes, kept",
    [(NUMBERS, True), ([], True), (list("abcdefghijkl"), False), (["a", "b"], False)],
)
@pytest.mark.parametrize("layout", ["ours", "published"])
def test_a_run_starts_from_the_average_of_another(
    finished, latents, tmp_path, classes, kept, layout
):
    source, expected = finished, checkpoint_of(finished)["ema"]
    flags = "--target v --depth 2 --num-heads 1"
    if layout == "published":
        source, expected = tmp_path / "any.pth", random_weights()
        flags = "--depth 3 --num-heads 2"
        torch.save(published(), source)
        kept = False  # it has five classes
    # Four times as many positions, which are computed.
    cache = tmp_path / "new"
    labels = LABELS % 2 if len(classes) == 2 else LABELS
    write_latents(cache, latents.repeat(1, 1, 2, 2), labels, classes=classes)
    flags += f" --hidden-size 32 --init {source} --data {cache} --out {tmp_path}/from --device cpu"
    run = jlt.begin(from_flags(flags))
    if not kept:
        table = "y_embedder.embedding_table.weight"
        expected[table] = expected[table][-1:].expand(run.data.num_classes + 1, -1)
    for net in (run.net, run.ema):
        torch.testing.assert_close(dict(net.state_dict()), dict(expected), rtol=0, atol=0)


def test_a_run_that_started_from_another_continues_without_it(train, finished, tmp_path):
    train("--steps", 40)
    flags = ["--init", finished, "--ema", 0.9]
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(*flags, "--steps", 4, out="once")
    train(*flags, "--steps", 2, out="twice")
    shutil.rmtree(finished)
    train(*flags, "--steps", 4, out="twice")
    assert_same_runs(once, twice)
    # A new network's is 2.
    assert 0 < log_of(once)[0]["loss"] < 1.9
    one_line(train(*flags, "--depth", 3, out="twice"), "depth 2 (now 3)")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--init nowhere", "nowhere: no such run folder"),
        ("--init {run} --depth 3", "is another network; it takes --depth 2"),
        ("--init {run} --target x", "is another network; it takes --target v"),
        ("--init {run}", "does not fit"),
        ("--init {run}/log.jsonl", "log.jsonl: damaged"),
    ],
)
def test_what_cannot_start_a_run_is_one_line(train, finished, latents, tmp_path, flags, words):
    cache = write_latents(tmp_path / "narrow", latents[:, :64])
    flags = flags.format(run=finished).split()
    one_line(train(*flags, "--data", cache, out="new"), words)
    assert not (tmp_path / "new").exists()


# =============================================================== README
def test_the_method_in_the_readme_is_that_of_jlt():
    readme = Path(jlt.__file__).with_name("README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("z = eps\n", "kept = t\nz = eps\n"), names)
    net, x, y, eps = (names[name] for name in ("net", "x", "y", "eps"))
    losses = jlt.flow_loss(net, x, y, names["kept"], eps, "x")
    torch.testing.assert_close(names["loss"], losses.mean())
    # A new network says that x is 0. Euler's steps follow it to the floor.
    expected = eps * math.prod(1 - 0.02 / max(1 - i / 50, 0.05) for i in range(50))
    torch.testing.assert_close(names["z"], expected)
