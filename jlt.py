"""JLT: clean-latent prediction in latent diffusion transformers (arXiv 2605.27102), in one file.

A diffusion transformer (DiT) learns to turn Gaussian noise into FLUX.2 latents of ImageNet pictures. On the straight path
from noise to data, z = t x + (1 - t) eps, it may be asked for the velocity v = x - eps, as is usual, or for the clean
latent x itself. Nothing else differs, and in the paper x gives far better pictures.

    python jlt.py --demo                                  # see it: drawn digits, two minutes, no data, no GPU
    python encode.py imagenet/                            # once: pictures -> latents/
    python jlt.py --target x                              # the paper's run; --target v is its baseline. Again: it continues
    torchrun --nproc-per-node 8 jlt.py --micro-batch 128  # the same run on 8 GPUs
    python jlt.py --sample runs/B-1-x --classes 207 360   # a picture of samples; --n 50000: samples.npz, for fid.py
    python jlt.py --geometry latents/                     # what the targets look like on these latents
    python jlt.py --bench                                 # how fast this machine is, and how long the paper's run takes
"""
import copy, hashlib, json, math, os, shutil, signal, tempfile, time, zipfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from encode import (VAE, LatentDataset, cache_digits, decode, digit_judge, draw_digits, encode, load_vae, pick_device,
                    save_grid, save_shard, to_uint8)
from fid import PARSER, RANK, WORLD, Statistics, Stop, atomic, frechet_distance, need, reading, run

# ================================================================ configuration
def flag(default, help, low=-1e15, high=1e15, choices=None):             # a field with what its command-line flag needs
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})

MODELS = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}   # depth, width, heads: the DiT family
@dataclass(frozen=True)
class Config:
    """The paper's run (section 4.1, JLT-B/1). Every field is a flag: sample_steps is --sample-steps."""
    target: str = flag("x", "predicts x: the clean latent; eps: the noise; v: the velocity", choices=("x", "eps", "v"))
    model: str = flag("B/1", "size/patch size; a 0 below: as this says", choices=[f"{m}/{p}" for m in MODELS for p in (1, 2)])
    depth: int = flag(0, "number of blocks", 0)
    hidden_size: int = flag(0, "width", 0)
    num_heads: int = flag(0, "attention heads (of about 64 channels, if the width is given)", 0)
    patch_size: int = flag(0, "side of a token in latent positions", 0)
    bottleneck: int = flag(0, "channels between latent and token; 0: none, as in the published weights", 0)
    steps: int = flag(250_000, "training steps: 200 epochs of ImageNet", 1)                          # from here on: optimisation
    batch: int = flag(1024, "images in a step, on however many GPUs", 1)
    micro_batch: int = flag(0, "images in a pass, also when sampling; 0: largest divisor of batch up to 256", 0)
    lr: float = flag(0.0, "learning rate; 0: 5e-5 * batch / 256", 0)
    warmup_epochs: float = flag(5.0, "epochs of linear warm-up; the rate is constant afterwards", 0)
    cooldown: float = flag(0.0, "share of the steps at the end in which the rate falls to 0; the paper: none", 0, 1)
    ema: float = flag(0.9999, "decay of the averaged weights, those that sample; 0.99 for a run of 1,000 steps", 0, 0.99999)
    label_drop: float = flag(0.1, "share of labels replaced by the null class, for guidance", 0, 1)
    logit_t: tuple = flag((-0.8, 0.8), "t = sigmoid(n), n normal with this mean and standard deviation, for every target")
    t_eps: float = flag(0.05, "floor of the divisors 1 - t and t, in training and sampling", 1e-6, 1)
    seed: int = flag(0, "of weights, data order and noise", 0)
    sample_steps: int = flag(50, "Heun steps", 1)     # from here on: sampling, files and machine
    cfg: float = flag(2.9, "guidance weight; 1: none, at half the cost")
    interval: tuple = flag((0.1, 1.0), "guidance is on where low < t < high", 0, 1)
    data: str = flag("latents", "folder that encode.py wrote")
    out: str = flag("", "run folder (runs/MODEL-TARGET); with --sample the file (samples.png, samples.npz)")
    vae: str = flag("", "repository or folder of the decoder (the VAE that made the latents)")
    log_every: int = flag(100, "steps between log lines", 1)
    save_every: int = flag(2_500, "steps between checkpoints", 1)
    sample_every: int = flag(10_000, "steps between pictures of samples; 0: none", 0)
    device: str = flag("", "cuda, mps or cpu (the best there is)")
    precision: str = flag("auto", "bf16 or fp32 matrix products; auto: bf16 on cuda", choices=("auto", "bf16", "fp32"))
    compile: str = flag("auto", "torch.compile; auto: on cuda", choices=("auto", "on", "off"))

    def __post_init__(self):
        for f in fields(self):
            value, low, high, choices = getattr(self, f.name), *(f.metadata[k] for k in ("low", "high", "choices"))
            good = value in choices if choices else f.type is str or all(low <= x <= high for x in np.ravel(value))
            need(good, f"--{f.name.replace('_', '-')} {value}: needs {' or '.join(choices or [f'{low:g} to {high:g}'])}")
        need(self.interval[0] < self.interval[1], f"--interval {self.interval}: low must be below high")
        need(self.logit_t[1] >= 0, f"--logit-t {self.logit_t}: a standard deviation is not negative")

SAMPLING = {"out", "vae", "device", "compile", "sample_steps", "cfg", "interval"}         # --sample takes these and a few more
FREE = SAMPLING | {"steps", "log_every", "save_every", "sample_every"}    # may change in a run: its weights stay the same

def resolve(cfg):
    """Config with the derived values filled in."""
    name, patch = cfg.model.split("/")
    depth, width, heads = MODELS[name]
    if cfg.hidden_size not in (0, width):             # heads of 64 channels or more, in multiples of 4 for RoPE
        width = cfg.hidden_size
        heads = max((n for n in range(1, width // 64 + 1) if width % (4 * n) == 0), default=1)
    micro = cfg.micro_batch or max(n for n in range(1, min(cfg.batch, 256) + 1) if cfg.batch % n == 0)
    need(cfg.batch % micro == 0, f"--micro-batch {micro}: does not divide --batch {cfg.batch}")
    return replace(cfg, depth=cfg.depth or depth, hidden_size=width, num_heads=cfg.num_heads or heads, micro_batch=micro,
                   patch_size=cfg.patch_size or int(patch), lr=cfg.lr or 5e-5 * cfg.batch / 256,
                   out=cfg.out or f"runs/{name}-{patch}-{cfg.target}")

def autocast(cfg, device):                            # bfloat16 matrix products over float32 weights, or nothing
    on = cfg.precision == "bf16" or cfg.precision == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=on)

def compiled(f, cfg, device):                         # for fixed shapes: each new one costs a minute
    on = cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"
    return torch.compile(f, dynamic=False) if on else f

ORDER, FLIPS, NOISE, SAMPLES = range(4)               # streams of random numbers
def rng(stream, *key, device="cpu"):
    """A generator that is a function of integers such as (seed, step, micro-batch): resuming needs no state of it."""
    state = np.random.SeedSequence((stream, len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))

# ================================================================ model
class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32. Written out: what autocast makes of F.rms_norm changed with torch 2.12."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        h = x.float()
        return (self.weight * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

def modulate(h, shift, scale):                        # (B, N, D), (B, D), (B, D)
    return h * (1 + scale[:, None]) + shift[:, None]

class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D). The sinusoids are of t itself; DiT's are of 1000 t."""
    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))      # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))

def rope_tables(grid, head_dim):
    """cos and sin (N, head_dim/2) of 2-D axial RoPE: half of the channel pairs turn with the row, half with the column."""
    freqs = 10000 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    turns = torch.arange(grid)[:, None] * freqs       # (grid, head_dim/4)
    angles = torch.cat([turns.repeat_interleave(grid, 0), turns.repeat(grid, 1)], -1)
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)        # neighbouring channels make a pair: (B, heads, N, head_dim/2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)     # (B, heads, N, head_dim)
        q, k = (rotate(norm(u), cos, sin).to(v.dtype) for norm, u in ((self.q_norm, q), (self.k_norm, k)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))    # (B, N, D)

class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = int(4 * dim * 2 / 3)                 # three matrices of this cost what two of 4 * dim would
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)

class Block(nn.Module):
    """Transformer block whose norms and gates are set by the conditioning c (adaLN-Zero)."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.attn = RMSNorm(dim), Attention(dim, num_heads)
        self.norm2, self.mlp = RMSNorm(dim), SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):                # (B, N, D), (B, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), cos, sin)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final, self.linear = RMSNorm(dim), nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class JLT(nn.Module):
    """Noisy latent z (B, C, H, W), time t (B,), class y (B,) -> the prediction (B, C, H, W) of x, eps or v: it does not know
    which. JiT's transformer (arXiv 2511.13720), DiT's names; JLT-B/1: 130,508,672 parameters, 46.09 GFLOP an image."""
    def __init__(self, input_size=16, patch_size=1, in_channels=128, hidden_size=768, depth=12, num_heads=12,
                 num_classes=1000, bottleneck=0):
        super().__init__()
        need(input_size % patch_size == 0 and hidden_size % (4 * num_heads) == 0,
             f"--patch-size {patch_size} does not divide {input_size}, or 4 x --num-heads {num_heads} not --hidden-size {hidden_size}")
        self.grid, self.patch_size, self.in_channels, self.num_classes = input_size, patch_size, in_channels, num_classes
        c, d, p, b = in_channels, hidden_size, patch_size, bottleneck     # b: 128 in the paper's text, 0 in its weights
        two = {"proj1": nn.Conv2d(c, b, p, p, bias=False), "proj2": nn.Conv2d(b, d, 1)} if b else {}
        self.x_embedder, self.t_embedder = nn.Sequential(OrderedDict(two or {"proj": nn.Conv2d(c, d, p, p)})), TimestepEmbedder(d)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, d)})    # the last: no class
        self.blocks = nn.ModuleList(Block(d, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(d, p * p * c)
        self.cos, self.sin = (nn.Buffer(table, persistent=False) for table in rope_tables(input_size // p, d // num_heads))
        self.initialize_weights()

    def initialize_weights(self):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))              # a patch convolution is a Linear of pixels
                m.bias is None or nn.init.zeros_(m.bias)
        for table in (self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (self.final_layer.linear, *(m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer))):
            nn.init.zeros_(layer.weight)              # blocks start as the identity, the output as 0

    def forward(self, z, t, y):
        x = self.x_embedder(z).flatten(2).transpose(1, 2)                 # (B, C, H, W) -> (B, N, D), row by row
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)    # (B, D)
        for block in self.blocks:
            x = block(x, c, self.cos, self.sin)                           # (B, N, D)
        x = self.final_layer(x, c)                                        # (B, N, p*p*C)
        p, n = self.patch_size, self.grid // self.patch_size
        return x.reshape(-1, n, n, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)    # (B, C, H, W)

# ================================================================ loss
def velocity(out, z, t, target, t_eps=0.05):
    """The network's output read as a velocity (App. A). out, z: (B, C, H, W), t: (B,). On the path (1),
    v = x - eps = (x - z) / (1 - t) = (z - eps) / t; the divisors are floored at t_eps."""
    t = t.view(-1, 1, 1, 1)
    if target == "x":
        return (out - z) / (1 - t).clamp_min(t_eps)
    if target == "eps":
        return (z - out) / t.clamp_min(t_eps)
    need(target == "v", f"target {target!r} is none of x, eps, v")
    return out

def flow_loss(net, x, y, t, eps, target="x", t_eps=0.05, per_image=False):
    """Mean squared error in velocity space, for every target. x, eps: (B, C, H, W), t: (B,), y: (B,) after label
    dropout -> scalar, or (B,). A pure function of its arguments. The true target goes through the same floored
    readout as the prediction, so for x this is |x^ - x|^2 / max(1 - t, t_eps)^2 (JiT's weighting)."""
    s = t.view(-1, 1, 1, 1)
    z = s * x + (1 - s) * eps                                             # (1)
    y_target = {"x": x, "eps": eps, "v": x - eps}[target]                 # (2)
    v_hat = velocity(net(z, t, y), z, t, target, t_eps)
    error = (v_hat - velocity(y_target, z, t, target, t_eps)).square()
    return error.mean((1, 2, 3)) if per_image else error.mean()

# ================================================================ sampler
@torch.no_grad()
def sample(net, y, noise, target="x", steps=50, cfg=2.9, interval=(0.1, 1.0), method="heun", t_eps=0.05):
    """Integrates dz/dt = v from noise (B, C, H, W) at t = 0 to latents at t = 1, for classes y (B,).
    method: "heun" (second order; the last step is Euler's) or "euler". Where guidance is off (cfg = 1, or t
    outside the open interval; low = 0 includes t = 0) the unconditional pass is not computed."""
    def guided(z, t):
        on = cfg != 1 and (interval[0] < t or interval[0] == 0) and t < interval[1]
        zz, yy = (torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.num_classes)])) if on else (z, y)
        tt = torch.full((len(zz),), t, device=z.device, dtype=z.dtype)
        v, *v_u = velocity(net(zz, tt, yy), zz, tt, target, t_eps).to(z.dtype).split(len(z))    # float32, also of bf16
        return v_u[0] + cfg * (v - v_u[0]) if on else v

    z = noise
    for i in range(steps):
        t, t_next = i / steps, (i + 1) / steps        # Python floats: in float32, t = 0.1 is above or below 0.1
        v = guided(z, t)
        step = z + (t_next - t) * v
        if method == "heun" and i < steps - 1:
            step = z + (t_next - t) * (v + guided(step, t_next)) / 2
        z = step
    return z

# ================================================================ data
def batches(data, cfg, jobs, device):
    """For each (step, micro-batch) in `jobs`: latents x (B, C, H, W) float32 and labels y (B,) on `device`, read
    ahead by threads. Every epoch is a new order of the data; each image is mirrored half the time."""
    order = lru_cache(2)(lambda epoch: torch.randperm(len(data), generator=rng(ORDER, cfg.seed, epoch)))
    def read(step, m):
        first = step * cfg.batch + m * cfg.micro_batch
        index = [int(order(p // len(data))[p % len(data)]) for p in range(first, first + cfg.micro_batch)]
        flips = torch.rand(cfg.micro_batch, generator=rng(FLIPS, cfg.seed, step, m)) < 0.5
        x, y = torch.stack([data.item(i, flip)[0] for i, flip in zip(index, flips)]), data.labels[index]
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)
    with ThreadPoolExecutor(4) as pool:
        queue = deque(pool.submit(read, *job) for job in islice(jobs, 8))
        while queue:
            x, y = queue.popleft().result()
            queue.extend(pool.submit(read, *job) for job in islice(jobs, 1))
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

def draws(cfg, step, m, x, y, num_classes):
    """Times t (B,), noise eps (B, C, H, W) and labels after dropout (B,) of a micro-batch: the same for every target."""
    g = rng(NOISE, cfg.seed, step, m, device=x.device)
    t = torch.sigmoid(torch.randn(len(x), generator=g, device=x.device) * cfg.logit_t[1] + cfg.logit_t[0])
    eps = torch.randn(x.shape, generator=g, device=x.device)
    return t, eps, torch.where(torch.rand(len(x), generator=g, device=x.device) < cfg.label_drop, num_classes, y)

# ================================================================ checkpoints
def load_file(path):
    """torch.load that runs no code from the file; argparse.Namespace is the one class it may name."""
    with torch.serialization.safe_globals([Namespace]), reading(path, "damaged, or no checkpoint"):
        need(not (bad := zipfile.ZipFile(path).testzip()), f"{path}: {bad} is damaged")                 # torch would not tell
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        need(not foreign, f"{path}: names {', '.join(foreign)}, and no code is imported for a checkpoint")
        return torch.load(path, map_location="cpu", weights_only=True)

def load_network(path):
    """-> EMA network, its settings (target, t_eps, vae), from our checkpoints (a file or its run folder) and the
    paper's (checkpoint-last.pth: its first EMA). The architecture is read from the shapes. Stop if it does not fit."""
    state = load_file(path := os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path)
    with reading(path, "holds no JLT"):
        if published := "model_ema1" in state:
            args, weights = state["args"], {k.removeprefix("net."): v.float() for k, v in state["model_ema1"].items()}
            weights.pop("mask_token", None)           # was trained along but never used
            grid, known = args.img_size // 16, {"target": getattr(args, "flow_matching", None), "t_eps": args.t_eps, "vae": VAE}
        else:
            weights, grid, known = state["ema"], state["grid"], {k: state["config"][k] for k in ("target", "t_eps", "vae")}
        stem = weights.get("x_embedder.proj.weight", weights.get("x_embedder.proj1.weight"))    # (D, C, p, p)
        width, depth = len(weights["t_embedder.mlp.2.bias"]), len({k.split(".")[1] for k in weights if k[:7] == "blocks."})
        heads, classes = width // len(weights["blocks.0.attn.q_norm.weight"]), len(weights["y_embedder.embedding_table.weight"]) - 1
        net = JLT(grid, stem.shape[2], stem.shape[1], width, depth, heads, classes, len(stem) * ("x_embedder.proj1.weight" in weights))
        net.load_state_dict(weights)
        print(f"{path}: {known['target']}-prediction,", "first EMA (model_ema1)" if published else f"EMA of step {state['step']:,}")
    return net.eval().requires_grad_(False), known

# ================================================================ samples
def generate(net, labels, first, cfg, device):
    """Sampled latents (N, C, H, W) of classes `labels`. The noise of image i = first, first + 1, ... depends on (seed, i) alone."""
    noise = torch.stack([torch.randn(net.in_channels, net.grid, net.grid, generator=rng(SAMPLES, cfg.seed, i))
                         for i in range(first, first + len(labels))]).to(device)
    with autocast(cfg, device):
        return sample(net, labels.to(device), noise, cfg.target, cfg.sample_steps, cfg.cfg, cfg.interval, t_eps=cfg.t_eps)

def pictures(vae, latents):                           # -> uint8 (N, 3, H, W) on the CPU
    need(latents.isfinite().all(), "the sampled latents are not finite: damaged weights, or too large a --cfg", 1)
    return torch.cat([to_uint8(decode(vae, z)).cpu() for z in latents.split(32)])

def sample_command(checkpoint, classes, n, given):
    """--sample: one image of each of `classes` as a PNG without gaps, or n of all classes as an npz like ADM's: arr_0,
    uint8 (n, H, W, 3). Finished batches wait in a hidden folder: processes share the work, an interrupted run continues."""
    need(bool(classes) != bool(n) and 0 < (n or 1) < 10**9, "--sample: say what, --classes 207 360 ... or --n 50000 (at least 1)")
    useless = given.keys() - SAMPLING - {"target", "t_eps", "seed", "micro_batch", "precision"}
    need(not useless, f"--{min(useless, default='').replace('_', '-')}: has no use with --sample; the checkpoint decides")
    cfg = Config(**given)
    device, out = pick_device(cfg.device), Path(cfg.out or ("samples.npz" if n else "samples.png"))
    need(out.suffix == (".npz" if n else ".png"), f"--out {out}: needs the ending .npz with --n, .png with --classes")
    need(not out.exists() and os.access(out.parent, os.W_OK), f"{out}: exists, or its folder is not there to write to")
    net, known = load_network(checkpoint)
    need(given.get("target") in (None, known["target"]) or known["target"] not in ("x", "eps", "v"), "--target: the checkpoint has its own")
    cfg = replace(cfg, **{k: v for k, v in known.items() if k not in given})
    need(n or 0 <= min(classes) <= max(classes) < net.num_classes, f"--classes: the checkpoint has classes 0 to {net.num_classes - 1}")
    labels = torch.arange(n) % net.num_classes if n else torch.tensor(classes)
    WORLD > 1 and dist.init_process_group("gloo", timeout=100 * dist.constants.default_pg_timeout)        # waits for all
    vae, micro = load_vae(cfg.vae, device), min(len(labels), cfg.micro_batch or 256)
    made_by = repr((micro, labels.tolist(), replace(cfg, out="", device="", compile="auto")))     # what makes the pixels
    digest = hashlib.sha256(made_by.encode() + b"".join(v.numpy().tobytes() for v in net.state_dict().values())).hexdigest()[:12]
    parts, net = out.with_name(f".tmp.{out.name}.{digest}"), compiled(net.to(device), cfg, device)
    files = {first: parts / f"{first:09d}.npy" for first in range(0, len(labels), micro)}
    for first in tqdm(list(files)[RANK::WORLD], unit=f"x {micro} images", disable=RANK > 0):
        if not files[first].exists():                 # the last batch is filled up: one shape to compile for
            parts.mkdir(parents=True, exist_ok=True)
            images = pictures(vae, generate(net, labels.roll(-first)[:micro], first, cfg, device)[:len(labels) - first])
            with atomic(files[first]) as tmp:
                np.save(tmp, images.permute(0, 2, 3, 1).contiguous().numpy())
    WORLD > 1 and (dist.barrier(), dist.destroy_process_group())
    if RANK:
        return
    with reading(parts, "a damaged batch; delete this folder and start again", 1, (ValueError, EOFError)):
        size, images = np.load(files[0], mmap_mode="r").shape[1:], (np.load(path) for path in files.values())      # (B, H, W, 3) each
        if n:
            with atomic(out) as tmp, zipfile.ZipFile(tmp, "w") as z, z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
                np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (n, *size)})
                f.writelines(images)
        else:
            rows = max(d for d in range(1, math.isqrt(len(labels)) + 1) if len(labels) % d == 0)  # as square as it gets
            save_grid(out, torch.from_numpy(np.concatenate([*images])).permute(0, 3, 1, 2), len(labels) // rows)
    [shutil.rmtree(left) for left in out.parent.iterdir() if left.name[:-12] == f".tmp.{out.name}."]     # other settings' batches, too
    print(f"wrote {out}: {cfg.target}-prediction, {cfg.sample_steps} Heun steps, guidance {cfg.cfg} on {cfg.interval}, seed {cfg.seed}")

# ================================================================ training
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}    # dense bf16, datasheets
def forward_flops(net):
    """FLOP of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        copy.deepcopy(net).to("meta")(torch.empty(1, net.in_channels, net.grid, net.grid), torch.empty(1), torch.ones(1).long())
    return counter.get_total_flops()

def build(cfg, shape, num_classes, device):
    """Network, its average (EMA) and optimizer, for latents of `shape` (C, H, W)."""
    torch.manual_seed(cfg.seed)                       # initial weights: the same on every rank, for every target
    net = JLT(shape[1], cfg.patch_size, shape[0], cfg.hidden_size, cfg.depth, cfg.num_heads, num_classes, cfg.bottleneck).to(device)
    opt = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)
    return net, copy.deepcopy(net).requires_grad_(False), opt

def update(net, ema, opt, decay):
    """Clips the gradient, takes AdamW's step and averages the weights -> gradient norm, not waited for."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    torch._foreach_lerp_([a.detach() for a in ema.parameters()], [p.detach() for p in net.parameters()], 1 - decay)
    return norm

def train(cfg):
    """Trains cfg.target on cfg.data, or continues the run in cfg.out. Returns the run folder."""
    device, cfg, data = pick_device(cfg.device), resolve(cfg), LatentDataset(cfg.data)
    cfg, out, micros = replace(cfg, vae=cfg.vae or data.headers[0].get("vae", VAE)), Path(cfg.out), cfg.batch // cfg.micro_batch
    need(WORLD <= micros, f"{WORLD} processes for {micros} micro-batches; give --micro-batch {max(1, cfg.batch // WORLD)} or less")
    if WORLD > 1:                                     # gloo, on the CPU, carries the flag that says "stop"
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    total = dist.all_reduce if WORLD > 1 else lambda tensor: None         # a sum over the processes, in place
    net, ema, opt = build(cfg, data.shape, data.num_classes, device)
    path, log_file, start, stop, vae = out / "ckpt.pt", out / "log.jsonl", 0, 0, None
    made_of = data.labels.numpy().tobytes() + repr(data.origin).encode()
    identity = f"{len(data):,} latents {data.shape} of {data.num_classes} classes (digest {hashlib.sha256(made_of).hexdigest()[:8]})"
    if path.exists():                                 # continue, if it was made with these settings and data
        state, new = load_file(path), asdict(cfg) | {"data": identity}
        with reading(path, "not a checkpoint of this program; give another --out"):
            old, start = state["config"] | {"data": state["identity"]}, state["step"]
            fixed = new.keys() - FREE | ({"steps"} if cfg.cooldown else set())          # a cool-down depends on where it ends
            other = [f"{k} {old.get(k)} (now {new[k]})" for k in sorted(fixed) if old.get(k) != new[k]]
            need(not other, f"{path}: made with other settings: {', '.join(other)}; give another --out")
            for name, part in {"model": net, "ema": ema, "optimizer": opt}.items():
                part.load_state_dict(state[name])
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        with reading(log_file, "a damaged line; delete the file, and the run goes on"):
            lines = log_file.read_text().splitlines(True) if log_file.exists() else []
            kept = [line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= start]   # the others come again
        with atomic(log_file) as tmp:
            tmp.write_text("".join(kept))
        begin = f"continuing at step {start:,}" if start else "from the start" + ", for want of a ckpt.pt" * bool(lines)
        print(f"{out}: {cfg.target}-prediction, {sum(p.numel() for p in net.parameters()):,} parameters, {identity}, batch {micros} x "
              f"{cfg.micro_batch} on {WORLD} x {device}, {begin}", flush=True)
    if RANK == 0 and 0 < cfg.sample_every <= cfg.steps:
        try:
            vae = load_vae(cfg.vae, device)
            need(isinstance(vae, dict) or len(vae.bn.running_mean) == data.shape[0], f"{cfg.vae}: not for {data.shape[0]} channels")
        except Stop as e:
            vae = None
            print(f"no pictures on the way: {e.args[0]}", flush=True)
    loss_fn, flops = compiled(flow_loss, cfg, device), 3 * forward_flops(net)           # a backward pass costs two forward ones
    warmup = max(1, round(cfg.warmup_epochs * len(data) / cfg.batch))
    peak = WORLD * PEAK.get(torch.cuda.get_device_name(device), 0) if device.type == "cuda" else 0
    device.type == "cuda" and torch.cuda.reset_peak_memory_stats(device)
    stream = batches(data, cfg, ((s, m) for s in range(start, cfg.steps) for m in range(RANK, micros, WORLD)), device)
    recent, bins, clock, caught, step = [], torch.zeros(2, 10, device=device), time.perf_counter(), [], start
    handler = lambda s, _: (caught.append(s), signal.signal(s, signal.SIG_DFL))         # first: end this step; second: at once
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}

    for step in range(start + 1, cfg.steps + 1):      # ------------------------- one step
        lr = opt.param_groups[0]["lr"] = cfg.lr * min(1, step / warmup, (cfg.steps + 1 - step) / max(1, cfg.cooldown * cfg.steps))
        step_loss = torch.zeros((), device=device)
        for m in range(RANK, micros, WORLD):
            x, y = next(stream)
            t, eps, y = draws(cfg, step - 1, m, x, y, data.num_classes)   # outside what is compiled
            with autocast(cfg, device):
                losses = loss_fn(net, x, y, t, eps, cfg.target, cfg.t_eps, per_image=True)      # (B,)
            (losses.mean() / micros).backward()
            step_loss += losses.detach().mean() / micros
            bins.index_add_(1, (10 * t).long().clamp(max=9), torch.stack([losses.detach(), torch.ones_like(t)]))
        if WORLD > 1:                                 # all gradients in one sum over the processes
            total(flat := nn.utils.parameters_to_vector(grads := [p.grad for p in net.parameters()]))
            nn.utils.vector_to_parameters(flat, grads)
        recent.append(torch.stack([step_loss, update(net, ema, opt, cfg.ema)]))
        # ----------------------------------------------------------------------- once in a while
        total(stop := torch.tensor(len(caught)))
        save = step % cfg.save_every == 0 or step == cfg.steps or stop
        if save or step % cfg.log_every == 0:         # here, and only here, the host waits for the GPU
            losses, norms = torch.stack(recent, 1)                        # (steps since the last line,) each
            total(losses), total(bins)
            good = (losses.isfinite() & norms.isfinite()).int()
            need(good.all(), f"{out}: loss or gradient not finite at step {step - len(recent) + 1 + int(good.argmin()):,}; "
                 "ckpt.pt, if any, is from before; try a lower --lr, or --precision fp32", 1)
            seconds = (time.perf_counter() - clock) / len(recent)
            row = {"step": step, "loss": losses.mean().item(), "grad_norm": norms.mean().item(), "lr": lr, "ms": 1000 * seconds,
                   "images_per_s": cfg.batch / seconds, "mfu": cfg.batch / seconds * flops / peak if peak else 0,
                   "gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0,
                   "loss_by_t": [loss / n if n else None for loss, n in zip(*bins.tolist())]}
            recent = []
            bins.zero_()
            if RANK == 0:
                print(f"step {step:,}/{cfg.steps:,} {step / cfg.steps:.1%} | loss {row['loss']:.4f} | grad {row['grad_norm']:.3f} | "
                      f"lr {lr:.2e} | {row['ms']:.0f} ms/step {row['images_per_s']:,.0f} images/s | mfu {row['mfu']:.1%} "
                      f"{row['gib']:.1f} GiB | eta {tqdm.format_interval((cfg.steps - step) * seconds)}", flush=True)
                if step % (10 * cfg.log_every) == 0:
                    print("  loss by t, from noise to data:", *("-" if v is None else f"{v:.3f}" for v in row["loss_by_t"]), flush=True)
                with reading(log_file, "cannot be written; is the disk full?", 1), open(log_file, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if save and RANK == 0:
            state = {"config": asdict(cfg), "identity": identity, "grid": data.shape[1], "step": step,
                     "model": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.state_dict()}
            with atomic(path) as tmp:
                torch.save(state, tmp)
        if vae and step % cfg.sample_every == 0:
            labels = torch.linspace(0, data.num_classes - 1, 16).long()
            save_grid(out / f"samples_{step:07d}.png", pictures(vae, generate(ema, labels, 0, cfg, device)), 8)
        clock = clock if recent else time.perf_counter()                  # saving and drawing are not training
        if stop:
            break
    [signal.signal(*pair) for pair in before.items()]
    WORLD > 1 and dist.destroy_process_group()
    need(not stop, f"{out}: stopped by a signal, saved at step {step:,}; the same command continues", 130)
    RANK or print(f"{out}: {max(start, cfg.steps):,} steps done; samples: python jlt.py --sample {out} --classes 0 1")
    return out

# ================================================================ target geometry (section 3.2, App. B and D)
def gaussian_risk(lam, t):
    """Least mean squared errors per direction for x ~ N(0, diag(lam)) at time t: the variances left in x, eps and v
    once z is known (5)-(6), App. B. -> {"x": R_x, "eps": R_eps, "v": R_v}; R_v is R_x / (1 - t)^2."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    d = t ** 2 * lam + (1 - t) ** 2                                       # variance of z
    parts = {"x": lam * (1 - t) ** 2 / d, "eps": t ** 2 * lam / d, "v": lam / d}
    return {target: part.mean().item() for target, part in parts.items()}

def gaussian_gain(lam, t):
    """E[x|z] / z and E[v|z] / z in a direction of variance lam: how much of z the best prediction hands on (App. B)."""
    return t * lam / (t ** 2 * lam + (1 - t) ** 2), (t * lam - (1 - t)) / (t ** 2 * lam + (1 - t) ** 2)

def effective_rank(lam, order=1):
    """How many directions carry the variance: exp of the Renyi entropy of lam / sum(lam). Order 1 is Shannon's entropy
    (Roy & Vetterli 2007), order 2 the participation ratio (sum lam)^2 / sum lam^2, which asks the large directions."""
    p = F.normalize(torch.as_tensor(lam, dtype=torch.float64), p=1, dim=0)
    return (torch.special.entr(p).sum().exp() if order == 1 else 1 / p.square().sum()).item()

def tokens(latents, p):                               # (B, C, H, W) -> (B * H/p * W/p, p*p*C)
    return F.pixel_unshuffle(latents.float(), p).movedim(1, -1).flatten(0, 2)

def linear_probe(fit, held_out, t):
    """App. D: mean squared errors per dimension, on held-out tokens (N, D), of the best linear predictors of x and of v
    from z at time t (ridge regression in closed form), to set beside gaussian_risk."""
    x, n = torch.cat([fit, held_out]).double(), len(fit)
    eps = torch.randn(x.shape, generator=rng(NOISE, 0), dtype=x.dtype)
    z = F.pad(t * x + (1 - t) * eps, (0, 1), value=1)                     # a last column for the mean
    gram = z[:n].T @ z[:n] + 1e-3 * torch.eye(z.shape[1], dtype=z.dtype)
    error = lambda y: (y - z @ torch.linalg.solve(gram, z[:n].T @ y[:n]))[n:].square().mean().item()
    return {"x": error(x), "v": error(x - eps)}                           # (2)

def chart(title, curves):
    """Curves {name: [(x, y), ...]} with a logarithmic y axis -> image (3, 420, 560)."""
    image, (xs, ys) = Image.new("RGB", (560, 420), "white"), zip(*(point for points in curves.values() for point in points))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    low, high = math.floor(math.log10(max(min(ys), 1e-5))), math.ceil(math.log10(max(ys)))
    at = lambda x, y: (60 + 480 * (x - min(xs)) / (max(xs) - min(xs)), 380 - 340 * (math.log10(max(y, 1e-9)) - low) / (high - low))
    draw.text((60, 10), title, "black", font)
    for e in range(low, high + 1):
        draw.line([at(min(xs), 10.0 ** e), at(max(xs), 10.0 ** e)], "#dddddd")
        draw.text((8, at(0, 10.0 ** e)[1] - 9), f"1e{e}", "black", font)
    for x in (min(xs), max(xs)):
        draw.text((at(x, 1)[0] - 8, 386), f"{x:g}", "black", font)
    for k, ((name, points), colour) in enumerate(zip(curves.items(), ("#1f77b4", "#7f7f7f", "#d62728"))):
        draw.line([at(*point) for point in points], colour, 3)
        draw.text((110, 310 + 20 * k), name, colour, font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)

def geometry(folder, cfg):
    """--geometry: the spectrum of a cache's tokens, and what (3)-(6) make of it. A table, and geometry.png."""
    folder or cache_digits(folder := Path("runs/digits"))
    data, p, out = LatentDataset(folder), resolve(cfg).patch_size, Path(cfg.out or "geometry.png")
    need(data.shape[1] % p == 0 and len(data) > 1, f"{folder}: {len(data)} latents {data.shape} have no {p} x {p} statistics")
    need(os.access(out.parent, os.W_OK) and not (cfg.out and out.exists()), f"{out}: exists, or its folder is not there to write to")
    rows = lambda index: tokens(torch.stack([data.item(i)[0] for i in index]), p)
    statistics = Statistics(data.shape[0] * p * p)
    for i in tqdm(range(0, len(data), 64), unit="x 64 latents"):
        statistics.update(rows(range(i, min(i + 64, len(data)))))
    lam = torch.linalg.eigvalsh(torch.from_numpy(statistics.cov)).flip(0).clamp(min=0)
    spectra = {"x": lam, "eps": torch.ones_like(lam), "v": lam + 1}       # x and eps are independent
    some = rows(range(0, len(data), -(-statistics.n // 60_000)))
    fit, held_out = some[torch.randperm(len(some), generator=rng(ORDER, 0))].chunk(2)
    print(f"{folder}: {statistics.n:,} tokens of {len(lam)} dimensions; variances {lam[0]:.3g} to {lam[-1]:.3g}, "
          f"{lam.mean():.3f} on average\n\ntarget   effective rank   participation ratio   share of variance in the smaller half")
    for target, s in spectra.items():
        print(f"{target:6} {effective_rank(s):12.1f} {effective_rank(s, 2):17.1f} {s[len(s) // 2:].sum() / s.sum():23.1%}")
    print("\n   t     R_x   R_eps     R_v   linear probe: x       v   gain in the smallest direction: x       v")
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        risk, probe, gain = gaussian_risk(lam, t), linear_probe(fit, held_out, t), gaussian_gain(lam[-1].item(), t)
        print(f"{t:4.1f} {risk['x']:7.4f} {risk['eps']:7.4f} {risk['v']:7.4f} {probe['x']:16.4f} {probe['v']:7.4f} "
              f"{gain[0]:32.4f} {gain[1]:7.3f}")
    risks = {f"R_{k}": [(i / 100, gaussian_risk(lam, i / 100)[k]) for i in range(1, 100)] for k in spectra}
    spectra = {f"y_{k}": [*enumerate(s.tolist(), 1)] for k, s in spectra.items()}
    save_grid(out, torch.stack([chart("Eigenvalues of the targets' covariance, by rank", spectra),
                                chart("Least error per dimension, over t (0: noise)", risks)]), 2)
    print(f"\nwrote {out}")

# ================================================================ the demo
DEMO = {"hidden_size": 64, "depth": 3, "batch": 64, "steps": 1500, "lr": 3e-3, "cooldown": 1.0, "warmup_epochs": 0.3, "ema": 0.99,
        "sample_steps": 25, "cfg": 1.5, "interval": (0.0, 1.0), "sample_every": 0, "log_every": 250, "data": "runs/digits"}
DEMO_IMAGES = 2000                                    # samples of each target, and digits to compare them with

def demo(given):
    """--demo: the same network, loss, loop and sampler on drawn digits, for x and for v from the same weights, data
    order and noise. Prints the table and writes the picture: rows of real digits, of x's and of v's."""
    started, targets = time.time(), [given["target"]] if "target" in given else ["x", "v"]
    changed = "".join(f"-{k}-{v}" for k, v in sorted(given.items()) if k not in FREE - {"steps"} | {"target"})
    out = Path(given.pop("out", "runs/demo" + changed))
    cfg = Config(**DEMO | given)
    device, n = pick_device(cfg.device), DEMO_IMAGES
    cache_digits(Path(cfg.data))
    codec, judge = load_vae(f"{cfg.data}/codec.safetensors"), digit_judge(*draw_digits(2 * n, seed=2))
    real, labels = draw_digits(2 * n, seed=3)         # two held-out halves: to compare with, and to be compared
    accuracy = lambda images: (judge(images / 127.5 - 1).argmax(1) == labels[:len(images)]).float().mean()
    low = lambda z: tokens(z, 1)[:, 64:].var(0).sum() # energy where the digits have least
    def spaces(images):                               # mean and covariance of pooled pixels, and of what the judge looks at
        x = images / 127.5 - 1
        return [(f.mean(0), f.T.cov()) for f in (F.avg_pool2d(x, 4).flatten(1).double(), judge[:-1](x).double())]
    def row(name, images, latents, loss=""):
        pooled, learned = (frechet_distance(*a, *b) for a, b in zip(spaces(images), reference))
        return f"{name:12} {loss:>6} {pooled:15.2f} {learned:17.1f} {low(latents) / low(z_real):17.2f} {accuracy(images):13.1%}"
    reference, z_real = spaces(real[:n]), encode(codec, real[n:] / 127.5 - 1)
    table, shown = [row("real", real[n:], z_real), row("real, coded", pictures(codec, z_real), z_real)], [real[:20]]
    for target in targets:
        folder = train(replace(cfg, target=target, out=str(out / target)))
        loss = json.loads(['{"loss": NaN}', *(folder / "log.jsonl").read_text().splitlines()][-1])["loss"]      # NaN if it is gone
        net, _ = load_network(folder)
        z = generate(net.to(device), labels[:n], 0, replace(cfg, target=target), device).cpu()
        shown.append((images := pictures(codec, z))[:20])
        table.append(row(f"{target}-pred.", images, z, f"{loss:.3f}"))
    save_grid(out / "demo.png", F.interpolate(torch.cat(shown).float(), scale_factor=3).to(torch.uint8), 10)
    print("\n               loss   pooled pixels   digit features   low directions   read right", *table, sep="\n")
    print("\nFrechet distances to held-out digits in two feature spaces: lower is better, 'real' is the floor. low directions:\n"
          f"energy in the 64 of 128 directions where data has least; its own is 1. {out / 'demo.png'}: two rows each of real digits, "
          f"{', '.join(targets)}. [{time.time() - started:.0f} s]")

# ================================================================ benchmark
def bench(cfg):
    """--bench: how fast this machine trains, loads, samples and decodes, by the functions that do it, on random latents."""
    device, paper, cores = pick_device(cfg.device), cfg, torch.get_num_threads()
    cuda = device.type == "cuda" and torch.cuda.get_device_properties(device)
    name = cuda.name if cuda else f"{cores} CPU threads"
    cfg = replace(cfg, micro_batch=cfg.micro_batch or (0 if cuda else 4), steps=20, log_every=5, sample_every=0, lr=1e-3,
                  warmup_epochs=0.0, ema=0.0)         # no weight stays zero: zeros multiply faster
    b = (cfg := resolve(cfg if cuda else replace(cfg, batch=cfg.micro_batch))).micro_batch
    median = lambda work: Timer("work()", globals={"work": work}, num_threads=cores).blocked_autorange(min_run_time=1).median
    with tempfile.TemporaryDirectory() as tmp:
        z, y, rate = torch.randn(2048, 128, 16, 16), torch.arange(b) % 1000, {}
        save_shard(Path(tmp, "latents_00000.safetensors"), z, z, torch.arange(2048) % 1000, classes=1000)
        for mode in ["off"] + ["on"] * (compiled(print, cfg, device) is not print):     # where nothing is compiled, f is f
            folder = train(replace(cfg, data=tmp, out=f"{tmp}/{mode}", compile=mode))
            rows = [json.loads(line) for line in open(folder / "log.jsonl")][1:]           # the first waited for the compiler
            rate[mode] = best = np.median([row["images_per_s"] for row in rows])
        loader = batches(LatentDataset(tmp), cfg, ((s, 0) for s in range(10**9)), device)
        loading = 8 * b / median(lambda: [next(loader) for _ in range(8)])
        sampler = compiled(load_network(folder)[0].to(device), cfg, device)
    guided, plain = (b / median(lambda: generate(sampler, y, 0, replace(cfg, cfg=w), device)) for w in (cfg.cfg, 1.0))
    net, ema, opt = build(cfg, (128, 16, 16), 1000, device)
    flops, peak, gib, opt.zero_grad = 3 * best * forward_flops(net), PEAK.get(name, 0), rows[-1]["gib"], lambda: None
    for p in net.parameters():
        p.grad = torch.randn_like(p)                  # stays, without zero_grad
    fixed = 20 * (params := sum(p.numel() for p in net.parameters()))    # bytes: weight, gradient, EMA and AdamW's two
    with autocast(cfg, device):
        a = torch.randn(2, *2 * [8192 if cuda else 1024], device=device)
        a = a @ a                                     # in the precision of training
        wall = 2 * a.shape[1] ** 3 / median(lambda: a[0] @ a[1])
    report = {
        "model": f"{params:,} parameters, micro-batch {b} of {cfg.batch}; {name}, torch {torch.__version__}",
        "training": f"{best:,.1f} images/s, {1000 * cfg.batch / best:,.0f} ms a step, {best / rate['off']:.2f} x eager",
        "memory": f"peak {gib:.1f} GiB; passes of {b * (cuda.total_memory - fixed) / (gib * 2**30 - fixed):,.0f} fit" if cuda else "-",
        "arithmetic": f"{flops / 1e12:.2f} TFLOP/s: {flops / wall:.0%} of large products here, MFU "
                      + (f"{flops / peak:.1%} of {peak / 1e12:.0f}" if peak else "0 (rate of this device unknown)"),
        "update": f"{1000 * median(lambda: update(net, ema, opt, cfg.ema)):.1f} ms a step for clipping, AdamW and EMA",
        "loading": f"{loading:,.0f} latents/s from a cache to the device, {loading / best:.1f} x what training takes",
        "sampling": f"{guided:.2f} images/s guided, {plain:.2f} not, {cfg.sample_steps} Heun steps"}
    if paper.vae:
        vae, x = load_vae(paper.vae, device), torch.rand(32 if cuda else 2, 3, 256, 256)
        decoding = len(x) / median(lambda: pictures(vae, z[:len(x)]))
        report["VAE"] = f"{len(x) / median(lambda: encode(vae, x)):.1f} images/s encoded, {decoding:.1f} decoded, at 256 x 256"
    report["in all"] = (f"{paper.steps:,} steps of {paper.batch:,} images take "
                        f"{paper.steps * paper.batch / best / 3600:,.1f} hours here, 50,000 guided samples {50_000 / guided / 60:,.1f} minutes")
    print("", *(f"{what:12}{text}" for what, text in report.items()), sep="\n")

# ================================================================ command line
def main():
    parser = ArgumentParser(description=__doc__, **PARSER)
    mode, add = parser.add_mutually_exclusive_group().add_argument, parser.add_argument
    mode("--demo", action="store_true", help="x against v on drawn digits, in two minutes, without data or GPU")
    mode("--geometry", nargs="?", const="", metavar="LATENTS", help="what the targets look like on a cache (or the digits)")
    mode("--bench", action="store_true", help="how fast this machine trains and samples (on a CPU give a small model)")
    mode("--sample", metavar="CKPT", help="sample from a run folder, its ckpt.pt, or the paper's checkpoint-last.pth")
    add("--classes", type=int, nargs="+", metavar="Y", help="with --sample: a PNG grid, one picture per class given")
    add("--n", type=int, help="with --sample: this many pictures of all classes, as an npz")
    for f in fields(Config):
        kind = {"type": float, "nargs": 2} if f.type is tuple else {"type": f.type, "choices": f.metadata["choices"]}
        add("--" + f.name.replace("_", "-"), default=SUPPRESS, metavar=f.name[0].upper(), **kind,
            help=f"{f.metadata['help']} ({f.default})" if f.default else f.metadata["help"])
    given = {k: tuple(v) if k in ("interval", "logit_t") else v for k, v in vars(parser.parse_args()).items()}
    show, folder, speed, checkpoint, classes, n = (given.pop(k) for k in ("demo", "geometry", "bench", "sample", "classes", "n"))
    need(checkpoint is not None or classes is n is None, "--classes and --n go with --sample CKPT")
    useless = given.keys() & {"data", "vae"} if show else given.keys() - {"model", "patch_size", "out"} if folder is not None else ()
    need(not useless, f"--{min(useless, default='').replace('_', '-')}: has no use with --demo or --geometry")
    need(WORLD == 1 or not (show or speed or folder is not None), "--demo, --geometry and --bench are for one process")
    if checkpoint is not None:
        sample_command(checkpoint, classes, n, given)
    elif show:
        demo(given)
    elif folder is not None:
        geometry(folder, Config(**given))
    else:
        (bench if speed else train)(Config(**given))

if __name__ == "__main__":
    run(main)
