"""Tests of fid.py: python -m pytest test_fid_part.py. CPU, offline; the Inception has random weights."""
import re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import fid
from encode import Stop, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def no_idle_work():
    """The weights are overwritten anyway; drawing 24 million initial ones takes a second each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Conv2d, "reset_parameters", lambda self: None)
        yield


@pytest.fixture(scope="module")
def weights(no_idle_work):
    """A state dict under which activations neither die nor explode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid.Inception, "load_state_dict", lambda self, state: None)
        shapes = {name: x.shape for name, x in fid.Inception({}).state_dict().items()}
    draw, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=draw)
        state[name] = {"conv.weight": lambda: x * (2 / x[0].numel()) ** 0.5, "bn.weight": lambda: 1 + 0.2 * x,
                       "bn.running_var": lambda: (1 + 0.2 * x).clamp(min=0.3), "fc.weight": lambda: 0.1 * x,
                       "bn.num_batches_tracked": lambda: torch.tensor(7)}.get(
                           ".".join(name.split(".")[-2:]), lambda: 0.1 * x)()
    return state


@pytest.fixture(scope="module")
def net(weights):
    return fid.Inception(weights)


@pytest.fixture(scope="module")
def photos(weights, tmp_path_factory):
    """A folder of everything that the command line needs."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    torch.save(weights, root / "zip.pth")
    torch.save(weights, root / "legacy.pth", _use_new_zipfile_serialization=False)      # as the real file is
    images = rng.integers(0, 256, (10, 24, 40, 3), dtype=np.uint8)
    images //= np.arange(1, 11, dtype=np.uint8).reshape(10, 1, 1, 1)     # some dark, some bright
    images[3] = images[3, ..., :1]
    for i, image in enumerate(images):
        path = root / "equal" / f"{i % 2}" / f"{i}.png"                  # searched recursively
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {3: "L", 4: "RGBA"}.get(i, "RGB")
        extra = rng.integers(0, 256, (24, 40, 1), dtype=np.uint8)        # alpha, to be dropped
        Image.fromarray(image[..., 0] if mode == "L" else np.concatenate([image, extra], 2) if mode == "RGBA"
                        else image, mode).save(path)
    np.savez(root / "equal.npz", arr_0=images[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9]])          # the folder's order
    (root / "mixed").mkdir()
    for i in range(10):
        size = (33, 21) if i < 5 else (16 + i, 50)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "mixed" / f"{i}.png")
    return root


# ---------------------------------------------------------------- resize
def resize_by_loops(image):
    """TensorFlow's kernel, one float32 operation at a time. (H, W) uint8 -> (299, 299)."""
    f, (h, w) = np.float32, image.shape

    def taps(size):
        scale = f(size) / f(299)
        places = [f(i) * scale for i in range(299)]
        return [(int(c), min(int(c) + 1, size - 1), c - f(int(c))) for c in places]

    out = np.empty((299, 299), f)
    for i, (top, bottom, dy) in enumerate(taps(h)):
        for j, (left, right, dx) in enumerate(taps(w)):
            a = f(image[top, left]) + (f(image[top, right]) - f(image[top, left])) * dx
            b = f(image[bottom, left]) + (f(image[bottom, right]) - f(image[bottom, left])) * dx
            out[i, j] = (a + (b - a) * dy - f(128)) / f(128)
    return out


@pytest.mark.parametrize("size", [(7, 33), (301, 611)])
def test_resize_is_tensorflows_bit_for_bit(size):
    image = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
    got = fid.tf_resize(torch.from_numpy(image).expand(1, 3, *size))
    assert got.shape == (1, 3, 299, 299) and got.dtype == torch.float32
    assert np.array_equal(got[0, 1].numpy(), resize_by_loops(image))


def test_resize_by_hand():
    x = torch.tensor([[0, 100], [200, 40]], dtype=torch.uint8).expand(1, 3, 2, 2)
    got = fid.tf_resize(x)[0, 0] * 128 + 128
    # Position 75 * 2/299 = 0.502 lies a little right of the middle; from 150 on only the last column is left.
    assert got[0, 0] == 0 and got[299 // 2 + 1, 0] == 200 and (got[0, 150:] == 100).all()
    assert got[0, 75].item() == pytest.approx(100 * 150 / 299, rel=1e-6)
    assert got[75, 75].item() == pytest.approx((1 - 150 / 299) * 100 * 150 / 299 + 150 / 299 * (
        200 - 160 * 150 / 299), rel=1e-6)
    half_pixel = F.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)[0, 0]
    assert (got - half_pixel).abs().max() > 20


def test_resize_keeps_and_drops_pixels_exactly():
    x = torch.randint(0, 256, (2, 3, 299, 598), dtype=torch.uint8)
    assert torch.equal(fid.tf_resize(x), (x[..., ::2].float() - 128) / 128)            # no antialiasing
    with pytest.raises(ValueError):
        fid.tf_resize(x.float())


# ---------------------------------------------------------------- network
def test_state_dict_is_pytorch_fids(net):
    state = net.state_dict()
    assert len(state) == 566 and sum(name.endswith("conv.weight") for name in state) == 94
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5d.branch3x3dbl_3.bn.bias": (96,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6d.branch7x7_3.conv.weight": (192, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_4.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
        "Mixed_7c.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.num_batches_tracked": (), "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(x.numel() for x in state.values()) == 23_885_486
    assert not net.training
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"


FORKS = (["branch1x1"], ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
         ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")], [None, "branch_pool"])
BLOCKS = {   # block: input channels, then the units of each branch; None is the pool
    "Mixed_5c": (256, ["branch1x1"], ["branch5x5_1", "branch5x5_2"],
                 ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [None, "branch_pool"]),
    "Mixed_6a": (288, ["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [None]),
    "Mixed_6c": (768, ["branch1x1"], ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
                 [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)], [None, "branch_pool"]),
    "Mixed_7a": (768, ["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)], [None]),
    "Mixed_7b": (1280, *FORKS),
    "Mixed_7c": (2048, *FORKS)}


def windows(x, pad):
    """3x3 neighbourhoods (B, C, H, W, 9), `pad` outside."""
    return F.pad(x, (1, 1, 1, 1), value=pad).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_against_its_description(net, weights, block):
    """Wiring, strides, padding, pools and batch norm, written out once more from the weights alone."""
    channels, *branches = BLOCKS[block]
    x = torch.randn(2, channels, 7, 7, generator=torch.Generator().manual_seed(2))
    halving = block in ("Mixed_6a", "Mixed_7a")

    def unit(name, x, last):
        w, *bn = (weights[f"{block}.{name}.{key}"] for key in (
            "conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias"))
        pad = [0, 0] if halving and last else [k // 2 for k in w.shape[2:]]
        x = F.conv2d(x, w, stride=2 if halving and last else 1, padding=pad)
        mean, var, scale, shift = (v[:, None, None] for v in bn)
        return ((x - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)

    def pool(x):
        if halving:
            return windows(x, -torch.inf).amax(-1)[:, :, 1:-1:2, 1:-1:2]
        if block == "Mixed_7c":
            return windows(x, -torch.inf).amax(-1)
        return windows(x, torch.nan).nanmean(-1)                         # the padding does not count

    out = []
    for branch in branches:
        h = x
        for step in branch:
            names = step if isinstance(step, tuple) else (step,)
            h = torch.cat([unit(name, h, step == branch[-1]) if name else pool(h) for name in names], 1)
        out.append(h)
    with torch.inference_mode():
        torch.testing.assert_close(net.get_submodule(block)(x), torch.cat(out, 1), rtol=1e-4, atol=1e-4)


def test_features_and_logits(net):
    x = torch.randint(0, 256, (2, 3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    seen = {}
    with net.Mixed_7c.register_forward_hook(lambda module, inputs, output: seen.update(map=output)):
        features, logits = net(x)
    assert seen["map"].shape == (2, 2048, 8, 8) and logits.shape == (2, 1008)
    torch.testing.assert_close(features, seen["map"].flatten(2).mean(2))
    with torch.inference_mode():
        torch.testing.assert_close(logits, net.fc(features) - net.fc.bias)
    assert net.fc.bias.abs().max() > 0.1
    assert features.isfinite().all() and features.std(0).mean() > 1e-3


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "list", "text", "empty", "code"])
def test_other_weights_are_refused(weights, tmp_path, change, capsys):
    path, state = tmp_path / "w.pth", dict(weights)
    if change == "missing":
        del state["Mixed_6b.branch7x7_2.conv.weight"]
    elif change == "shape":                                              # torchvision's own classifier
        state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 2048), torch.zeros(1000)
    elif change == "unknown":
        state["epoch"] = 3
    if change in ("text", "empty"):
        path.write_text("no weights" * (change == "text"))
    else:
        torch.save({"list": [1, 2], "code": Code()}.get(change, state), path)
    with pytest.raises(Stop, match="w.pth"):
        fid.Inception(path)
    if change in ("missing", "shape", "unknown"):
        with pytest.raises(Stop):
            fid.Inception(state)
    assert capsys.readouterr() == ("", "")                               # so no code was run


# ---------------------------------------------------------------- scores
def gaussian(rng, d):
    a = rng.normal(size=(d, d))
    return rng.normal(size=d), a @ a.T


def test_frechet_closed_forms():
    rng = np.random.default_rng(4)
    (m1, s1), (m2, s2) = gaussian(rng, 12), gaussian(rng, 12)
    assert fid.frechet_distance(m1, s1, m2, s1) == pytest.approx(((m1 - m2) ** 2).sum(), rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9)
    a, b = rng.uniform(size=12), rng.uniform(size=12)
    truth = ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(m1, np.diag(a), m1, np.diag(b)) == pytest.approx(truth, rel=1e-9)
    s1, s2 = np.array([[2., 1.], [1., 3.]]), np.array([[5., -2.], [-2., 1.]])
    assert not np.allclose(s1 @ s2, s2 @ s1)
    truth = 1 + 4 + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance([0, 0], s1, [1, 2], s2) == pytest.approx(truth, rel=1e-12)
    low = np.diag([1., 0., 0.])                                          # fewer samples than dimensions
    assert fid.frechet_distance(np.zeros(3), low, np.zeros(3), np.eye(3)) == pytest.approx(1 + 3 - 2)


@pytest.mark.parametrize("broken", [
    lambda m, s: (m[:2], s), lambda m, s: (m, s[:2]), lambda m, s: (m[None], s), lambda m, s: (m * np.nan, s),
    lambda m, s: (m, s + np.inf)])
def test_frechet_refuses(broken):
    m, s = np.zeros(3), np.eye(3)
    for arguments in ((m, s, *broken(m, s)), (*broken(m, s), m, s)):
        with pytest.raises(ValueError):
            fid.frechet_distance(*arguments)


def test_inception_score_bounds():
    assert fid.inception_score(np.zeros((40, 9))) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    certain = torch.eye(5).repeat(20, 1) * 2000                          # most probabilities underflow to 0
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(5)
    for bad in (torch.zeros(9, 4), torch.full((20, 4), torch.nan)):
        with pytest.raises(ValueError):
            fid.inception_score(bad)


def score_by_loops(logits, splits, order):
    p = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    p = (p / p.sum(1, keepdims=True))[order]
    scores = []
    for part in (p[k * len(p) // splits:(k + 1) * len(p) // splits] for k in range(splits)):
        kl = [sum(a * np.log(a / b) for a, b in zip(row, part.mean(0))) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.sqrt(np.mean((scores - np.mean(scores)) ** 2))


def test_inception_score_by_loops_and_shuffled():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(53, 6)) + 4 * np.eye(6)[np.sort(rng.integers(0, 6, 53))]   # ordered by class
    shuffled = np.random.RandomState(2020).permutation(53)
    assert fid.inception_score(logits) == pytest.approx(score_by_loops(logits, 10, shuffled), rel=1e-9)
    in_order = score_by_loops(logits, 10, np.arange(53))[0]
    assert in_order < 0.8 * fid.inception_score(torch.from_numpy(logits))[0]


@pytest.mark.parametrize("offset", [0, 1e6])
def test_statistics_do_not_depend_on_batches(offset):
    x = np.random.default_rng(6).normal(size=(157, 12)) * np.arange(1, 13) + offset
    for sizes in ([157], [1] * 157, [100, 57], [1, 5, 40, 111]):
        s = fid.Statistics(dim=12)
        for part in np.split(x, np.cumsum(sizes)[:-1]):
            s.update(torch.from_numpy(part))
        assert s.n == 157
        np.testing.assert_allclose(s.mean, x.mean(0), rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(s.cov, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)  # np.cov: over n - 1
    for bad in (np.full((2, 12), np.nan), np.full((2, 12), np.inf), np.zeros((2, 11)), np.zeros((0, 12))):
        with pytest.raises(Stop):
            s.update(bad)
    assert s.n == 157


def test_statistics_of_two():
    s = fid.Statistics(2)
    s.update(np.array([[0., 1.]]))
    s.update(np.array([[2., 1.]]))
    np.testing.assert_allclose(s.mean, [1, 1])
    np.testing.assert_allclose(s.cov, [[2, 0], [0, 0]])                  # (1 + 1) / (2 - 1)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(12, 5, 7, 3), (12, 5, 7, 4), (12, 5, 7, 1), (12, 5, 7)])
def test_npz_of_images(tmp_path, save, shape):
    images = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=images)
    stream = fid.read_images(tmp_path / "x.npz", 1)
    assert next(stream) == 12
    rgb = images[..., :3] if shape[3:] > (1,) else np.repeat(images.reshape(12, 5, 7, 1), 3, 3)
    assert np.array_equal(np.stack(list(stream)), rgb)


def test_folder_is_decoded_in_order_and_not_far_ahead(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(fid, "list_images", lambda folder: [str(i) for i in range(400)])
    monkeypatch.setattr(fid, "open_rgb", lambda p: opened.append(p) or np.full((2, 2, 3), int(p.name)))
    stream = fid.read_images(tmp_path, 4)
    assert next(stream) == 400 and not opened
    first = next(stream)
    assert len(opened) <= 128
    assert [image[0, 0, 0] for image in (first, *stream)] == list(range(400)) and len(opened) == 400


def test_reference_files(tmp_path):
    mu, sigma = np.arange(2048, dtype=np.float32), np.eye(2048)
    np.savez(tmp_path / "a.npz", ref_mu=mu, ref_sigma=sigma)
    images = np.zeros((10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "b.npz", arr_0=images, mu=mu, sigma=sigma, n=33)                 # both, like ADM's
    np.savez(tmp_path / "c.npz", arr_0=images)
    for name, n in (("a.npz", None), ("b.npz", 33)):
        got = fid.read_statistics(tmp_path / name)
        assert np.array_equal(got[0], mu) and np.array_equal(got[1], sigma) and got[2] == n
    assert fid.read_statistics(tmp_path / "c.npz") is None


# ---------------------------------------------------------------- the command line
def command(folder, *arguments):
    return subprocess.run([sys.executable, HERE / "fid.py", *arguments], cwd=folder, capture_output=True,
                          text=True)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
    run(fid.main)


def test_command_line(photos, monkeypatch, capsys):
    done = command(photos, "mixed", "--save", "saved.npz", "--weights", "zip.pth", "--device", "cpu")
    assert done.returncode == 0
    assert done.stdout == "n = 10 (mixed) | zip.pth, TF1 resize | saved to saved.npz\n"
    with np.load(photos / "saved.npz") as file:
        assert {key: (file[key].dtype, file[key].shape) for key in ("mu", "sigma")} == {
            "mu": (np.float32, (2048,)), "sigma": (np.float64, (2048, 2048))}
        assert file["n"] == 10 and "mixed" in str(file["source"])
    assert not list(photos.glob(".tmp*"))

    done = command(photos, "equal.npz", "saved.npz", "--weights", "legacy.pth", "--device", "cpu")
    assert done.returncode == 0 and "Traceback" not in done.stderr and "10/10" in done.stderr
    assert sum(line.startswith("fid.py: ") for line in done.stderr.splitlines()) == 2    # both sets are small
    line = re.fullmatch(r"FID (\S+) \| Inception Score \S+ \+- \S+ \| n = 10 \(equal\.npz\) against n = 10 "
                        r"\(saved\.npz\) \| legacy\.pth, TF1 resize\n", done.stdout)
    assert float(line[1]) > 1

    # The same images from a folder (one gray, one with alpha), against the images behind saved.npz.
    monkeypatch.chdir(photos)
    call(monkeypatch, "equal", "mixed", "--weights", "zip.pth", "--device", "cpu")
    again = done.stdout.replace("equal.npz", "equal").replace("saved.npz", "mixed").replace("legacy", "zip")
    assert capsys.readouterr().out == again


def savez(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


IMAGES = np.zeros((10, 4, 4, 3), np.uint8)
BAD_SAMPLES = {
    "missing.npz": None,
    "text.npz": lambda path: path.write_text("no zip"),
    "empty.npz": lambda path: path.write_bytes(b""),
    "float.npz": savez(arr_0=IMAGES.astype(np.float32)),
    "object.npz": savez(arr_0=np.array([{}] * 10, dtype=object)),
    "channels.npz": savez(arr_0=np.zeros((10, 4, 4, 2), np.uint8)),
    "channels_first.npz": savez(arr_0=np.zeros((10, 3, 4, 4, 1), np.uint8)),
    "fortran.npz": savez(arr_0=np.asfortranarray(IMAGES)),
    "latents.npz": savez(latents=IMAGES),
    "few.npz": savez(arr_0=IMAGES[:9]),
    "truncated.npz": lambda path: (savez(arr_0=IMAGES)(path), path.write_bytes(path.read_bytes()[:300])),
    "photo.png": lambda path: Image.new("RGB", (9, 9)).save(path),
    "empty": lambda path: path.mkdir(),
    "notes": lambda path: (path.mkdir(), (path / "readme.txt").write_text("no images here")),
}
SIGMA = np.eye(2048)
BAD_REFERENCES = {
    "none.npz": None,
    "dino.npz": savez(mu=np.zeros(768), sigma=np.eye(768)),
    "nan.npz": savez(mu=np.full(2048, np.nan), sigma=SIGMA),
    "half.npz": savez(mu=np.zeros(2048)),
    "pickle.npz": savez(mu=np.array([Code()], dtype=object), sigma=SIGMA),
    "empty_reference": lambda path: path.mkdir(),
}
BAD_FLAGS = ["--batch 0", "--batch 1.5", "--workers 0", "--device tpu", "--device cuda:77", "--frobnicate",
             "--save equal.npz", "--save nowhere/x.npz", "--weights none.pth", "--weights equal.npz",
             "--weights ."]


@pytest.mark.parametrize("case", [*BAD_SAMPLES, *BAD_REFERENCES, *BAD_FLAGS])
def test_bad_input_is_one_line(photos, tmp_path, monkeypatch, capsys, case):
    make = (BAD_SAMPLES | BAD_REFERENCES).get(case)
    if make:
        make(tmp_path / case)
    arguments = ([tmp_path / case, "mixed"] if case in BAD_SAMPLES else
                 ["equal.npz", tmp_path / case] if case in BAD_REFERENCES else ["equal.npz", *case.split()])
    arguments += ["--weights", "zip.pth"] * ("--weights" not in case)
    before = (photos / "equal.npz").read_bytes()
    monkeypatch.chdir(photos)
    monkeypatch.setattr(fid, "extract", None)                            # refused before anything is computed
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("fid.py: ") and err.count("\n") == 1 and "Traceback" not in err
    assert case.split()[-1] in err                                       # says what it is about
    assert (photos / "equal.npz").read_bytes() == before


def test_unreadable_image_is_named(photos, tmp_path, monkeypatch, capsys):
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, tmp_path, "--weights", photos / "zip.pth")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("fid.py: ") and "7.png" in line


def test_damaged_archive_is_not_scored(photos, tmp_path, monkeypatch, capsys):
    data = bytearray((photos / "equal.npz").read_bytes())
    data[5000] ^= 255                                                    # the checksum of the zip tells
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path / "damaged.npz", "--weights", photos / "zip.pth")
    assert "damaged.npz" in capsys.readouterr().err


def test_offline_without_weights(photos, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, photos / "equal.npz")
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and err.count("\n") == 1 and "--weights" in err and fid.URL in err


def test_bad_input_in_a_process_of_its_own(photos):
    done = command(photos, "none.npz", "--save", "new.npz")
    assert done.returncode == 2 and done.stdout == "" and not (photos / "new.npz").exists()
    assert re.fullmatch(r"fid\.py: none\.npz: .*\n", done.stderr)
