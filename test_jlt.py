"""What must hold of JLT, checked from first principles: exact values by hand or in float64, properties, and the
command lines as a user types them. CPU, offline, under 3 minutes on 2 cores:  pytest"""

import contextlib, faulthandler, importlib, json, math, os, pickle, re, shutil, signal, subprocess, sys, threading, time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = (
    "1"  # two threads on two busy cores wait for each other more than they work
)
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

import encode
import fid
import jlt

HERE = Path(__file__).parent
TINY = "--depth 2 --hidden-size 32 --batch 8 --micro-batch 4 --device cpu".split()


# ---------------------------------------------------------------- helpers
def command(script, *args, processes=1, **kwargs):
    """A command line in a process of its own; torchrun where `processes` says so."""
    launch = (
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            str(20000 + os.getpid() % 10000),
            "--",
        ]
        if processes > 1
        else []
    )
    return [sys.executable, *launch, str(HERE / script), *map(str, args)], dict(
        env=dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def call(script, *args, **kwargs):
    line, options = command(script, *args, **kwargs)
    return subprocess.run(line, **options)


@pytest.fixture
def cli(monkeypatch, capsys):
    """The same command line inside this process: cli(module, *arguments) -> status, stdout, stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(module, *args):
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        status = 0
        try:
            encode.run(module.main)
        except SystemExit as e:
            status = e.code
        for s, handler in handlers:
            signal.signal(s, handler)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def refused(result, *words, status=2):
    """One line, naming the program and all of `words`; no traceback."""
    code, out, err = (
        result if isinstance(result, tuple) else (result.returncode, result.stdout, result.stderr)
    )
    lines = [
        line for line in err.splitlines() if line.startswith(("jlt.py:", "encode.py:", "fid.py:"))
    ]
    assert code == status and len(lines) == 1 and "Traceback" not in err, (code, err)
    assert all(str(word) in lines[0] for word in words), lines[0]


def randomized(net, seed=0):
    """Every parameter random, so that no zero hides a path. -> net"""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 2)
    return net


def small(**kwargs):
    return jlt.JLT(
        **(
            dict(input_size=4, in_channels=8, hidden_size=32, depth=2, num_heads=2, num_classes=3)
            | kwargs
        )
    )


def write_cache(folder, n=24, shape=(8, 4, 4), classes=3, **changes):
    g = torch.Generator().manual_seed(1)
    tensors = {
        "latents": torch.randn(n, *shape, generator=g).half(),
        "latents_flip": torch.randn(n, *shape, generator=g).half(),
        "labels": (torch.arange(n) % classes).int(),
    } | changes
    folder.mkdir(exist_ok=True, parents=True)
    save_file(tensors, folder / "latents_00000.safetensors")
    return folder


def weights_of(run, part="model"):
    return torch.load(Path(run, "ckpt.pt"), weights_only=True)[part]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A small FLUX.2 autoencoder with random weights and BatchNorm statistics."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(0)
    model = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32))
    model.bn.running_mean.normal_(0, 0.1)
    model.bn.running_var.uniform_(0.05, 0.15)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Class folders with every kind of picture, and some that are none."""
    root, g = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for name in ("b_cats", "a_dogs", "c_empty", "d_odd"):
        (root / name).mkdir()
    for i in range(6):
        Image.fromarray(g.randint(0, 256, (40 + 9 * i, 70, 3), dtype=np.uint8)).save(
            root / "b_cats" / f"{i}.JPEG"
        )
        Image.fromarray(g.randint(0, 256, (33, 35 + 20 * i, 3), dtype=np.uint8)).save(
            root / "a_dogs" / f"{i}.png"
        )
    rgb, odd = Image.fromarray(g.randint(0, 256, (50, 50, 3), dtype=np.uint8)), root / "d_odd"
    rgb.convert("L").save(odd / "gray.png")
    rgb.convert("CMYK").save(odd / "cmyk.jpg")
    rgb.convert("P").save(odd / "palette.gif")
    rgb.convert("RGBA").save(odd / "alpha.png")
    Image.fromarray(g.randint(0, 65536, (50, 60), dtype=np.uint16)).save(odd / "deep.png")
    rgb.resize((3, 5)).save(odd / "tiny.png")
    (odd / "UPPER.JPG").write_bytes((root / "b_cats" / "0.JPEG").read_bytes())
    (odd / "cut.jpg").write_bytes((root / "b_cats" / "0.JPEG").read_bytes()[:900])
    (odd / "empty.png").write_bytes(b"")
    (odd / "new\nline.png").write_bytes(b"no picture")
    (odd / "notes.txt").write_text("not a picture by its name")
    return root


# ---------------------------------------------------------------- model
def test_size_and_cost_of_the_published_models():
    with torch.device("meta"):
        b1, b2 = jlt.JLT(), jlt.JLT(patch_size=2)
    assert sum(p.numel() for p in b1.parameters()) == 130_508_672
    assert jlt.forward_flops(b1) == pytest.approx(46.09e9, rel=1e-3)
    assert jlt.forward_flops(b2) == pytest.approx(11.21e9, rel=1e-3)


def test_state_dict_has_the_names_of_the_release():
    with torch.device("meta"):
        keys = set(jlt.JLT(depth=1).state_dict())
    assert keys == {
        f"{stem}.{kind}"
        for kind in ("weight", "bias")
        for stem in (
            "x_embedder.proj",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "blocks.0.attn.qkv",
            "blocks.0.attn.proj",
            "blocks.0.mlp.w12",
            "blocks.0.mlp.w3",
            "blocks.0.adaLN_modulation.1",
            "final_layer.linear",
            "final_layer.adaLN_modulation.1",
        )
    } | {
        f"{stem}.weight"
        for stem in (
            "y_embedder.embedding_table",
            "blocks.0.norm1",
            "blocks.0.norm2",
            "blocks.0.attn.q_norm",
            "blocks.0.attn.k_norm",
            "final_layer.norm_final",
        )
    }


def test_initialization():
    torch.manual_seed(0)
    net = small(hidden_size=128, in_channels=16).requires_grad_(False)
    z = torch.randn(2, 16, 4, 4)
    assert net(z, torch.tensor([0.3, 0.9]), torch.tensor([0, 3])).abs().max() == 0
    bound = lambda fan_in, fan_out: math.sqrt(6 / (fan_in + fan_out))
    assert net.x_embedder.proj.weight.abs().max() == pytest.approx(bound(16, 128), rel=0.02)
    assert net.blocks[0].attn.qkv.weight.abs().max() == pytest.approx(bound(128, 384), rel=0.02)
    assert net.t_embedder.mlp[2].weight.std() == pytest.approx(0.02, rel=0.05)
    assert net.y_embedder["embedding_table"].weight.std() == pytest.approx(0.02, rel=0.15)
    assert all(p.abs().max() == 0 for k, p in net.named_parameters() if k.endswith("bias"))
    assert all(
        p.abs().max() == 0
        for k, p in net.named_parameters()
        if "adaLN" in k or "final_layer.linear" in k
    )


def reference_forward(w, z, t, y, heads, patch):
    """DESIGN section 2 once more, in float64 numpy with loops over heads and tokens where that is plainest."""
    w = {k: v.double().numpy() for k, v in w.items()}
    linear = lambda h, name: (
        h @ w[name + ".weight"].reshape(len(w[name + ".bias"]), -1).T + w[name + ".bias"]
    )
    silu = lambda h: h / (1 + np.exp(-h))
    rms = lambda h, name: h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-6) * w[name + ".weight"]
    c, side = z.shape[0], z.shape[1] // patch
    places = [(i, j) for i in range(side) for j in range(side)]
    x = linear(
        np.stack(
            [
                z[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
                for i, j in places
            ]
        ),
        "x_embedder.proj",
    )
    angles = t * np.exp(-np.log(10000) * np.arange(128) / 128)
    cond = linear(
        silu(linear(np.r_[np.cos(angles), np.sin(angles)], "t_embedder.mlp.0")), "t_embedder.mlp.2"
    )
    cond = silu(cond + w["y_embedder.embedding_table.weight"][y])
    width = x.shape[1]
    d = width // heads

    def turned(u):  # (tokens, d): first half of the channels by row, second by column
        out = np.empty_like(u)
        for n, place in enumerate(places):
            for half in (0, 1):
                for k in range(d // 4):
                    a = place[half] * 10000 ** (-2 * k / (d / 2))
                    p, q = half * d // 2 + 2 * k, half * d // 2 + 2 * k + 1
                    out[n, p] = u[n, p] * np.cos(a) - u[n, q] * np.sin(a)
                    out[n, q] = u[n, q] * np.cos(a) + u[n, p] * np.sin(a)
        return out

    for b in range(len({k.split(".")[1] for k in w if k.startswith("blocks.")})):
        block = f"blocks.{b}."
        m = linear(cond, block + "adaLN_modulation.1")
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            m[k * width : (k + 1) * width] for k in range(6)
        )
        qkv = linear(rms(x, block + "norm1") * (1 + scale1) + shift1, block + "attn.qkv")
        heads_out = []
        for h in range(heads):
            q, k, v = (qkv[:, s * width + h * d : s * width + (h + 1) * d] for s in range(3))
            q, k = turned(rms(q, block + "attn.q_norm")), turned(rms(k, block + "attn.k_norm"))
            a = np.exp(q @ k.T / np.sqrt(d))
            heads_out.append(a / a.sum(1, keepdims=True) @ v)
        x = x + gate1 * linear(np.concatenate(heads_out, 1), block + "attn.proj")
        m = linear(rms(x, block + "norm2") * (1 + scale2) + shift2, block + "mlp.w12")
        x = x + gate2 * linear(
            silu(m[:, : m.shape[1] // 2]) * m[:, m.shape[1] // 2 :], block + "mlp.w3"
        )
    m = linear(cond, "final_layer.adaLN_modulation.1")
    x = linear(rms(x, "final_layer.norm_final") * (1 + m[width:]) + m[:width], "final_layer.linear")
    out = np.empty_like(z)
    for n, (i, j) in enumerate(places):  # a token's output is (row, column, channel)
        out[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = (
            x[n].reshape(patch, patch, c).transpose(2, 0, 1)
        )
    return out


@pytest.mark.parametrize("patch", [1, 2])
def test_forward_equals_an_independent_float64_one(patch):
    net = randomized(small(patch_size=patch, num_heads=2))
    z, t, y = (
        torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0.0, 0.37, 1.0]),
        torch.tensor([0, 3, 2]),
    )
    out = net(z, t, y)
    for i in range(3):
        expected = reference_forward(
            net.state_dict(), z[i].double().numpy(), t[i].double().item(), int(y[i]), 2, patch
        )
        assert np.abs(out[i].detach().numpy() - expected).max() < 2e-5 * np.abs(expected).max()


def test_tokens_mix():
    net = randomized(small())
    z, t, y = torch.randn(1, 8, 4, 4), torch.tensor([0.5]), torch.tensor([1])
    moved = z.clone()
    moved[0, :, 1, 2] += 1
    change = (net(z, t, y) - net(moved, t, y)).abs().amax(1)[0]
    assert (change > 1e-6).all()


def test_rope_depends_on_relative_position_only():
    cos, sin = jlt.rope_tables(5, 16)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    at = lambda u, i, j: jlt.rotate(u, cos[5 * i + j].double(), sin[5 * i + j].double())
    logit = lambda a, b: at(q, *a) @ at(k, *b)
    assert logit((0, 1), (2, 2)) == pytest.approx(float(logit((2, 3), (4, 4))), abs=1e-5)
    assert abs(logit((0, 1), (2, 2)) - logit((0, 1), (2, 3))) > 1e-3
    assert abs(logit((0, 1), (2, 2)) - logit((0, 1), (3, 2))) > 1e-3
    assert torch.equal(at(q, 0, 0), q)


def test_bottleneck_and_refused_shapes():
    net = small(bottleneck=4)
    assert net.x_embedder.proj1.weight.shape == (4, 8, 1, 1) and net.x_embedder.proj1.bias is None
    assert net(torch.randn(1, 8, 4, 4), torch.ones(1), torch.zeros(1).long()).shape == (1, 8, 4, 4)
    for wrong in ({"patch_size": 3}, {"num_heads": 3}, {"hidden_size": 12, "num_heads": 2}):
        with pytest.raises(fid.Stop):
            small(**wrong)


def test_named_models_and_derived_settings():
    for name, (depth, width, heads, patch) in {
        "B/1": (12, 768, 12, 1),
        "L/2": (24, 1024, 16, 2),
        "XL/1": (28, 1152, 16, 1),
    }.items():
        cfg = jlt.resolve(jlt.Config(model=name))
        assert (cfg.depth, cfg.hidden_size, cfg.num_heads, cfg.patch_size) == (
            depth,
            width,
            heads,
            patch,
        )
    assert cfg.lr == pytest.approx(2e-4) and cfg.micro_batch == 256 and cfg.out == "runs/XL-1-x"
    for width, heads in ((64, 1), (96, 1), (128, 2), (192, 3), (200, 2), (256, 4)):
        assert jlt.resolve(jlt.Config(hidden_size=width)).num_heads == heads
    assert jlt.resolve(jlt.Config(batch=600)).micro_batch == 200


# ---------------------------------------------------------------- loss
def test_loss_identities_in_float64():
    g = torch.Generator().manual_seed(0)
    x, eps, out = torch.randn(3, 6, 2, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.0, 0.02, 0.3, 0.7, 0.97, 1.0], dtype=torch.float64)
    loss = lambda target: jlt.flow_loss(
        lambda z, t, y: out, x, None, t, eps, target, per_image=True
    )
    mean = lambda a: a.square().mean((1, 2, 3))
    torch.testing.assert_close(
        loss("x"), mean(out - x) / (1 - t).clamp(min=0.05) ** 2, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        loss("eps"), mean(out - eps) / t.clamp(min=0.05) ** 2, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(loss("v"), mean(out - (x - eps)), rtol=1e-12, atol=0)
    assert jlt.flow_loss(lambda z, t, y: out, x, None, t, eps, "x") == pytest.approx(
        loss("x").mean().item(), rel=1e-12
    )


def test_the_network_sees_the_path_and_perfect_outputs_read_as_the_velocity():
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, 2, 4, 4, generator=g, dtype=torch.float64)
    t, seen = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), []
    jlt.flow_loss(lambda *a: seen.extend(a) or x, x, torch.tensor([1, 2, 0]), t, eps)
    z = seen[0]
    torch.testing.assert_close(z[2], 0.9 * x[2] + 0.1 * eps[2])
    assert seen[1] is t and seen[2].tolist() == [1, 2, 0]
    for target, out in {"x": x, "eps": eps, "v": x - eps}.items():
        torch.testing.assert_close(jlt.velocity(out, z, t, target), x - eps)
        assert jlt.flow_loss(lambda z, t, y: out, x, None, t, eps, target) == 0
    with pytest.raises(fid.Stop):
        jlt.velocity(x, z, t, "flow")


# ---------------------------------------------------------------- sampler
LAM = torch.tensor([0.01, 0.25, 1.0, 4.0], dtype=torch.float64).view(1, 4, 1, 1)


def gaussian_net(target):
    """The exact E[target | z] for x ~ N(0, LAM), for which the ODE carries noise to sqrt(LAM) * noise."""

    def net(z, t, y):
        t = t.view(-1, 1, 1, 1)
        d = t**2 * LAM + (1 - t) ** 2
        return {"x": t * LAM * z, "eps": (1 - t) * z, "v": (t * LAM - (1 - t)) * z}[target] / d

    return net


@pytest.mark.parametrize("method, order", [("heun", 2), ("euler", 1)])
def test_convergence_order_on_a_known_field(method, order):
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = [
        (
            jlt.sample(gaussian_net("v"), torch.zeros(2).long(), noise, "v", n, 1.0, method=method)
            - LAM.sqrt() * noise
        )
        .abs()
        .max()
        for n in (100, 200)
    ]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.2)


def test_all_targets_sample_alike_from_perfect_predictions():
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = [
        jlt.sample(gaussian_net(target), torch.zeros(2).long(), noise, target, 40, 1.0, t_eps=1e-9)
        for target in ("x", "eps", "v")
    ]
    torch.testing.assert_close(z[0], z[2])
    torch.testing.assert_close(
        z[1][:, 1:], z[2][:, 1:], rtol=0, atol=0.15
    )  # eps says nothing at t = 0


class Probe:
    """A network that writes down every call: (time, rows, labels)."""

    num_classes = 7

    def __init__(self):
        self.calls = []

    def __call__(self, z, t, y):
        assert (t == t[0]).all() and len(z) == len(t) == len(y)
        self.calls.append((t[0].item(), len(z), y.tolist()))
        return torch.where((y == 7).view(-1, 1, 1, 1), 1.0, 3.0).expand_as(z)


def probe(steps=50, cfg=2.9, interval=(0.1, 1.0), method="heun"):
    net = Probe()
    z = jlt.sample(
        net, torch.tensor([5, 2]), torch.zeros(2, 1, 1, 1), "v", steps, cfg, interval, method
    )
    return net.calls, z


def test_heun_ends_with_euler_and_guidance_costs_187_of_198_calls():
    calls, _ = probe()
    assert len(calls) == 99 and sum(rows for _, rows, _ in calls) // 2 == 187
    times = [t for t, _, _ in calls]
    assert times == pytest.approx(
        [k / 50 for i in range(49) for k in (i, i + 1)] + [49 / 50], abs=1e-6
    )
    assert {tuple(y) for _, rows, y in calls if rows == 4} == {(5, 2, 7, 7)}
    assert sum(rows for _, rows, _ in probe(cfg=1.0)[0]) == 2 * 99


@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100, 250])
def test_the_interval_is_open_and_tested_at_each_evaluation(steps):
    low, high = steps // 10, steps * 3 // 5
    on = {
        round(t * steps)
        for t, rows, _ in probe(steps, interval=(low / steps, high / steps))[0]
        if rows == 4
    }
    assert on == set(range(low + 1, high))
    on = {
        round(t * steps)
        for t, rows, _ in probe(steps, interval=(0.0, high / steps))[0]
        if rows == 4
    }
    assert on == set(range(0, high))


def test_guided_velocity():
    assert (
        probe(1, 2.5, (0.0, 1.0))[1].flatten().tolist() == [1 + 2.5 * (3 - 1)] * 2
    )  # v_u + w (v_c - v_u)
    assert probe(2, 2.5, (0.5, 1.0), "euler")[1].flatten().tolist() == [
        3.0,
        3.0,
    ]  # never above 0.5: v_c


def test_bf16_networks_are_integrated_in_float32():
    answers = iter([1.0, 1.0 + 2**-7, 1.0])  # bf16 could not hold the sum of the first two
    net = lambda z, t, y: torch.full_like(z, next(answers)).bfloat16()
    z = jlt.sample(net, torch.zeros(1).long(), torch.zeros(1, 1, 1, 1), "v", 2, 1.0)
    assert z.item() == (1 + 1 + 2**-7) / 4 + 0.5


def test_noise_of_an_image_depends_on_seed_and_number_only(monkeypatch):
    monkeypatch.setattr(jlt, "sample", lambda net, y, noise, *a, **k: noise)
    net, cpu = small(), torch.device("cpu")
    images = lambda n, first, seed=0: jlt.generate(
        net, torch.zeros(n).long(), first, jlt.Config(seed=seed), cpu
    )
    assert torch.equal(images(6, 0)[4:], images(2, 4)) and not torch.equal(
        images(1, 0), images(1, 1)
    )
    assert not torch.equal(images(1, 0), images(1, 0, seed=1))


# ---------------------------------------------------------------- data order and noise
def test_every_epoch_shows_every_image_once_and_half_are_mirrored(tmp_path):
    n, cfg = 24, jlt.Config(batch=16, micro_batch=4)
    data = encode.LatentDataset(write_cache(tmp_path, n))
    jobs = [(s, m) for s in range(30) for m in range(4)]
    rows = [x for x, _ in jlt.batches(data, cfg, iter(jobs), torch.device("cpu"))]
    keys = {
        tuple(data.item(i, f)[0].flatten()[:4].tolist()): (i, f)
        for i in range(n)
        for f in (False, True)
    }
    seen = [keys[tuple(x.flatten()[:4].tolist())] for x in torch.cat(rows)]
    order = [i for i, _ in seen]
    assert (
        all(sorted(order[e : e + n]) == list(range(n)) for e in range(0, 480, n))
        and order[:n] != order[n : 2 * n]
    )
    assert (
        190 < sum(f for _, f in seen) < 290
        and len({tuple(f for _, f in seen[k : k + 4]) for k in range(0, 480, 4)}) > 10
    )
    again = next(jlt.batches(data, cfg, iter(jobs[17:]), torch.device("cpu")))[
        0
    ]  # no history needed
    assert torch.equal(again, rows[17])


def test_draws_follow_the_paper_and_are_the_same_for_every_target():
    x, y = torch.zeros(40_000, 1, 1, 1), torch.zeros(40_000).long()
    t, eps, dropped = jlt.draws(jlt.Config(target="x"), 3, 1, x, y, 9)
    logit = torch.log(t / (1 - t))
    assert logit.mean() == pytest.approx(-0.8, abs=0.02) and logit.std() == pytest.approx(
        0.8, abs=0.02
    )
    assert eps.mean() == pytest.approx(0, abs=0.02) and eps.std() == pytest.approx(1, abs=0.02)
    assert (dropped == 9).float().mean() == pytest.approx(0.1, abs=0.01) and set(
        dropped.tolist()
    ) == {0, 9}
    assert all(
        torch.equal(a, b)
        for a, b in zip((t, eps, dropped), jlt.draws(jlt.Config(target="v"), 3, 1, x, y, 9))
    )
    for other in (
        jlt.draws(jlt.Config(), 4, 1, x, y, 9),
        jlt.draws(jlt.Config(), 3, 2, x, y, 9),
        jlt.draws(jlt.Config(seed=1), 3, 1, x, y, 9),
    ):
        assert not torch.equal(other[1], eps)


# ---------------------------------------------------------------- training
def test_first_step_is_exactly_adamw_with_warmup_clipping_and_ema(cli, tmp_path):
    cache = write_cache(tmp_path / "cache")
    run = [
        jlt,
        *TINY,
        "--data",
        cache,
        "--out",
        tmp_path / "run",
        "--lr",
        1e-3,
        "--ema",
        0.75,
        "--warmup-epochs",
        3,
        "--log-every",
        1,
    ]
    assert cli(*run, "--steps", 1)[0] == 0
    torch.manual_seed(0)
    net = small(num_heads=1)
    start, data, cfg = (
        dict(net.named_parameters()),
        encode.LatentDataset(cache),
        jlt.Config(batch=8, micro_batch=4),
    )
    before = {k: p.detach().clone() for k, p in start.items()}
    bins = [[] for _ in range(10)]
    for m, (x, y) in enumerate(jlt.batches(data, cfg, iter([(0, 0), (0, 1)]), torch.device("cpu"))):
        t, eps, y = jlt.draws(cfg, 0, m, x, y, 3)
        (losses := jlt.flow_loss(net, x, y, t, eps, per_image=True)).mean().div(2).backward()
        for s, loss in zip(t.tolist(), losses.tolist()):
            bins[int(10 * s)].append(loss)
    norm = torch.stack([p.grad.norm() for p in start.values()]).norm()
    lr = 1e-3 / 9  # 3 epochs of 24 images in batches of 8 are 9 steps of warm-up
    after, ema = weights_of(tmp_path / "run"), weights_of(tmp_path / "run", "ema")
    for k, p in start.items():
        g = p.grad / max(1, norm)
        expected = before[k] - lr * g / (g.abs() + 1e-8)  # Adam's first step, no weight decay
        torch.testing.assert_close(after[k], expected, rtol=0, atol=2e-7)
        torch.testing.assert_close(ema[k], 0.75 * before[k] + 0.25 * after[k], rtol=0, atol=1e-7)
    assert cli(*run, "--steps", 12)[0] == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, 13))
    assert [row["lr"] for row in log] == pytest.approx([1e-3 * min(1, s / 9) for s in range(1, 13)])
    assert log[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert (
        log[0]["loss_by_t"] == [pytest.approx(np.mean(b), rel=1e-4) if b else None for b in bins]
        and 1 < sum(map(bool, bins)) < 10
    )


def test_an_update_clips_at_norm_1_and_averages_afterwards():
    cfg = jlt.resolve(jlt.Config(hidden_size=32, depth=1))
    net, ema, opt = jlt.build(cfg, (8, 4, 4), 3, torch.device("cpu"))
    for scale in (0.01, 100.0):  # within the limit, and far beyond it
        moments = [
            [opt.state[p].get(k, torch.zeros(())).clone() for k in ("exp_avg", "exp_avg_sq")]
            for p in net.parameters()
        ]
        old = [a.clone() for a in ema.parameters()]
        grads = [torch.randn_like(p) * scale / 100 for p in net.parameters()]
        for p, g in zip(net.parameters(), grads):
            p.grad = g.clone()
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert (norm < 1) == (scale < 1) and jlt.update(net, ema, opt, 0.75) == pytest.approx(
            norm.item(), rel=1e-4
        )
        for p, a, b, g, (m, v) in zip(net.parameters(), ema.parameters(), old, grads, moments):
            g = g / max(1, norm)
            torch.testing.assert_close(
                opt.state[p]["exp_avg"], 0.9 * m + 0.1 * g, rtol=1e-4, atol=1e-8
            )
            torch.testing.assert_close(
                opt.state[p]["exp_avg_sq"], 0.95 * v + 0.05 * g * g, rtol=1e-4, atol=1e-12
            )
            torch.testing.assert_close(a, 0.75 * b + 0.25 * p.detach(), rtol=1e-5, atol=1e-7)
            assert p.grad is None and not a.requires_grad


def test_both_targets_start_from_the_same_weights(cli, tmp_path):
    cache = write_cache(tmp_path / "cache")
    for target in ("x", "v"):
        assert (
            cli(
                jlt,
                *TINY,
                "--data",
                cache,
                "--target",
                target,
                "--out",
                tmp_path / target,
                "--steps",
                1,
                "--lr",
                1e-30,
            )[0]
            == 0
        )
    x, v = weights_of(tmp_path / "x"), weights_of(tmp_path / "v")
    assert all(torch.allclose(x[k], v[k], rtol=0, atol=1e-20) for k in x)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twenty uninterrupted steps, on one process."""
    base = tmp_path_factory.mktemp("trained")
    args = [
        *TINY,
        "--data",
        write_cache(base / "cache"),
        "--lr",
        1e-3,
        "--steps",
        20,
        "--save-every",
        10,
        "--ema",
        0.9,
        "--log-every",
        5,
    ]
    assert call("jlt.py", *args, "--out", base / "whole").returncode == 0
    return base, args


def test_killed_and_continued_is_bitwise_the_same(trained, cli):
    base, args = trained
    line, options = command("jlt.py", *args[:-1], 1, "--out", base / "cut")
    process = subprocess.Popen(line, **options)
    for row in process.stdout:  # log_every 1: it is killed between two checkpoints
        if row.startswith("step 13"):
            break
    process.kill()
    process.communicate()
    assert torch.load(base / "cut/ckpt.pt", weights_only=True)["step"] == 10
    (base / "cut/.tmp.1.ckpt.pt").write_bytes(b"half a checkpoint")
    status, out, _ = cli(jlt, *args[:-1], 1, "--out", base / "cut")
    assert status == 0 and "continuing at step 10" in out
    for part in ("model", "ema"):
        assert same(weights_of(base / "whole", part), weights_of(base / "cut", part))
    steps = [json.loads(row)["step"] for row in (base / "cut/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21)) and not list((base / "cut").glob(".tmp*"))


def test_three_processes_of_which_one_is_killed_then_two_that_are_stopped_then_one(trained, cli):
    """kill -9 of one in three: all stop and say why, the checkpoint is whole. Other numbers of processes continue, SIGTERM
    saves, and in the end it is what one process alone trains, to rounding."""
    base, (*args, _) = trained
    run, dying = (
        base / "run",
        base / "jlt.py",
    )  # the program, but rank 2 dies once there is a checkpoint
    dying.write_text(f"""import os, runpy, sys, threading, time
def die():
    while not os.path.exists({str(run / "ckpt.pt")!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
os.environ["RANK"] == "2" and threading.Thread(target=die, daemon=True).start()
sys.path.insert(0, {str(HERE)!r})
runpy.run_path({str(HERE / "jlt.py")!r}, run_name="__main__")
""")
    args += [
        1,
        "--micro-batch",
        2,
        "--save-every",
        5,
    ]  # four micro-batches: one process does two of them
    result = call(dying, *args, "--steps", 4000, "--out", run, processes=3)
    lines = [line for line in result.stderr.splitlines() if line.startswith("jlt.py:")]
    assert (
        result.returncode != 0
        and 1 <= len(lines) <= 2
        and all("lost the other processes" in line for line in lines)
    ), result.stderr
    assert (
        "in train" not in result.stderr and "SIGKILL" in result.stderr
    )  # torchrun's own report names the rank
    step = jlt.load_file(run / "ckpt.pt")["step"]
    assert step % 5 == 0

    line, options = command("jlt.py", *args, "--steps", 4000, "--out", run, processes=2)
    process = subprocess.Popen(line, **options)
    for row in process.stdout:
        if row.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=60)
    stopped = jlt.load_file(run / "ckpt.pt")["step"]
    assert (
        process.returncode != 0
        and stopped > step
        and row.startswith(f"step {step + 1}/")
        and f"saved at step {stopped}" in err
    ), err

    for out in (run, base / "alone"):
        assert cli(jlt, *args, "--steps", stopped + 3, "--out", out)[0] == 0
    for part in ("model", "ema"):
        a, b = weights_of(run, part), weights_of(base / "alone", part)
        assert a.keys() == b.keys() and all(
            torch.allclose(a[k], b[k], rtol=0, atol=2e-5) for k in a
        )


def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(cli, tmp_path):
    cache = write_cache(tmp_path / "cache")
    run = [jlt, *TINY, "--data", cache, "--out", tmp_path / "run", "--lr", 1e-3, "--log-every", 4]
    assert cli(*run, "--steps", 4)[0] == 0
    good = (tmp_path / "run/ckpt.pt").read_bytes()
    bad = load_file(cache / "latents_00000.safetensors")
    bad["latents"][:] = float("nan")
    save_file(bad, cache / "latents_00000.safetensors")
    refused(cli(*run, "--steps", 12), "not finite", "step", "ckpt.pt", status=1)
    assert (tmp_path / "run/ckpt.pt").read_bytes() == good


def test_a_run_is_never_continued_with_other_settings_or_overwritten(cli, tmp_path):
    cache, out = write_cache(tmp_path / "cache"), tmp_path / "run"
    run = [jlt, *TINY, "--data", cache, "--out", out, "--steps", 2]
    assert cli(*run)[0] == 0
    good = (out / "ckpt.pt").read_bytes()
    refused(cli(*run, "--lr", 0.5), "lr", "0.5", "--out")
    refused(cli(*run, "--target", "v"), "target x (now v)")
    refused(cli(*run, "--data", write_cache(tmp_path / "other", n=30)), "data", "30 latents")
    assert (out / "ckpt.pt").read_bytes() == good
    assert cli(*run, "--steps", 3, "--log-every", 1, "--save-every", 1, "--cfg", 1.5)[0] == 0
    recoded = write_cache(tmp_path / "recoded")  # the same pictures through another encoder
    for folder, digest in ((recoded, "a"), (tmp_path / "mixed", "b")):
        tensors = [
            load_file(recoded / "latents_00000.safetensors")[k]
            for k in ("latents", "latents_flip", "labels")
        ]
        encode.save_shard(
            write_cache(folder) / "latents_00000.safetensors",
            *tensors,
            encoder=digest,
            number=0,
            shards=1,
        )
    refused(cli(*run, "--data", recoded), "data", "digest")
    encode.save_shard(
        recoded / "latents_00001.safetensors", *tensors, encoder="b", number=1, shards=2
    )
    encode.save_shard(
        recoded / "latents_00000.safetensors", *tensors, encoder="a", number=0, shards=2
    )
    refused(cli(*run, "--data", recoded), "mixes")
    encode.save_shard(
        recoded / "latents_00001.safetensors", *tensors, encoder="a", number=0, shards=2
    )
    refused(cli(*run, "--data", recoded), "2 of 2 shards")
    (log := out / "log.jsonl").write_text("half a li\n" + log.read_text())
    refused(cli(*run), "log.jsonl", "damaged line")
    for damage in (good[:-700], good[:100], b"", b"just text", pickle.dumps({"a": 1})):
        (out / "ckpt.pt").write_bytes(damage)
        refused(cli(*run), "ckpt.pt")
        assert (out / "ckpt.pt").read_bytes() == damage


def test_other_caches_are_read_or_refused(cli, tmp_path):
    plain = write_cache(tmp_path / "plain")
    (tensors := load_file(plain / "latents_00000.safetensors")).pop("latents_flip")
    save_file(tensors, plain / "latents_00000.safetensors")  # without mirrored latents
    data = encode.LatentDataset(plain)
    assert (
        len(data) == 24
        and data.num_classes == 3
        and data[0][0].shape == (8, 4, 4)
        and data[-1][1] == 2
    )
    assert torch.equal(data.item(5, True)[0], data.item(5)[0]) and data[5][0].dtype == torch.float32
    run = [jlt, *TINY, "--out", tmp_path / "run", "--steps", 1]
    bad = lambda name, **changes: write_cache(tmp_path / name, **changes)
    refused(
        cli(*run, "--data", bad("neg", labels=torch.full((24,), -1).int())), "labels (-1 to -1)"
    )
    refused(cli(*run, "--data", bad("few", labels=torch.zeros(5).int())), "few", "encode", status=1)
    refused(cli(*run, "--data", bad("half", labels=torch.full((24,), 0.5))), "half", status=1)
    refused(
        cli(*run, "--data", bad("oblong", latents=torch.zeros(24, 8, 4, 2))), "oblong", status=1
    )
    refused(cli(*run, "--data", bad("flat", latents=torch.zeros(24, 8))), "flat", status=1)
    cut = bad("cut") / "latents_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    refused(cli(*run, "--data", tmp_path / "cut"), "latents_00000", status=1)
    save_file(
        load_file(bad("mixed") / "latents_00000.safetensors"),
        tmp_path / "mixed/latents_00001.safetensors",
    )
    write_cache(tmp_path / "mixed", shape=(8, 2, 2))
    refused(cli(*run, "--data", tmp_path / "mixed"), "mixes latents")
    write_cache(tmp_path / "meta")
    encode.save_shard(
        tmp_path / "meta/latents_00000.safetensors",
        *torch.zeros(2, 24, 8, 4, 4),
        data.labels,
        classes=2,
    )
    refused(cli(*run, "--data", tmp_path / "meta"), "labels")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- checkpoints and the sampling command
@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small file in the layout of the published checkpoint-last.pth."""
    net = randomized(jlt.JLT(2, 1, 128, 32, 2, 2, 5), seed=7)
    state = {f"net.{k}": v.detach().clone() for k, v in net.state_dict().items()} | {
        "net.mask_token": torch.ones(1, 1, 32)
    }
    args = Namespace(model="JLT-B/1", img_size=32, flow_matching="x", t_eps=0.05, P_mean=-0.8)
    path = tmp_path_factory.mktemp("released") / "checkpoint-last.pth"
    torch.save(
        {
            "model": {k: v * 0 for k, v in state.items()},
            "model_ema1": {k: v.bfloat16() for k, v in state.items()},
            "model_ema2": {},
            "optimizer": {"state": {}},
            "epoch": 199,
            "args": args,
        },
        path,
    )
    return path, net


def test_published_layout_loads_and_samples(cli, released, vae, tmp_path):
    path, net = released
    loaded, known = jlt.load_network(path)
    assert known["target"] == "x" and loaded.num_classes == 5 and loaded.grid == 2
    assert all(
        torch.equal(v, net.state_dict()[k].bfloat16().float())
        for k, v in loaded.state_dict().items()
    )
    run = [jlt, "--sample", path, "--vae", vae, "--sample-steps", 3, "--device", "cpu"]
    status, out, _ = cli(*run, "--classes", 0, 4, 2, 1, 0, 3, "--out", tmp_path / "grid.png")
    assert status == 0 and "first EMA" in out and "x-prediction" in out
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * 32, 2 * 32)
        first = np.asarray(image)[:32, :32]
    assert np.ptp(first) > 20
    for size in (1, 4):
        assert cli(*run, "--n", 6, "--micro-batch", size, "--out", tmp_path / f"{size}.npz")[0] == 0
    a, b = (np.load(tmp_path / f"{size}.npz")["arr_0"] for size in (1, 4))
    assert (
        a.shape == (6, 32, 32, 3) and a.dtype == np.uint8 and np.abs(a.astype(int) - b).max() <= 1
    )
    assert np.abs(a[0].astype(int) - first).max() <= 1  # image 0 of class 0, by either way
    assert not list(tmp_path.glob(".tmp*"))
    refused(cli(*run, "--n", 6, "--out", tmp_path / "1.npz"), "exists")
    refused(cli(*run, "--n", 6, "--out", tmp_path / "2.png"), "2.png", "ending .npz")
    refused(cli(*run, "--classes", 1, "--out", tmp_path / "2.npz"), "2.npz", ".png")
    refused(cli(*run, "--classes", 5), "has classes 0 to 4")
    refused(cli(*run, "--classes", -1, "--out", tmp_path / "x.png"), "0 to 4")
    refused(cli(*run), "--classes", "--n")
    refused(cli(*run, "--n", 3, "--depth", 2), "--depth")
    refused(cli(*run, "--n", 3, "--out", tmp_path / "no/where.npz"), "folder")
    refused(cli(*run[:3], "--n", 3, "--vae", tmp_path, "--out", tmp_path / "y.npz"), "--vae")


def test_killed_sampling_continues(cli, released, vae, tmp_path):
    run = [
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        5,
        "--device",
        "cpu",
        "--n",
        24,
        "--micro-batch",
        1,
        "--out",
    ]
    line, options = command("jlt.py", *run, tmp_path / "cut.npz")
    process = subprocess.Popen(line, **options)
    while process.poll() is None and not list(tmp_path.glob(".tmp.cut.npz.*/00*.npy")):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    finished = list(tmp_path.glob(".tmp.cut.npz.*/00*.npy"))
    assert 0 < len(finished) < 24 and all(
        np.load(path).shape == (1, 32, 32, 3) for path in finished
    )
    assert cli(jlt, *run, tmp_path / "cut.npz")[0] == cli(jlt, *run, tmp_path / "whole.npz")[0] == 0
    assert (tmp_path / "cut.npz").read_bytes() == (
        tmp_path / "whole.npz"
    ).read_bytes() and not list(tmp_path.glob(".tmp*"))


def test_a_damaged_batch_and_the_rest_of_a_finished_job(cli, released, vae, tmp_path):
    run = [
        jlt,
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--n",
        2,
        "--micro-batch",
        1,
        "--out",
        tmp_path / "a.npz",
    ]
    with pytest.MonkeyPatch.context() as patch:  # dies before it puts the batches together
        patch.setattr(
            np.lib.format,
            "write_array_header_1_0",
            lambda *_: os.truncate(next(tmp_path.glob(".tmp*/000000001.npy")), 99) or 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            cli(*run)
    refused(cli(*run), ".tmp.a.npz", "damaged batch", "delete", status=1)
    (tmp_path / ".tmp.a.npz.more.0123456789ab").mkdir()  # another job's, of "a.npz.more"
    assert cli(*run, "--seed", 1)[0] == 0  # other settings: the batches of these go, too
    assert sorted(os.listdir(tmp_path)) == [".tmp.a.npz.more.0123456789ab", "a.npz"]
    refused(cli(*run), "exists")


def test_interrupted_sampling_continues(cli, released, vae, tmp_path, monkeypatch):
    run = [
        jlt,
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--n",
        6,
        "--micro-batch",
        2,
    ]
    assert cli(*run, "--out", tmp_path / "whole.npz")[0] == 0
    generate, calls = jlt.generate, []

    def failing(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "samples")
        return generate(*args)

    monkeypatch.setattr(jlt, "generate", failing)
    refused(cli(*run, "--out", tmp_path / "cut.npz"), "No space left", status=1)
    assert not (tmp_path / "cut.npz").exists()
    assert cli(*run, "--out", tmp_path / "cut.npz")[0] == 0
    assert (
        calls == [0, 2, 2, 4]
        and (tmp_path / "cut.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    )


def test_what_would_sample_garbage_is_refused(cli, released, vae, tmp_path, monkeypatch):
    run = [
        jlt,
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "out.png",
    ]
    refused(cli(*run, "--target", "v", "--classes", 1), "--target")
    refused(cli(*run, "--n", -5), "at least 1")
    state = torch.load(released[0], weights_only=False)
    state["model_ema1"]["net.final_layer.linear.bias"][:] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    run[2] = tmp_path / "nan.pth"
    refused(cli(*run, "--classes", 1), "not finite", status=1)
    assert not (tmp_path / "out.png").exists()


def test_batches_of_another_decoder_are_not_reused(cli, released, vae, tmp_path, monkeypatch):
    other = tmp_path / "other"  # the same weights elsewhere: another --vae all the same
    os.symlink(vae, other)
    run = [
        jlt,
        "--sample",
        released[0],
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--n",
        4,
        "--micro-batch",
        2,
        "--out",
        tmp_path / "s.npz",
    ]
    generate = jlt.generate

    def one_batch(net, y, first, *rest):
        if first:
            raise OSError(28, "No space left on device", "samples")
        return generate(net, y, first, *rest)

    monkeypatch.setattr(jlt, "generate", one_batch)
    refused(cli(*run, "--vae", vae), "No space", status=1)
    seen = []
    monkeypatch.setattr(
        jlt,
        "generate",
        lambda net, y, first, *rest: seen.append(first) or generate(net, y, first, *rest),
    )
    assert cli(*run, "--vae", other)[0] == 0 and seen == [0, 2]


@pytest.mark.parametrize("bottleneck", [32, 4])
def test_our_checkpoints_give_back_their_network(cli, tmp_path, bottleneck):
    run = [
        jlt,
        *TINY,
        "--data",
        write_cache(tmp_path / "cache"),
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        "--bottleneck",
        bottleneck,
    ]
    assert cli(*run)[0] == 0
    net, known = jlt.load_network(tmp_path / "run")
    assert same(net.state_dict(), weights_of(tmp_path / "run", "ema")) and known["target"] == "x"


def test_several_processes_sample_what_one_does(cli, released, vae, tmp_path):
    run = [
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--micro-batch",
        2,
        "--n",
        5,
    ]
    assert cli(jlt, *run, "--out", tmp_path / "one.npz")[0] == 0
    result = call("jlt.py", *run, "--out", tmp_path / "three.npz", processes=3)
    assert result.returncode == 0 and result.stdout.count("wrote") == 1, result.stderr
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "three.npz").read_bytes()
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    "what", [["--n", 5, "--out", "n.npz"], ["--classes", 4, 0, 0, 2, 1, "--out", "classes.png"]]
)
def test_processes_sample_without_overlap(cli, released, vae, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    run = [
        jlt,
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--micro-batch",
        1,
        *what,
    ]
    generate, seen = jlt.generate, []
    assert cli(*run)[0] == 0
    alone = Path(what[-1]).read_bytes()
    Path(what[-1]).unlink()
    monkeypatch.setattr(
        jlt,
        "generate",
        lambda net, y, first, *rest: seen.append(first) or generate(net, y, first, *rest),
    )
    for name in (
        "init_process_group",
        "barrier",
        "destroy_process_group",
    ):  # the processes one after the other
        monkeypatch.setattr(jlt.dist, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(jlt, "WORLD", 3)
    for rank in (2, 1, 0):
        monkeypatch.setattr(jlt, "RANK", rank)
        assert cli(*run)[0] == 0
    assert (
        seen == [2, 1, 4, 0, 3]
        and os.listdir() == [what[-1]]
        and Path(what[-1]).read_bytes() == alone
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_was_here",)


def test_checkpoints_never_run_code(cli, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, _ = released
    state = torch.load(path, weights_only=False)
    torch.save(state | {"optimizer": Evil()}, "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    refused(cli(jlt, "--sample", "evil.pth", "--n", 1), "evil.pth", "mkdir")
    refused(cli(jlt, "--sample", "raw.pth", "--n", 1), "raw.pth")
    assert not (tmp_path / "evil_was_here").exists()
    torch.save(
        {"model_ema1": {"net.a": torch.ones(1)}, "args": Namespace(img_size=256)}, "other.pth"
    )
    refused(cli(jlt, "--sample", "other.pth", "--n", 1), "holds no JLT")
    torch.save(
        state | {"args": Namespace(img_size=32, t_eps=0.05, flow_matching=True)}, "unsaid.pth"
    )
    refused(cli(jlt, "--sample", "unsaid.pth", "--n", 1), "--target True")
    torch.save(torch.ones(3), "tensor.pth")
    refused(cli(jlt, "--sample", "tensor.pth", "--n", 1), "holds no JLT")


def test_which_faults_become_one_line(capsys):
    def outcome(fault):
        def main():
            raise fault

        with pytest.raises(SystemExit) as stop:
            fid.run(main)
        return stop.value.code, capsys.readouterr().err

    def too_much():
        torch.empty(10**15)

    with pytest.raises(SystemExit):
        fid.run(too_much)
    for err in (
        capsys.readouterr().err,
        outcome(MemoryError())[1],
        outcome(RuntimeError("CUDA out of memory. Tried to allocate"))[1],
    ):
        assert "lower --batch" in err and "memory" in err
    assert (
        "lower --workers (DataLoader worker (pid 7) is killed"
        in outcome(RuntimeError("DataLoader worker (pid 7) is killed"))[1]
    )
    assert (
        outcome(fid.Stop("two\nlines"))[0] == 2
        and outcome(fid.Stop("a", 1))[0] == 1
        and outcome(KeyboardInterrupt())[0] == 130
    )
    assert "x/y: No space left" in outcome(OSError(28, "No space left on device", "x/y"))[1]
    peer = RuntimeError("[gloo/pair.cc] Connection reset. Check the logs.")
    assert (
        "lost the other processes; the same command continues ([gloo/pair.cc] Connection reset)"
        in outcome(peer)[1]
    )
    with pytest.raises(RuntimeError):  # a fault of the program keeps its traceback
        fid.run(
            lambda: (_ for _ in ()).throw(
                RuntimeError("CUDA error: an illegal memory access was encountered")
            )
        )


@pytest.mark.parametrize(
    "args, words",
    [
        ("--target q", "--target"),
        ("--foo 1", "--foo"),
        ("--steps 0", "--steps"),
        ("--batch -3", "--batch"),
        ("--steps 1e3", "--steps"),
        ("--cfg nan", "--cfg"),
        ("--lr inf", "--lr"),
        ("--ema 1.5", "--ema"),
        ("--batch 10 --micro-batch 3", "does not divide"),
        ("--model S/2", "--model"),
        ("--interval 0.9 0.1", "low"),
        ("--device tpu", "cpu"),
        ("--data nowhere", "encode.py"),
        ("--classes 3", "--sample"),
        ("--sample nowhere --n 3", "nowhere"),
        ("--sample . --n 3", "ckpt.pt"),
        ("--precision fp8", "--precision"),
        ("--logit-t 0 -1", "--logit-t"),
        ("--t-eps 0", "--t-eps"),
        ("--sample-steps 0", "--sample-steps"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999999", "--seed"),
        ("--warmup-epochs 1e308", "--warmup"),
        ("--demo --bench", "not allowed"),
        ("--demo --data x", "--data"),
        ("--sample", "expected one argument"),
        ("--n 0 --sample x", "at least 1"),
        ("--label-drop 2", "--label-drop"),
        ("--out", "--out"),
    ],
)
def test_mistakes_on_the_command_line(cli, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    refused(cli(jlt, *args.split()), words)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- pictures to latents
def test_center_crop_is_adms():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (150, 230, 3), dtype=np.uint8))
    half = image.resize((115, 75), Image.BOX)
    expected = image.resize((round(230 * 80 / 150), 80), Image.BICUBIC).crop(
        (21, 0, 101, 80)
    )  # 123 wide: 21 to the left
    assert np.array_equal(
        encode.center_crop(image, 80), expected
    )  # 150 is below twice 80: not halved
    again = half.resize((57, 37), Image.BOX).resize((round(57 * 32 / 37), 32), Image.BICUBIC)
    left = (again.width - 32) // 2
    expected = again.crop((left, 0, left + 32, 32))
    assert np.array_equal(encode.center_crop(image, 32), expected)
    assert encode.center_crop(image.resize((3, 2)), 32).size == (32, 32)
    assert np.array_equal(
        encode.center_crop(image.crop((0, 0, 32, 32)), 32), image.crop((0, 0, 32, 32))
    )


@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped_in_silence(tmp_path):
    """Pillow warns of palettes whose transparency is a list of bytes, and leaves it where it makes no sense."""
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    palette.save(tmp_path / "bytes.png", transparency=bytes(range(64)))
    palette.save(tmp_path / "index.gif", transparency=3)
    for name in ("bytes.png", "index.gif"):
        image = encode.open_rgb(tmp_path / name)
        assert image.mode == "RGB" and "transparency" not in image.info
        assert np.array_equal(np.asarray(image), np.asarray(palette.convert("RGB")))


def test_latents_are_normalised_patches_of_the_posterior_mode(vae):
    model = encode.load_vae(str(vae))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode.encode(model, images)
    with torch.no_grad():
        mode = model.encode(images).latent_dist.mean  # (2, 32, 4, 6)
    assert latents.shape == (2, 128, 2, 3) and latents.dtype == torch.float32
    for c, i, j in ((0, 0, 0), (5, 0, 1), (5, 1, 0), (31, 1, 1)):
        k = 4 * c + 2 * i + j
        expected = (mode[:, c, i::2, j::2] - model.bn.running_mean[k]) / (
            model.bn.running_var[k] + model.config.batch_norm_eps
        ).sqrt()
        torch.testing.assert_close(latents[:, k], expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            encode.decode(model, latents), model.decode(mode).sample, rtol=1e-3, atol=1e-4
        )


@pytest.fixture
def pipeline(monkeypatch):
    """diffusers' own Flux2KleinPipeline; what it takes from transformers for its text encoder, which is not needed here, stands in."""
    import diffusers.loaders

    monkeypatch.setitem(
        sys.modules,
        "transformers",
        SimpleNamespace(Qwen2TokenizerFast=object, Qwen3ForCausalLM=object),
    )
    monkeypatch.setattr(diffusers.loaders, "Flux2LoraLoaderMixin", object, raising=False)
    return importlib.import_module(
        "diffusers.pipelines.flux2.pipeline_flux2_klein"
    ).Flux2KleinPipeline


def test_latents_and_pictures_are_those_of_diffusers_pipeline(vae, cache, photos, pipeline):
    """Photograph -> latent, the cache read back, latent -> picture, each by diffusers' own functions and by ours."""
    model, data = encode.load_vae(str(vae)), encode.LatentDataset(cache[0])
    theirs = SimpleNamespace(
        vae=model, _patchify_latents=pipeline._patchify_latents
    )  # all that its method asks of self
    skipped = {name for name, _ in json.loads((cache[0] / "meta.json").read_text())["skipped"]}
    files = [name for name in encode.list_images(photos) if name not in skipped]
    assert len(files) == len(data)
    for i, name in enumerate(files):
        image = encode.center_crop(encode.open_rgb(photos / name), 32)
        for flip, picture in enumerate((image, image.transpose(Image.FLIP_LEFT_RIGHT))):
            x = VaeImageProcessor(vae_scale_factor=16).preprocess(
                picture
            )  # (1, 3, 32, 32) in [-1, 1]
            with torch.no_grad():
                latent = pipeline._encode_vae_image(theirs, x, None)  # (1, 128, 2, 2)
            ours = encode.encode(
                model, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
            )
            torch.testing.assert_close(ours, latent, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(
                data.item(i, flip)[0], latent[0], rtol=2**-11, atol=4e-5
            )  # half a unit of fp16
        with torch.no_grad():  # the VAE's own reconstruction, and the way its pipeline decodes
            whole = model(x).sample
            std = (model.bn.running_var + model.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
            again = model.decode(
                pipeline._unpatchify_latents(latent * std + model.bn.running_mean.view(1, -1, 1, 1))
            ).sample
        torch.testing.assert_close(encode.decode(model, ours), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encode.decode(model, latent), again, rtol=1e-4, atol=1e-4)


def test_uint8_and_grid(tmp_path):
    assert encode.to_uint8(torch.tensor([-1.2, -1, 0, 1, 3])).tolist() == [0, 0, 128, 255, 255]
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 3, 2, 4)
    images[4, :, 1, 2] = torch.tensor([7, 8, 9], dtype=torch.uint8)
    encode.save_grid(tmp_path / "g.png", images, columns=3)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert (
        grid.shape == (4, 12, 3)
        and grid[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
        and grid[3, 6].tolist() == [7, 8, 9]
    )


@pytest.fixture(scope="module")
def cache(photos, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "latents"
    args = [
        photos,
        "--vae",
        vae,
        "--size",
        32,
        "--shard",
        5,
        "--batch",
        1,
        "--workers",
        1,
        "--device",
        "cpu",
    ]
    result = call("encode.py", *args, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, args, result


def test_cache_holds_every_readable_picture_and_its_mirror_image(cache, photos, vae):
    out, _, result = cache
    meta, data, model = (
        json.loads((out / "meta.json").read_text()),
        encode.LatentDataset(out),
        encode.load_vae(str(vae)),
    )
    assert (
        meta["classes"] == ["a_dogs", "b_cats", "c_empty", "d_odd"]
        and meta["images"] == len(data) == 19
    )
    assert [name for name, _ in meta["skipped"]] == [
        "d_odd/cut.jpg",
        "d_odd/empty.png",
        "d_odd/new\nline.png",
    ]
    assert data.labels.tolist() == [0] * 6 + [1] * 6 + [3] * 7 and data.num_classes == 4
    assert "3 files skipped" in result.stdout and result.stderr.count("skipped 'd_odd/") == 3
    names = sorted(encode.list_images(photos), key=lambda n: n)
    names = [n for n in names if n not in {name for name, _ in meta["skipped"]}]
    for i in (0, 7, 12, 18):
        image = encode.center_crop(encode.open_rgb(photos / names[i]), 32)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        torch.testing.assert_close(
            data.item(i)[0], encode.encode(model, x)[0], rtol=2e-3, atol=2e-3
        )
        torch.testing.assert_close(
            data.item(i, True)[0], encode.encode(model, x.flip(-1))[0], rtol=2e-3, atol=2e-3
        )
    with Image.open(out / "reconstructions.png") as sheet:
        assert sheet.size == (2 * 32, 7 * 32)  # seven pairs
    deep = np.round(
        np.asarray(Image.open(photos / "d_odd/deep.png")) / 257
    )  # 65,535 is 255; not clipped to white
    assert (
        np.array_equal(np.asarray(encode.open_rgb(photos / "d_odd/deep.png"))[..., 1], deep)
        and deep.std() > 40
    )


def files_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_killed_encoding_ends_byte_identical_and_two_processes_share(cache, tmp_path):
    out, args, _ = cache
    line, options = command("encode.py", *args, "--out", tmp_path / "cut")
    process = subprocess.Popen(line, **options)
    while process.poll() is None and not (tmp_path / "cut/latents_00001.safetensors").exists():
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (tmp_path / "cut/.tmp.1.latents_00003.safetensors").write_bytes(b"half")
    (tmp_path / "cut/latents_00003.safetensors").unlink(missing_ok=True)
    with pytest.raises(fid.Stop, match="of 5 shards"):
        encode.LatentDataset(tmp_path / "cut")
    result = call("encode.py", *args, "--out", tmp_path / "cut", processes=2)
    there = re.search(r"(\d) of 5 shards there already", result.stderr)
    assert result.returncode == 0 and there, result.stderr
    starts = re.findall(
        r"0%\|[^|]*\| 0/(\d+)", result.stderr
    )  # of the two processes' bars: they share the rest
    assert len(starts) == 2 and sum(map(int, starts)) == 22 - 5 * int(there[1]), result.stderr
    assert files_of(tmp_path / "cut") == files_of(out)


def test_encode_refuses_what_it_cannot_do(cache, photos, vae, cli, tmp_path):
    out, args, _ = cache
    before = files_of(out)
    refused(cli(encode, *args, "--out", out, "--size", 48), "size")
    refused(cli(encode, *args, "--out", out, "--shard", 7), "another origin", "shard 5, now 7")
    refused(cli(encode, *args, "--out", write_cache(tmp_path / "foreign")), "another origin")
    other = tmp_path / "photos"
    (other / "train/one").mkdir(parents=True)
    refused(cli(encode, other, *args[1:], "--out", out), "no images")
    Image.new("RGB", (40, 40)).save(other / "train/one/a.png")
    refused(cli(encode, other, *args[1:], "--out", out), "another origin", "files")
    assert files_of(out) == before
    new = ["--out", tmp_path / "new"]
    refused(cli(encode, other / "nope", *new), "not a folder")
    refused(cli(encode, other / "train/one/a.png", *new), "not a folder")
    refused(cli(encode, other / "train/one", *new), "CLASS")
    refused(cli(encode, other, *new, "--size", 40), "multiple of 16")
    refused(cli(encode, other, *new, "--batch", 0), "--batch")
    refused(cli(encode, other, *new, "--workers", -2), "--workers")
    refused(cli(encode, other, *new, "--vae", tmp_path), "--vae")
    refused(cli(encode, *new), "images")
    (tmp_path / "file").write_text("x")
    refused(cli(encode, other, *args[1:], "--out", tmp_path / "file"), "file", status=1)
    assert (
        cli(encode, other, *args[1:], *new)[0] == 0
        and len(encode.LatentDataset(tmp_path / "new")) == 1
    )


def test_the_main_path_on_pictures(cache, vae, cli, tmp_path):
    """Pictures -> latents -> training with sample grids -> samples, by the command lines alone."""
    run = [
        jlt,
        *TINY,
        "--data",
        cache[0],
        "--out",
        tmp_path / "run",
        "--steps",
        4,
        "--sample-every",
        2,
        "--sample-steps",
        2,
        "--lr",
        0.02,
        "--warmup-epochs",
        0,
        "--ema",
        0.9,
    ]
    status, out, err = cli(*run)
    assert status == 0 and (tmp_path / "run/samples_0000002.png").exists(), err
    with Image.open(tmp_path / "run/samples_0000004.png") as grid:
        assert grid.size == (8 * 32, 2 * 32)
    # The picture on the way is what --sample makes of that step's EMA: the same 16 classes and noise, 8 beside each other or 4.
    sample = [
        jlt,
        "--sample",
        tmp_path / "run",
        "--sample-steps",
        2,
        "--out",
        tmp_path / "grid.png",
        "--classes",
    ]
    assert cli(*sample, *torch.linspace(0, 3, 16).long().tolist())[0] == 0
    grids = [
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / "run/samples_0000004.png", tmp_path / "grid.png")
    ]
    a, b = (
        g.reshape(g.shape[0] // 32, 32, -1, 32, 3).swapaxes(1, 2).reshape(16, -1) for g in grids
    )
    assert np.abs(a - b).max() <= 1 and np.abs(a[0] - a[9]).max() > 20


def test_pictures_on_the_way_need_a_vae_that_fits(cli, vae, tmp_path):
    """... and a run does not end for want of it."""
    run = [
        jlt,
        *TINY,
        "--data",
        write_cache(tmp_path / "cache"),
        "--vae",
        vae,
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--sample-every",
        1,
    ]
    status, out, _ = cli(*run)
    assert (
        status == 0
        and "no pictures on the way" in out
        and "8 channels" in out
        and (tmp_path / "run/ckpt.pt").exists()
    )


# ---------------------------------------------------------------- score
@pytest.fixture(scope="module")
def inception_weights():
    """A state dict under which activations neither die nor explode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid.Inception, "load_state_dict", lambda self, state: None)
        shapes = {name: x.shape for name, x in fid.Inception({}).state_dict().items()}
    draw, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=draw)
        state[name] = {
            "conv.weight": lambda: x * (2 / x[0].numel()) ** 0.5,
            "bn.weight": lambda: 1 + 0.2 * x,
            "bn.running_var": lambda: (1 + 0.2 * x).clamp(min=0.3),
            "fc.weight": lambda: 0.1 * x,
            "bn.num_batches_tracked": lambda: torch.tensor(7),
        }.get(".".join(name.split(".")[-2:]), lambda: 0.1 * x)()
    return state


@pytest.fixture(scope="module")
def inception(inception_weights):
    return fid.Inception(inception_weights)


@pytest.fixture(scope="module")
def score_files(inception_weights, tmp_path_factory):
    """A folder of everything that the command line needs."""
    root, rng = tmp_path_factory.mktemp("score_files"), np.random.default_rng(0)
    torch.save(inception_weights, root / "zip.pth")
    torch.save(
        inception_weights, root / "legacy.pth", _use_new_zipfile_serialization=False
    )  # as the real file is
    images = rng.integers(0, 256, (10, 24, 40, 3), dtype=np.uint8)
    images //= np.arange(1, 11, dtype=np.uint8).reshape(10, 1, 1, 1)  # some dark, some bright
    images[3] = images[3, ..., :1]
    for i, image in enumerate(images):
        path = root / "equal" / f"{i % 2}" / f"{i}.png"  # searched recursively
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {3: "L", 4: "RGBA"}.get(i, "RGB")
        extra = rng.integers(0, 256, (24, 40, 1), dtype=np.uint8)  # alpha, to be dropped
        Image.fromarray(
            image[..., 0]
            if mode == "L"
            else np.concatenate([image, extra], 2)
            if mode == "RGBA"
            else image,
            mode,
        ).save(path)
    np.savez(root / "equal.npz", arr_0=images[[0, 2, 4, 6, 8, 1, 3, 5, 7, 9]])  # the folder's order
    (root / "mixed").mkdir()
    for i in range(10):
        size = (33, 21) if i < 5 else (16 + i, 50)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
            root / "mixed" / f"{i}.png"
        )
    return root


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
    assert got[75, 75].item() == pytest.approx(
        (1 - 150 / 299) * 100 * 150 / 299 + 150 / 299 * (200 - 160 * 150 / 299), rel=1e-6
    )
    half_pixel = F.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)[0, 0]
    assert (got - half_pixel).abs().max() > 20


def test_resize_keeps_and_drops_pixels_exactly():
    x = torch.randint(0, 256, (2, 3, 299, 598), dtype=torch.uint8)
    assert torch.equal(fid.tf_resize(x), (x[..., ::2].float() - 128) / 128)  # no antialiasing
    with pytest.raises(ValueError):
        fid.tf_resize(x.float())


def test_state_dict_is_pytorch_fids(inception):
    state = inception.state_dict()
    assert len(state) == 566 and sum(name.endswith("conv.weight") for name in state) == 94
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch3x3dbl_3.bn.bias": (96,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
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
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(x.numel() for x in state.values()) == 23_885_486
    assert not inception.training
    assert {m.eps for m in inception.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}
    assert (
        torch.backends.cudnn.conv.fp32_precision
        == torch.backends.cuda.matmul.fp32_precision
        == "ieee"
    )


FORKS = (
    ["branch1x1"],
    ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
    ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
    [None, "branch_pool"],
)
BLOCKS = {  # block: input channels, then the units of each branch; None is the pool
    "Mixed_5c": (
        256,
        ["branch1x1"],
        ["branch5x5_1", "branch5x5_2"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        [None, "branch_pool"],
    ),
    "Mixed_6a": (
        288,
        ["branch3x3"],
        ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
        [None],
    ),
    "Mixed_6c": (
        768,
        ["branch1x1"],
        ["branch7x7_1", "branch7x7_2", "branch7x7_3"],
        [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
        [None, "branch_pool"],
    ),
    "Mixed_7a": (
        768,
        ["branch3x3_1", "branch3x3_2"],
        [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)],
        [None],
    ),
    "Mixed_7b": (1280, *FORKS),
    "Mixed_7c": (2048, *FORKS),
}


def windows(x, pad):
    """3x3 neighbourhoods (B, C, H, W, 9), `pad` outside."""
    return F.pad(x, (1, 1, 1, 1), value=pad).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_against_its_description(inception, inception_weights, block):
    """Wiring, strides, padding, pools and batch norm, written out once more from the inception_weights alone."""
    channels, *branches = BLOCKS[block]
    x = torch.randn(2, channels, 7, 7, generator=torch.Generator().manual_seed(2))
    halving = block in ("Mixed_6a", "Mixed_7a")

    def unit(name, x, last):
        w, *bn = (
            inception_weights[f"{block}.{name}.{key}"]
            for key in ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
        )
        pad = [0, 0] if halving and last else [k // 2 for k in w.shape[2:]]
        x = F.conv2d(x, w, stride=2 if halving and last else 1, padding=pad)
        mean, var, scale, shift = (v[:, None, None] for v in bn)
        return ((x - mean) / (var + 1e-3).sqrt() * scale + shift).clamp(min=0)

    def pool(x):
        if halving:
            return windows(x, -torch.inf).amax(-1)[:, :, 1:-1:2, 1:-1:2]
        if block == "Mixed_7c":
            return windows(x, -torch.inf).amax(-1)
        return windows(x, torch.nan).nanmean(-1)  # the padding does not count

    out = []
    for branch in branches:
        h = x
        for step in branch:
            names = step if isinstance(step, tuple) else (step,)
            h = torch.cat(
                [unit(name, h, step == branch[-1]) if name else pool(h) for name in names], 1
            )
        out.append(h)
    with torch.inference_mode():
        torch.testing.assert_close(
            inception.get_submodule(block)(x), torch.cat(out, 1), rtol=1e-4, atol=1e-4
        )


def test_features_and_logits(inception):
    x = torch.randint(
        0, 256, (2, 3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    seen = {}
    with inception.Mixed_7c.register_forward_hook(
        lambda module, inputs, output: seen.update(map=output)
    ):
        features, logits = inception(x)
    assert seen["map"].shape == (2, 2048, 8, 8) and logits.shape == (2, 1008)
    torch.testing.assert_close(features, seen["map"].flatten(2).mean(2))
    with torch.inference_mode():
        torch.testing.assert_close(logits, inception.fc(features) - inception.fc.bias)
    assert inception.fc.bias.abs().max() > 0.1
    assert features.isfinite().all() and features.std(0).mean() > 1e-3


class PickledCode:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown", "list", "text", "empty", "code"])
def test_other_weights_are_refused(inception_weights, tmp_path, change, capsys):
    path, state = tmp_path / "w.pth", dict(inception_weights)
    if change == "missing":
        del state["Mixed_6b.branch7x7_2.conv.weight"]
    elif change == "shape":  # torchvision's own classifier
        state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 2048), torch.zeros(1000)
    elif change == "unknown":
        state["epoch"] = 3
    if change in ("text", "empty"):
        path.write_text("no weights" * (change == "text"))
    else:
        torch.save({"list": [1, 2], "code": PickledCode()}.get(change, state), path)
    with pytest.raises(fid.Stop, match="w.pth"):
        fid.Inception(path)
    if change in ("missing", "shape", "unknown"):
        with pytest.raises(fid.Stop):
            fid.Inception(state)
    assert capsys.readouterr() == ("", "")  # so no code was run


# ---------------------------------------------------------------- scores
def random_gaussian(rng, d):
    a = rng.normal(size=(d, d))
    return rng.normal(size=d), a @ a.T


def test_frechet_closed_forms():
    rng = np.random.default_rng(4)
    (m1, s1), (m2, s2) = random_gaussian(rng, 12), random_gaussian(rng, 12)
    assert fid.frechet_distance(m1, s1, m2, s1) == pytest.approx(((m1 - m2) ** 2).sum(), rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9)
    a, b = rng.uniform(size=12), rng.uniform(size=12)
    truth = ((a**0.5 - b**0.5) ** 2).sum()
    assert fid.frechet_distance(m1, np.diag(a), m1, np.diag(b)) == pytest.approx(truth, rel=1e-9)
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    assert not np.allclose(s1 @ s2, s2 @ s1)
    truth = 1 + 4 + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert fid.frechet_distance([0, 0], s1, [1, 2], s2) == pytest.approx(truth, rel=1e-12)
    low = np.diag([1.0, 0.0, 0.0])  # fewer samples than dimensions
    assert fid.frechet_distance(np.zeros(3), low, np.zeros(3), np.eye(3)) == pytest.approx(
        1 + 3 - 2
    )


@pytest.mark.parametrize(
    "broken",
    [
        lambda m, s: (m[:2], s),
        lambda m, s: (m, s[:2]),
        lambda m, s: (m[None], s),
        lambda m, s: (m * np.nan, s),
        lambda m, s: (m, s + np.inf),
    ],
)
def test_frechet_refuses(broken):
    m, s = np.zeros(3), np.eye(3)
    for arguments in ((m, s, *broken(m, s)), (*broken(m, s), m, s)):
        with pytest.raises(ValueError):
            fid.frechet_distance(*arguments)


def test_inception_score_bounds():
    assert fid.inception_score(np.zeros((40, 9))) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    certain = torch.eye(5).repeat(20, 1) * 2000  # most probabilities underflow to 0
    assert fid.inception_score(certain, splits=1)[0] == pytest.approx(5)
    for bad in (torch.zeros(9, 4), torch.full((20, 4), torch.nan)):
        with pytest.raises(ValueError):
            fid.inception_score(bad)


def score_by_loops(logits, splits, order):
    p = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
    p = (p / p.sum(1, keepdims=True))[order]
    scores = []
    for part in (p[k * len(p) // splits : (k + 1) * len(p) // splits] for k in range(splits)):
        kl = [sum(a * np.log(a / b) for a, b in zip(row, part.mean(0))) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.sqrt(np.mean((scores - np.mean(scores)) ** 2))


def test_inception_score_by_loops_and_shuffled():
    rng = np.random.default_rng(5)
    logits = (
        rng.normal(size=(53, 6)) + 4 * np.eye(6)[np.sort(rng.integers(0, 6, 53))]
    )  # ordered by class
    shuffled = np.random.RandomState(2020).permutation(53)
    assert fid.inception_score(logits) == pytest.approx(
        score_by_loops(logits, 10, shuffled), rel=1e-9
    )
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
        np.testing.assert_allclose(
            s.cov, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8
        )  # np.cov: over n - 1
    for bad in (
        np.full((2, 12), np.nan),
        np.full((2, 12), np.inf),
        np.zeros((2, 11)),
        np.zeros((0, 12)),
    ):
        with pytest.raises(fid.Stop):
            s.update(bad)
    assert s.n == 157


def test_statistics_of_two():
    s = fid.Statistics(2)
    s.update(np.array([[0.0, 1.0]]))
    s.update(np.array([[2.0, 1.0]]))
    np.testing.assert_allclose(s.mean, [1, 1])
    np.testing.assert_allclose(s.cov, [[2, 0], [0, 0]])  # (1 + 1) / (2 - 1)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(12, 5, 7, 3), (12, 5, 7, 4), (12, 5, 7, 1), (12, 5, 7)])
def test_npz_of_images(tmp_path, save, shape):
    images = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    save(tmp_path / "x.npz", arr_0=images)
    stream = fid.read_images(tmp_path / "x.npz")
    assert next(stream) == 12
    rgb = images[..., :3] if shape[3:] > (1,) else np.repeat(images.reshape(12, 5, 7, 1), 3, 3)
    assert np.array_equal(np.stack(list(stream)), rgb)


def test_folder_is_decoded_in_order_and_not_far_ahead(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(fid, "list_images", lambda folder: [str(i) for i in range(400)])
    monkeypatch.setattr(
        fid, "open_rgb", lambda p: opened.append(p) or np.full((2, 2, 3), int(p.name))
    )
    stream = fid.read_images(tmp_path)
    assert next(stream) == 400 and not opened
    first = next(stream)
    assert len(opened) <= 128
    assert [image[0, 0, 0] for image in (first, *stream)] == list(range(400)) and len(opened) == 400


def test_reference_files(tmp_path):
    mu, sigma = np.arange(2048, dtype=np.float32), np.eye(2048)
    np.savez(tmp_path / "a.npz", ref_mu=mu, ref_sigma=sigma)
    images = np.zeros((10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "b.npz", arr_0=images, mu=mu, sigma=sigma, n=33)  # both, like ADM's
    np.savez(tmp_path / "c.npz", arr_0=images)
    for name, n in (("a.npz", None), ("b.npz", 33)):
        got = fid.read_statistics(tmp_path / name)
        assert np.array_equal(got[0], mu) and np.array_equal(got[1], sigma) and got[2] == n
    assert fid.read_statistics(tmp_path / "c.npz") is None


# ---------------------------------------------------------------- the command line
def fid_process(folder, *arguments):
    return subprocess.run(
        [sys.executable, HERE / "fid.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="2"),
    )


def fid_call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, arguments)])
    encode.run(fid.main)


def test_command_line(score_files, monkeypatch, capsys):
    """Two folders, whose statistics are saved on the way, and then an npz of the second's images against what was saved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.chdir(score_files)
    fid_call(monkeypatch, "mixed", "equal", "--save", "saved.npz", "--weights", "zip.pth")
    first, err = capsys.readouterr()
    assert (
        "10/10" in err and sum(line.startswith("fid.py: ") for line in err.splitlines()) == 2
    )  # both sets are small
    first = re.fullmatch(
        r"FID (\S+) \| Inception Score \S+ \+- \S+ \| n = 10 \(mixed\) against n = 10 \(equal\) \| zip\.pth, "
        r"TF1 resize \| saved to saved\.npz\n",
        first,
    )
    with np.load("saved.npz") as file:
        assert {key: (file[key].dtype, file[key].shape) for key in ("mu", "sigma")} == {
            "mu": (np.float32, (2048,)),
            "sigma": (np.float64, (2048, 2048)),
        }
        assert file["n"] == 10 and "mixed" in str(file["source"])
    fid_call(monkeypatch, "equal.npz", "saved.npz", "--weights", "legacy.pth")
    torch.set_num_threads(threads)
    second = re.fullmatch(
        r"FID (\S+) \| Inception Score \S+ \+- \S+ \| n = 10 \(equal\.npz\) against n = 10 \(saved\.npz\) \| "
        r"legacy\.pth, TF1 resize\n",
        capsys.readouterr().out,
    )
    assert (
        float(first[1]) == pytest.approx(float(second[1]), abs=2e-3)
        and float(first[1]) > 1
        and not list(Path().glob(".tmp*"))
    )


def npz_of(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


IMAGES = np.zeros((10, 4, 4, 3), np.uint8)
BAD_SAMPLES = {
    "missing.npz": None,
    "text.npz": lambda path: path.write_text("no zip"),
    "empty.npz": lambda path: path.write_bytes(b""),
    "float.npz": npz_of(arr_0=IMAGES.astype(np.float32)),
    "object.npz": npz_of(arr_0=np.array([{}] * 10, dtype=object)),
    "channels.npz": npz_of(arr_0=np.zeros((10, 4, 4, 2), np.uint8)),
    "channels_first.npz": npz_of(arr_0=np.zeros((10, 3, 4, 4, 1), np.uint8)),
    "fortran.npz": npz_of(arr_0=np.asfortranarray(IMAGES)),
    "latents.npz": npz_of(latents=IMAGES),
    "few.npz": npz_of(arr_0=IMAGES[:9]),
    "truncated.npz": lambda path: (
        npz_of(arr_0=IMAGES)(path),
        path.write_bytes(path.read_bytes()[:300]),
    ),
    "photo.png": lambda path: Image.new("RGB", (9, 9)).save(path),
    "empty": lambda path: path.mkdir(),
    "notes": lambda path: (path.mkdir(), (path / "readme.txt").write_text("no images here")),
}
SIGMA = np.eye(2048)
BAD_REFERENCES = {
    "none.npz": None,
    "dino.npz": npz_of(mu=np.zeros(768), sigma=np.eye(768)),
    "nan.npz": npz_of(mu=np.full(2048, np.nan), sigma=SIGMA),
    "half.npz": npz_of(mu=np.zeros(2048)),
    "negative.npz": npz_of(mu=np.zeros(2048), sigma=-SIGMA),
    "pickle.npz": npz_of(mu=np.array([PickledCode()], dtype=object), sigma=SIGMA),
    "empty_reference": lambda path: path.mkdir(),
}
BAD_FLAGS = [
    "--frobnicate",
    "--save equal.npz",
    "--save nowhere/x.npz",
    "--weights none.pth",
    "--weights equal.npz",
    "--weights .",
]


@pytest.mark.parametrize("case", [*BAD_SAMPLES, *BAD_REFERENCES, *BAD_FLAGS])
def test_bad_input_is_one_line(score_files, tmp_path, monkeypatch, capsys, case):
    make = (BAD_SAMPLES | BAD_REFERENCES).get(case)
    if make:
        make(tmp_path / case)
    arguments = (
        [tmp_path / case, "mixed"]
        if case in BAD_SAMPLES
        else ["equal.npz", tmp_path / case]
        if case in BAD_REFERENCES
        else ["equal.npz", *case.split()]
    )
    arguments += ["--weights", "zip.pth"] * ("--weights" not in case)
    before = (score_files / "equal.npz").read_bytes()
    monkeypatch.chdir(score_files)
    monkeypatch.setattr(fid, "extract", None)  # refused before anything is computed
    with pytest.raises(SystemExit) as stopped:
        fid_call(monkeypatch, *arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith("fid.py: ") and err.count("\n") == 1 and "Traceback" not in err
    assert case.split()[-1] in err  # says what it is about
    assert (score_files / "equal.npz").read_bytes() == before


def test_unreadable_image_is_named(score_files, tmp_path, monkeypatch, capsys):
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as stopped:
        fid_call(monkeypatch, tmp_path, "--weights", score_files / "zip.pth")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and line.startswith("fid.py: ") and "7.png" in line


def test_damaged_archive_is_not_scored(score_files, tmp_path, monkeypatch, capsys):
    data = bytearray((score_files / "equal.npz").read_bytes())
    data[5000] ^= 255  # the checksum of the zip tells
    (tmp_path / "damaged.npz").write_bytes(data)
    with pytest.raises(SystemExit):
        fid_call(monkeypatch, tmp_path / "damaged.npz", "--weights", score_files / "zip.pth")
    assert "damaged.npz" in capsys.readouterr().err


def test_offline_without_weights(score_files, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(SystemExit) as stopped:
        fid_call(monkeypatch, score_files / "equal.npz")
    err = capsys.readouterr().err
    assert (
        stopped.value.code == 1 and err.count("\n") == 1 and "--weights" in err and fid.URL in err
    )


def test_bad_input_in_a_process_of_its_own(score_files):
    done = fid_process(score_files, "none.npz", "--save", "new.npz")
    assert done.returncode == 2 and done.stdout == "" and not (score_files / "new.npz").exists()
    assert re.fullmatch(r"fid\.py: none\.npz: .*\n", done.stderr)


# ---------------------------------------------------------------- geometry and the demo
def test_gaussian_formulas_against_their_definitions():
    lam, t = torch.tensor([0.0, 0.1, 1.0, 5.0]), 0.3
    risk = jlt.gaussian_risk(lam, t)
    d = [0.09 * v + 0.49 for v in (0.0, 0.1, 1.0, 5.0)]
    assert risk["x"] == pytest.approx(
        sum(v * 0.49 / k for v, k in zip((0, 0.1, 1, 5), d)) / 4, rel=1e-6
    )
    assert risk["eps"] == pytest.approx(
        sum(0.09 * v / k for v, k in zip((0, 0.1, 1, 5), d)) / 4, rel=1e-6
    )
    assert risk["v"] == pytest.approx(sum(v / k for v, k in zip((0, 0.1, 1, 5), d)) / 4, rel=1e-6)
    assert risk["v"] == pytest.approx(risk["x"] / 0.7**2) == pytest.approx(risk["eps"] / 0.3**2)
    assert jlt.gaussian_gain(2.0, 0.25) == pytest.approx(
        (0.5 / (0.125 + 0.5625), (0.5 - 0.75) / (0.125 + 0.5625))
    )
    assert jlt.gaussian_gain(0.0, 0.25) == pytest.approx((0, -1 / 0.75))
    for n in (1, 7):  # n equal directions among zeros
        lam = torch.cat([torch.full((n,), 3.0), torch.zeros(5)])
        assert jlt.effective_rank(lam) == pytest.approx(n) and jlt.effective_rank(
            lam, 2
        ) == pytest.approx(n)
    assert jlt.effective_rank([3.0, 1.0]) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert jlt.effective_rank([3.0, 1.0], 2) == pytest.approx(1.6)


def test_linear_probe_meets_the_gaussian_risk():
    g = torch.Generator().manual_seed(0)
    lam = torch.tensor([4.0, 1.0, 0.2, 0.01])
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g))[0]
    x = torch.randn(60_000, 4, generator=g) * lam.sqrt() @ rotation + 2
    for t in (0.2, 0.8):
        probe, risk = jlt.linear_probe(x[:30_000], x[30_000:], t), jlt.gaussian_risk(lam, t)
        assert probe["x"] == pytest.approx(risk["x"], rel=0.03) and probe["v"] == pytest.approx(
            risk["v"], rel=0.03
        )


def test_geometry_of_a_known_covariance(cli, tmp_path):
    scale = torch.arange(1, 9).float().view(1, 8, 1, 1) / 4
    z = torch.randn(600, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    cache = write_cache(tmp_path / "cache", n=600, latents=z.half(), latents_flip=z.half())
    status, out, _ = cli(jlt, "--geometry", cache, "--out", tmp_path / "g.png")
    lam = (scale.flatten() ** 2).double()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert status == 0 and "9,600 tokens of 8 dimensions" in out
    for target, spectrum in {"x": lam, "eps": torch.ones(8), "v": lam + 1}.items():
        assert float(rows[target][1]) == pytest.approx(jlt.effective_rank(spectrum), rel=0.03)
        assert float(rows[target][2]) == pytest.approx(jlt.effective_rank(spectrum, 2), rel=0.04)
    assert float(rows["0.5"][1]) == pytest.approx(jlt.gaussian_risk(lam, 0.5)["x"], rel=0.05)
    assert float(rows["0.5"][4]) == pytest.approx(jlt.gaussian_risk(lam, 0.5)["x"], rel=0.1)
    with Image.open(tmp_path / "g.png") as picture:
        colours = {colour for _, colour in picture.getcolors(100_000)}
        assert {(31, 119, 180), (127, 127, 127), (214, 39, 40)} <= colours and picture.size == (
            2 * 560,
            420,
        )  # three curves each
    assert (
        "32 dimensions"
        in cli(jlt, "--geometry", cache, "--model", "B/2", "--out", tmp_path / "g2.png")[1]
    )
    refused(cli(jlt, "--geometry", cache, "--out", tmp_path / "g.png"), "g.png", "exists")
    refused(cli(jlt, "--geometry", "--data", cache), "--data")
    refused(cli(jlt, "--geometry", tmp_path / "nowhere"), "nowhere")


def test_tokens_are_patches():
    z = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    assert jlt.tokens(z, 1).shape == (32, 3) and torch.equal(jlt.tokens(z, 1)[5], z[0, :, 1, 1])
    assert torch.equal(jlt.tokens(z, 2)[5].sort()[0], z[1, :, :2, 2:].flatten().sort()[0])


def test_digits_and_their_codec(tmp_path):
    images, labels = encode.draw_digits(60, seed=5)
    assert (
        images.shape == (60, 3, 32, 32)
        and images.dtype == torch.uint8
        and labels[:12].tolist() == [*range(10), 0, 1]
    )
    assert torch.equal(images[:20], encode.draw_digits(60, seed=5)[0][:20]) and not torch.equal(
        images, encode.draw_digits(60, seed=6)[0]
    )
    assert (
        images.float().amax((1, 2, 3)) - images.float().amin((1, 2, 3)) > 60
    ).all()  # ink shows on paper
    encode.cache_digits(tmp_path, n=600)
    data, codec = (
        encode.LatentDataset(tmp_path),
        encode.load_vae(str(tmp_path / "codec.safetensors")),
    )
    assert len(data) == 600 and data.shape == (128, 2, 2) and data.num_classes == 10
    torch.testing.assert_close(codec["basis"].T @ codec["basis"], torch.eye(128), rtol=0, atol=1e-4)
    z = encode.encode(codec, images / 127.5 - 1)
    torch.testing.assert_close(
        encode.encode(codec, encode.decode(codec, z)), z, rtol=0, atol=1e-3
    )  # a projection
    x = jlt.tokens(torch.stack([data.item(i, True)[0] for i in range(600)]), 1)
    cov = torch.cov(x.double().T)
    assert (
        cov.diagonal().mean() == pytest.approx(1, rel=0.01)
        and cov.diagonal()[:64].min() >= 0.9 * cov.diagonal()[64:].max()
    )
    assert (cov - cov.diagonal().diag()).abs().max() < 0.02 * cov.max()


def test_demo_in_small(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        jlt, "DEMO", jlt.DEMO | {"steps": 6, "log_every": 3, "sample_steps": 2, "depth": 1}
    )
    monkeypatch.setattr(jlt, "DEMO_IMAGES", 200)
    monkeypatch.setattr(jlt, "digit_judge", lambda *digits: encode.digit_judge(*digits, steps=30))
    monkeypatch.setattr(jlt, "cache_digits", lambda folder: encode.cache_digits(folder, n=500))
    seen, sample = [], jlt.sample
    monkeypatch.setattr(
        jlt,
        "sample",
        lambda net, y, noise, *a, **k: seen.append((y, noise)) or sample(net, y, noise, *a, **k),
    )
    status, out, err = cli(jlt, "--demo", "--device", "cpu")
    assert status == 0, err
    rows = {
        line.split()[0]: line.split()
        for line in out.splitlines()
        if line.startswith(("real ", "x-pred", "v-pred"))
    }
    assert 0 < float(rows["real"][1]) < float(rows["x-pred."][2]) and rows["real"][3] == "1.00"
    assert (
        len(seen) == 2
        and torch.equal(seen[0][0], seen[1][0])
        and torch.equal(seen[0][1], seen[1][1])
    )  # matched
    configs = [
        torch.load(tmp_path / f"runs/demo/{t}/ckpt.pt", weights_only=True)["config"] for t in "xv"
    ]
    assert {k for k in configs[0] if configs[0][k] != configs[1][k]} == {"target", "out"}
    with Image.open(tmp_path / "runs/demo/demo.png") as picture:
        assert picture.size == (960, 576)
    assert cli(jlt, "--demo", "--target", "eps", "--hidden-size", 32, "--device", "cpu")[0] == 0
    assert (tmp_path / "runs").is_dir() and len(
        list((tmp_path / "runs").glob("demo*/eps/ckpt.pt"))
    ) == 1


def test_digit_judge_learns():
    judge, (images, labels) = (
        encode.digit_judge(*encode.draw_digits(1000, seed=1), steps=60),
        encode.draw_digits(500, seed=2),
    )
    assert (judge(images / 127.5 - 1).argmax(1) == labels).float().mean() > 0.9


# ---------------------------------------------------------------- the benchmark
class OnceTimer:
    """torch's Timer without the patience: one call."""

    def __init__(self, stmt, globals, num_threads):
        self.work = globals["work"]

    def blocked_autorange(self, min_run_time):
        start = time.perf_counter()
        self.work()
        return Namespace(median=time.perf_counter() - start)


def test_benchmark_reports_what_it_measured(cli, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jlt, "Timer", OnceTimer)
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *shape, randn=torch.randn, **k: randn(
            *((64,) + shape[1:] if shape[0] == 2048 else shape), **k
        ),
    )
    monkeypatch.setattr(
        torch,
        "arange",
        lambda *a, arange=torch.arange, **k: arange(*((64,) if a == (2048,) else a), **k),
    )
    status, out, err = cli(
        jlt,
        "--bench",
        "--depth",
        1,
        "--hidden-size",
        32,
        "--micro-batch",
        2,
        "--sample-steps",
        2,
        "--vae",
        vae,
        "--device",
        "cpu",
        "--steps",
        1000,
        "--batch",
        16,
    )
    assert status == 0, err
    row = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    number = lambda text: float(text.replace(",", ""))
    rate, ms = map(
        number, re.search(r"([\d,.]+) images/s, ([\d,]+) ms a step", row["training"]).groups()
    )
    assert 2 / rate * 1000 == pytest.approx(ms, abs=1)  # a step on the CPU is one micro-batch
    with torch.device("meta"):
        flops = 3 * jlt.forward_flops(jlt.JLT(hidden_size=32, depth=1, num_heads=1))
    assert number(re.search(r"([\d.]+) TFLOP/s", row["arithmetic"])[1]) == pytest.approx(
        rate * flops / 1e12, abs=0.006
    )
    assert "MFU 0 (rate of this device unknown)" in row["arithmetic"]  # and never a wrong number
    hours = number(re.search(r"take ([\d,.]+) hours", row["in"])[1])
    assert "1,000 steps of 16 images" in row["in"] and hours == pytest.approx(
        16_000 / rate / 3600, abs=0.06
    )
    guided, plain = map(
        number, re.search(r"([\d.]+) images/s guided, ([\d.]+) not", row["sampling"]).groups()
    )
    minutes = number(re.search(r"samples ([\d,.]+) minutes", row["in"])[1])
    assert minutes == pytest.approx(50_000 / guided / 60, rel=0.02) and plain > 0
    assert (
        "images/s encoded" in row["VAE"]
        and "latents/s" in row["loading"]
        and not list(tmp_path.iterdir())
    )


# ---------------------------------------------------------------- power cuts and hostile files
@pytest.fixture(scope="module")
def jobs(cache, released, score_files, vae, tmp_path_factory):
    """name -> (script, arguments before --out or --save, that flag, name of what is written, seconds that a whole run takes, its result)."""
    base, (_, encode_args, _) = tmp_path_factory.mktemp("jobs"), cache
    train = [
        *TINY,
        "--data",
        write_cache(base / "data"),
        "--lr",
        1e-3,
        "--steps",
        60,
        "--save-every",
        3,
        "--ema",
        0.9,
        "--log-every",
        7,
    ]
    sampling = [
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        10,
        "--device",
        "cpu",
        "--n",
        24,
        "--micro-batch",
        1,
    ]
    plan = {
        "encode": ("encode.py", [*encode_args], "--out", "latents"),
        "train": ("jlt.py", train, "--out", "run"),
        "sample": ("jlt.py", sampling, "--out", "samples.npz"),
        "fid": (
            "fid.py",
            [score_files / "mixed", "--weights", score_files / "zip.pth"],
            "--save",
            "stats.npz",
        ),
    }

    def whole(name):
        script, args, flag, out = plan[name]
        (base / name).mkdir()
        start = time.time()
        result = call(script, *args, flag, base / name / out)
        assert result.returncode == 0, result.stderr
        return script, args, flag, out, time.time() - start, outcome(name, base / name / out)

    return whole


def outcome(name, out):
    """What a job has to end with, to the bit."""
    if name == "encode":
        return files_of(out)
    if name == "train":
        return {
            f"{part}.{k}": v.numpy().tobytes()
            for part in ("model", "ema")
            for k, v in weights_of(out, part).items()
        }
    with np.load(out) as file:
        return {k: file[k].tobytes() for k in file}


@pytest.mark.long  # the short versions: test_killed_...
@pytest.mark.parametrize("name", ["encode", "train", "sample", "fid"])
def test_power_cuts(jobs, tmp_path, name, kills=25):
    """Killed (-9) at random moments and run again, a job ends as if it had never been; nothing unfinished is ever seen."""
    (script, args, flag, out, duration, expected), rng = jobs(name), np.random.default_rng(kills)
    deaths, again = 0, [*args, flag, tmp_path / out]
    while deaths < kills:
        line, options = command(script, *again)
        process = subprocess.Popen(line, **options, start_new_session=True)
        try:
            process.communicate(timeout=rng.uniform(0.3, 1.02) * duration)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            deaths += 1
        visible = [
            p for p in tmp_path.rglob("*") if not any(part.startswith(".tmp") for part in p.parts)
        ]
        for path in (p for p in visible if p.is_file()):  # whatever has its name is whole
            path.suffix == ".safetensors" and encode.open_shard(path)
            path.suffix == ".pt" and jlt.load_file(path)
            path.suffix == ".npz" and outcome(name, path)
            path.suffix == ".json" and json.loads(path.read_text())
        if process.returncode == 0 or name in ("sample", "fid") and (tmp_path / out).exists():
            assert (
                outcome(name, tmp_path / out) == expected
            )  # finished, perhaps just killed: from the start once more
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = call(script, *again)
    assert result.returncode == 0, result.stderr
    assert outcome(name, tmp_path / out) == expected and not [p for p in tmp_path.rglob(".tmp*")]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A folder on a disk of 48 MB of its own, which takes the right to mount one: root, as in a container."""
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("may not mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder])


@pytest.fixture
def disk(small_disk, monkeypatch):
    """disk(name, n): from the n-th call of function `name` on the disk is full. disk() clears it. -> what was there at that time"""
    calls, then = [], {}

    def files():
        return {
            path: path.read_bytes()
            for path in small_disk.rglob("*")
            if path.is_file() and path.name != "rest" and not path.name.startswith(".tmp")
        }

    def fill():
        then.update(files())
        with open(small_disk / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def disk(name=None, n=1):
        if name is None:
            (small_disk / "rest").unlink()
            return then, files()
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(module), function)

        def wrapper(*args, **kwargs):
            calls.append(name)
            len(calls) == n and fill()
            return original(*args, **kwargs)

        monkeypatch.setattr(name, wrapper)

    disk.folder = small_disk
    yield disk
    for path in small_disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "job, file, function, n",
    [
        ("encode", "reconstructions.png", "encode.save_grid", 1),
        ("encode", "latents_00003.safetensors", "encode.save_shard", 4),
        ("encode", "meta.json", "encode.LatentDataset", 1),
        ("train", "log.jsonl", "jlt.update", 1),
        ("again", "log.jsonl", "jlt.resolve", 1),
        ("train", "ckpt.pt", "torch.save", 2),
        ("train", "samples_0000003.png", "jlt.save_grid", 1),
        ("sample", "000000002.npy", "jlt.generate", 3),
        ("sample", "samples.npz", "numpy.lib.format.write_array_header_1_0", 1),
        ("classes", "samples.png", "jlt.save_grid", 1),
        ("fid", "stats.npz", "fid.extract", 1),
        ("geometry", "geometry.png", "jlt.save_grid", 1),
    ],
)
def test_full_disk(
    cache, vae, released, score_files, cli, disk, monkeypatch, job, file, function, n
):
    """At each kind of write: one line that names the file, status 1; what was there stays; with room again it goes on."""
    monkeypatch.chdir(disk.folder)
    sampling = [
        jlt,
        "--sample",
        released[0],
        "--vae",
        vae,
        "--sample-steps",
        1,
        "--device",
        "cpu",
        "--micro-batch",
        1,
    ]
    run = {
        "encode": [encode, *cache[1], "--out", "latents"],
        "train": [
            jlt,
            *TINY,
            "--data",
            cache[0],
            "--out",
            "run",
            "--steps",
            6,
            "--save-every",
            2,
            "--log-every",
            1,
            "--sample-every",
            3,
            "--sample-steps",
            1,
        ],
        "sample": [*sampling, "--n", 4],
        "classes": [*sampling, "--classes", 3, 1],
        "fid": [
            fid,
            score_files / "equal.npz",
            "--weights",
            score_files / "zip.pth",
            "--save",
            "stats.npz",
        ],
        "geometry": [jlt, "--geometry", cache[0]],
    }["train" if job == "again" else job]
    job == "again" and cli(*run, "--steps", 4)
    monkeypatch.setattr(
        fid, "extract", lambda *_: (np.zeros(2048), np.eye(2048), 10, torch.zeros(10, 1008))
    )
    disk(function, n)
    refused(cli(*run), file, "full?", status=1)
    then, now = disk()
    assert now == then and not [path for path in disk.folder.rglob(".tmp*") if path.is_file()]
    assert cli(*run)[0] == 0 and list(disk.folder.rglob(file if job != "sample" else "samples.npz"))
    assert not list(disk.folder.rglob(".tmp*"))


@pytest.mark.parametrize("n, file", [(1, "codec.safetensors"), (2, "latents_00000.safetensors")])
def test_full_disk_under_the_digits(disk, n, file):
    disk("encode.save", n)
    with pytest.raises(fid.Stop, match=f"{file}: cannot be written.*No space left"):
        encode.cache_digits(disk.folder / "digits", n=500)
    then, now = disk()
    assert now == then
    encode.cache_digits(disk.folder / "digits", n=500)
    assert len(encode.LatentDataset(disk.folder / "digits")) == 500


@pytest.mark.parametrize("mutations", [40, pytest.param(600, marks=pytest.mark.long)])
def test_damaged_files_are_read_right_or_refused(
    cache, trained, released, score_files, photos, tmp_path, mutations
):
    """Bytes flipped, cut off, doubled: every reader gives what the whole file would have given, or one line."""
    shard, run = sorted(cache[0].glob("*.safetensors"))[0], trained[0] / "whole/ckpt.pt"
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048), n=5)

    def tensors(path):
        header, tensors = encode.open_shard(path)
        return {k: v.shape for k, v in tensors.items()}  # safetensors has no checksum of its data

    readers = {
        shard: tensors,
        run: lambda p: [v.tolist() for v in jlt.load_network(p)[0].state_dict().values()],
        released[0]: lambda p: [v.tolist() for v in jlt.load_network(p)[0].state_dict().values()],
        tmp_path / "stats.npz": lambda p: [np.asarray(v).tolist() for v in fid.read_statistics(p)],
        score_files / "equal.npz": lambda p: [
            image.tolist() if i else image for i, image in enumerate(fid.read_images(p))
        ],
    }
    rng, bad, refusals = np.random.default_rng(mutations), tmp_path / "bad", 0
    for i in range(mutations):
        path = list(readers)[i % len(readers)]
        data = good = path.read_bytes()
        a, b = sorted(rng.integers(0, min(len(good), 10 ** rng.integers(1, 8)), 2))
        kind = ["flip", "cut", "double", "zero"][rng.integers(4)]
        data = {
            "flip": good[:a] + bytes([good[a] ^ 1 << rng.integers(8)]) + good[a + 1 :],
            "cut": good[:a] + good[b + 1 :],
            "double": good[:b] + good[a:],
            "zero": good[:a] + bytes(b - a) + good[b:],
        }[kind]
        bad.write_bytes(data)
        try:
            got = readers[path](bad)
        except fid.Stop as e:
            refusals += 1
            assert len(e.args[0].splitlines()) <= 3 and str(bad) in e.args[0]
        else:
            assert data == good or got == readers[path](path), (path, kind, a, b)
    assert refusals > mutations / 3


def test_strange_folders(vae, cli, tmp_path):
    """A loop of links, thousands of empty classes, names that are no text, a picture too large to be true."""
    root = tmp_path / "photos"
    for i in range(10_000):
        (root / f"empty_{i:04}").mkdir(parents=True)
    (root / "a").mkdir()
    (root / "a/loop").symlink_to(root)
    for hidden in (
        ".checkpoints",
        "a",
    ):  # what notebooks and Macs leave behind is no class and no picture
        (root / hidden).mkdir(exist_ok=True)
        (root / hidden / "._x.png").write_text("Mac")
    with open(os.fsencode(root) + b"/a/\xff\xfe\n.png", "wb") as file:
        Image.new("RGB", (20, 20), "red").save(file, "PNG")
    bomb = Image.new("1", (20_000, 20_000))  # 400 million pixels in 50 kB: Pillow's limit is kept
    bomb.save(root / "a/bomb.png")
    status, out, err = cli(
        encode,
        root,
        "--vae",
        vae,
        "--size",
        16,
        "--workers",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "latents",
    )
    assert (
        status == 0
        and "1 files skipped" in out
        and "decompression bomb" in err
        and "Traceback" not in err
    )
    data = encode.LatentDataset(tmp_path / "latents")
    assert len(data) == 1 and data.num_classes == 10_001


def test_lying_headers_and_unfinished_caches(cli, tmp_path):
    header = json.dumps(
        {
            "latents": {"dtype": "F16", "shape": [10**9, 8, 4, 4], "data_offsets": [0, 64]},
            "labels": {"dtype": "I32", "shape": [1], "data_offsets": [64, 68]},
        }
    ).encode()
    (tmp_path / "lie").mkdir()
    (tmp_path / "lie/latents_00000.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(68)
    )
    refused(cli(jlt, *TINY, "--data", tmp_path / "lie"), "latents_00000", status=1)
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge/latents_00000.safetensors").write_bytes(
        (2**62).to_bytes(8, "little") + header
    )
    refused(cli(jlt, *TINY, "--data", tmp_path / "huge"), "latents_00000", status=1)
    growing = (
        tmp_path / "growing"
    )  # encode.py is still writing: its first shard says how many there will be
    growing.mkdir()
    encode.save_shard(
        growing / "latents_00000.safetensors",
        *torch.zeros(2, 4, 8, 4, 4),
        torch.zeros(4),
        shards=3,
        classes=1,
    )
    refused(cli(jlt, *TINY, "--data", growing), "1 of 3 shards")
    for name, header in {
        "many": {"shards": 10**12},
        "list": {"encoder": [1]},
        "word": {"shards": "1"},
        "dict": {"classes": {}},
        "none": {"classes": None},
        "few": {"classes": 0},
    }.items():
        path = tmp_path / name / "latents_00000.safetensors"
        path.parent.mkdir()
        encode.save_shard(path, *torch.zeros(2, 4, 8, 4, 4), torch.zeros(4), **header)
        try:
            encode.LatentDataset(path.parent)
        except fid.Stop as e:
            assert str(path.parent) in e.args[0]
        else:
            assert name == "list"


def test_two_processes_at_one_file_never_mix(tmp_path, monkeypatch):
    """The later one wins, the other is told; a killed one's rest is removed."""
    (tmp_path / ".tmp.77.ckpt.pt").write_text("of a killed process")
    with pytest.raises(fid.Stop, match="ckpt.pt: cannot be written.*another process.*No such file"):
        with fid.atomic(tmp_path / "ckpt.pt") as tmp:
            tmp.write_text("first")
            monkeypatch.setattr(os, "getpid", lambda: 1)
            with fid.atomic(tmp_path / "ckpt.pt") as other:
                assert other != tmp
                other.write_text("second")
    assert os.listdir(tmp_path) == ["ckpt.pt"] and (tmp_path / "ckpt.pt").read_text() == "second"


def test_a_cache_is_read_while_it_is_written(tmp_path):
    """It is refused, or it is whole: never some of it, never a half-written shard."""
    sizes = [5, 3, 4, 2] * 5

    def write():
        for k, n in enumerate(sizes):
            encode.save_shard(
                tmp_path / f"latents_{k:05d}.safetensors",
                *torch.full((2, n, 128, 16, 16), float(k)),
                torch.full((n,), k),
                shards=len(sizes),
                number=k,
                classes=len(sizes),
            )
            time.sleep(0.005)

    writer, refusals = threading.Thread(target=write), 0
    writer.start()
    while True:
        try:
            data = encode.LatentDataset(tmp_path)
            break
        except fid.Stop as e:
            assert "shards" in e.args[0] or "holds no" in e.args[0], e
            refusals += 1
    writer.join()
    assert refusals > 5 and [int(y) for _, y in data] == [
        k for k, n in enumerate(sizes) for _ in range(n)
    ]
    assert all((x == y).all() for x, y in data)


def test_pipes_are_not_waited_for(vae, cli, tmp_path):
    faulthandler.dump_traceback_later(
        60, exit=True, file=sys.__stderr__
    )  # who waits for ever is killed, and pytest with it
    (tmp_path / "photos/a").mkdir(parents=True)
    os.mkfifo(tmp_path / "photos/a/pipe.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "photos/a/red.png")
    status, out, err = cli(
        encode,
        tmp_path / "photos",
        "--vae",
        vae,
        "--size",
        16,
        "--workers",
        1,
        "--device",
        "cpu",
        "--out",
        tmp_path / "l",
    )
    assert status == 0 and "1 files skipped" in out and "pipe.png" in err
    (tmp_path / "cache").mkdir()
    os.mkfifo(tmp_path / "cache/latents_00000.safetensors")
    refused(cli(jlt, *TINY, "--data", tmp_path / "cache"), "latents_00000", status=1)
    faulthandler.cancel_dump_traceback_later()
    refused(cli(fid, tmp_path / "photos", tmp_path / "photos"), "2 images; scores need 10")
