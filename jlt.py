"""JLT: clean-latent prediction in latent diffusion transformers (arXiv 2605.27102), in one file.

A diffusion transformer (DiT) learns to turn Gaussian noise into FLUX.2 latents of ImageNet pictures. On the straight path
from noise to data, z = t x + (1 - t) eps, it may be asked for the velocity v = x - eps, as is usual, or for the clean
latent x itself. Nothing else differs, and x gives the far better pictures.

    python jlt.py --demo                                  # see it: drawn digits, two minutes, no data, no GPU
    python encode.py imagenet/                            # once: pictures -> latents/
    python jlt.py --target x                              # the paper's run; --target v is its baseline
    torchrun --nproc-per-node 8 jlt.py --micro-batch 128  # the same run on 8 GPUs
    python jlt.py --sample runs/B-1-x --classes 207 360   # a picture of samples; --n 50000: samples.npz, for fid.py
    python jlt.py --geometry latents/                     # what the targets look like on these latents

The same command run again continues where the last one stopped.
"""
import copy, hashlib, json, math, os, re, shutil, signal, time, zipfile
from argparse import SUPPRESS, Namespace
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from encode import (RANK, VAE, WORLD, LatentDataset, Stop, atomic, cache_digits, decode, draw_digits, encode, load_vae,
                    make_parser, need, pick_device, positive, run, save_grid, to_uint8)
from fid import DigitNet, Statistics, frechet_distance

# ================================================================ configuration
def flag(default, help, low=-math.inf, high=math.inf, choices=None):
    """A field of Config, with the help text and the limits of its command-line flag."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})

MODELS = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}   # depth, width, heads: the DiT family

@dataclass(frozen=True)
class Config:
    """The paper's run (section 4.1, JLT-B/1). Every field is a flag: sample_steps is --sample-steps."""
    # what the network predicts, the one difference between the paper's two runs
    target: str = flag("x", "x: the clean latent; eps: the noise; v: the velocity", choices=("x", "eps", "v"))
    # model; 0: as its name says
    model: str = flag("B/1", "size, a slash, patch size", choices=[f"{m}/{p}" for m in MODELS for p in (1, 2)])
    depth: int = flag(0, "number of blocks", 0)
    hidden_size: int = flag(0, "width", 0)
    num_heads: int = flag(0, "attention heads (of about 64 channels, if the width is given)", 0)
    patch_size: int = flag(0, "side of a token in latent positions", 0)
    bottleneck: int = flag(0, "channels between latent and token; 0: none, as in the published weights", 0)
    # optimisation
    steps: int = flag(250_000, "training steps: 200 epochs of ImageNet", 1)
    batch: int = flag(1024, "images in a step, on however many GPUs", 1)
    micro_batch: int = flag(0, "images in a pass, also when sampling; 0: largest divisor of batch up to 256", 0)
    lr: float = flag(0.0, "learning rate; 0: 5e-5 * batch / 256", 0)
    warmup_epochs: float = flag(5.0, "epochs of linear warm-up; the rate is constant afterwards", 0)
    cooldown: float = flag(0.0, "share of the steps at the end in which the rate falls to 0; the paper: none", 0, 1)
    ema: float = flag(0.9999, "decay of the averaged weights, those that sample; 0.99 for a run of 1,000 steps", 0, 1)
    label_drop: float = flag(0.1, "share of labels replaced by the null class, for guidance", 0, 1)
    logit_t: tuple = flag((-0.8, 0.8), "t = sigmoid(n), n normal with this mean and standard deviation, for every target")
    t_eps: float = flag(0.05, "floor of the divisors 1 - t and t, in training and sampling", 1e-6, 1)
    seed: int = flag(0, "of weights, data order and noise", 0)
    # sampling
    sample_steps: int = flag(50, "Heun steps", 1)
    cfg: float = flag(2.9, "guidance weight; 1: none, at half the cost")
    interval: tuple = flag((0.1, 1.0), "guidance is on where low < t < high", 0, 1)
    # files and machine
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
            value, (_, low, high, choices) = getattr(self, f.name), f.metadata.values()
            numbers = [x for x in (value if f.type is tuple else (value,)) if f.type is not str]
            need(value in (choices or (value,)) and all(math.isfinite(x) and low <= x <= high for x in numbers),
                 f"--{f.name.replace('_', '-')} {value}: needs " + (" or ".join(choices or [f"finite numbers, {low} to {high}"])))
        need(self.interval[0] < self.interval[1], f"--interval {self.interval}: low must be below high")
        need(self.logit_t[1] >= 0, f"--logit-t {self.logit_t}: a standard deviation is not negative")

# What may differ when a run is continued, because the weights stay what they would have been.
FREE = {"steps", "out", "vae", "log_every", "save_every", "sample_every", "device", "compile", "sample_steps", "cfg", "interval"}

def resolve(cfg):
    """Config with the derived values filled in."""
    (name, patch), (depth, width, heads) = cfg.model.split("/"), MODELS[cfg.model.split("/")[0]]
    if cfg.hidden_size not in (0, width):             # heads of 64 channels or more, in multiples of 4 for RoPE
        width = cfg.hidden_size
        heads = max((n for n in range(1, width // 64 + 1) if width % (4 * n) == 0), default=1)
    micro = cfg.micro_batch or max(n for n in range(1, min(cfg.batch, 256) + 1) if cfg.batch % n == 0)
    need(cfg.batch % micro == 0, f"--micro-batch {micro}: does not divide --batch {cfg.batch}")
    return replace(cfg, depth=cfg.depth or depth, hidden_size=width, num_heads=cfg.num_heads or heads, micro_batch=micro,
                   patch_size=cfg.patch_size or int(patch), lr=cfg.lr or 5e-5 * cfg.batch / 256,
                   out=cfg.out or f"runs/{name}-{patch}-{cfg.target}")

def autocast(cfg, device):
    """bfloat16 matrix products over float32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=cfg.precision == "bf16" or cfg.precision == "auto" and device.type == "cuda")

def compiles(cfg, device):
    return cfg.compile == "on" or cfg.compile == "auto" and device.type == "cuda"

def rng(stream, *key, device="cpu"):
    """A generator that is a function of integers such as (seed, step, micro-batch): data order and noise then
    need no state to resume, and do not depend on what was drawn before. `stream` keeps its uses apart."""
    state = np.random.SeedSequence((stream, len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))

ORDER, FLIPS, NOISE, SAMPLES = range(4)               # the streams

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
        freqs = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * freqs           # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))

def rope_tables(grid, head_dim):
    """cos and sin (N, head_dim/2) of 2-D axial RoPE on a grid x grid image: the first half of the channel pairs
    turns with the row, the second with the column."""
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
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

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
    """The network: noisy latent z (B, C, H, W), time t (B,), class y (B,) -> its prediction (B, C, H, W) of x,
    eps or v: it does not know which. JiT's transformer (arXiv 2511.13720) with DiT's module names. The default
    is JLT-B/1: 130,508,672 parameters, 46.09 GFLOP an image."""
    def __init__(self, input_size=16, patch_size=1, in_channels=128, hidden_size=768, depth=12, num_heads=12,
                 num_classes=1000, bottleneck=0):
        super().__init__()
        need(input_size % patch_size == 0 and hidden_size % (4 * num_heads) == 0,
             f"no such model: {input_size} x {input_size} latents in patches of {patch_size}, width {hidden_size} in "
             f"{num_heads} heads (patches must tile the latent, heads have a multiple of 4 channels)")
        self.grid, self.patch_size, self.in_channels, self.num_classes = input_size, patch_size, in_channels, num_classes
        c, d, p, b = in_channels, hidden_size, patch_size, bottleneck     # b: 128 in the paper's text, 0 in its weights
        stem = {"proj1": nn.Conv2d(c, b, p, p, bias=False), "proj2": nn.Conv2d(b, d, 1)} if b else {"proj": nn.Conv2d(c, d, p, p)}
        self.x_embedder, self.t_embedder = nn.Sequential(OrderedDict(stem)), TimestepEmbedder(d)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, d)})    # the last: no class
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        cos, sin = rope_tables(input_size // patch_size, hidden_size // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
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
        p, h, w = self.patch_size, z.shape[2] // self.patch_size, z.shape[3] // self.patch_size
        return x.reshape(-1, h, w, p, p, self.in_channels).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)    # (B, C, H, W)

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
    low, high = interval

    def guided(z, t):
        on = cfg != 1 and (low < t or low == 0) and t < high
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
@lru_cache(2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=rng(ORDER, seed, epoch))

def batches(data, cfg, jobs, device):
    """For each (step, micro-batch) in `jobs`: latents x (B, C, H, W) float32 and labels y (B,) on `device`, read
    ahead by threads. Every epoch is a new order of the data; each image is mirrored half the time."""
    def read(step, m):
        first = step * cfg.batch + m * cfg.micro_batch
        places = (divmod(p, len(data)) for p in range(first, first + cfg.micro_batch))
        index = [int(epoch_order(len(data), cfg.seed, epoch)[i]) for epoch, i in places]
        flips = torch.rand(cfg.micro_batch, generator=rng(FLIPS, cfg.seed, step, m)) < 0.5
        x, y = data.rows(index, flips), data.labels[index]
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    with ThreadPoolExecutor(4) as pool:
        queue = deque(pool.submit(read, *job) for job in islice(jobs, 8))
        while queue:
            x, y = queue.popleft().result()
            queue.extend(pool.submit(read, *job) for job in islice(jobs, 1))
            yield x.to(device, non_blocking=True).float(), y.to(device, non_blocking=True)

def draws(cfg, step, m, x, y, num_classes):
    """Times t (B,), noise eps (B, C, H, W) and labels after dropout (B,) of a micro-batch: the same for every target."""
    g = rng(NOISE, cfg.seed, step, m, device=x.device)
    t = torch.sigmoid(torch.randn(len(x), generator=g, device=x.device) * cfg.logit_t[1] + cfg.logit_t[0])
    eps = torch.randn(x.shape, generator=g, device=x.device)
    drop = torch.rand(len(x), generator=g, device=x.device) < cfg.label_drop
    return t, eps, torch.where(drop, num_classes, y)

# ================================================================ checkpoints
def load_file(path):
    """torch.load that runs no code from the file; argparse.Namespace is the one class it may name."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                            # of many kinds: the disk's, unpickling, zip, storage
        code = re.search(r"GLOBAL (\S+)", str(e))
        why = getattr(e, "strerror", None) or (f"names {code[1]}, and no code is imported for a checkpoint" if code else
                                               f"damaged, or no checkpoint ({type(e).__name__})")
        raise Stop(f"{path}: {why}; nothing was changed; give a checkpoint, or a run folder with ckpt.pt in it") from None

def load_run(path, cfg, identity):
    """The checkpoint of a run folder, if it was made with these settings and data; Stop if not."""
    state, new = load_file(path), asdict(cfg) | {"data": identity}
    need(isinstance(state, dict) and "identity" in state, f"{path}: not a checkpoint of this program; give another --out")
    old = state["config"] | {"data": state["identity"]}
    free = FREE - {"steps"} if cfg.cooldown else FREE                     # a cool-down depends on where it ends
    other = [f"{k} {old.get(k)} (now {new[k]})" for k in new if k not in free and old.get(k) != new[k]]
    need(not other, f"{path}: made with other settings: {', '.join(other)}; give another --out")
    return state

def load_network(path):
    """-> EMA network, its settings (target, t_eps, vae), from our checkpoints (a file or its run folder) and the
    paper's (checkpoint-last.pth: its first EMA). The architecture is read from the shapes. Stop if it does not fit."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    state = load_file(path)
    try:
        if "model_ema1" in state:
            args, weights = state["args"], {k.removeprefix("net."): v.float() for k, v in state["model_ema1"].items()}
            weights.pop("mask_token", None)           # was trained along but never used
            grid, known = args.img_size // 16, {"target": getattr(args, "flow_matching", None), "t_eps": args.t_eps, "vae": VAE}
        else:
            weights, grid = state["ema"], state["grid"]
            known = {k: state["config"][k] for k in ("target", "t_eps", "vae")}
        stem = weights.get("x_embedder.proj.weight", weights.get("x_embedder.proj1.weight"))    # (D, C, p, p)
        width = len(weights["t_embedder.mlp.2.bias"])
        net = JLT(grid, stem.shape[2], stem.shape[1], width, len({k.split(".")[1] for k in weights if k[:7] == "blocks."}),
                  width // len(weights["blocks.0.attn.q_norm.weight"]), len(weights["y_embedder.embedding_table.weight"]) - 1,
                  len(stem) if "x_embedder.proj1.weight" in weights else 0)
        net.load_state_dict(weights)
    except (KeyError, AttributeError, TypeError, RuntimeError) as e:
        raise Stop(f"{path}: holds no JLT ({' '.join(str(e).split())[:150]})") from None
    print(f"{path}: " + (f"{known['target']}-prediction, EMA of step {state['step']:,}" if "step" in state else
                         f"published weights, first EMA (model_ema1), args.flow_matching {known['target']!r}"))
    return net.eval().requires_grad_(False), known

# ================================================================ pictures
def generate(net, labels, first, cfg, device):
    """Sampled latents (N, C, H, W) of classes `labels`. The noise of image i = first, first + 1, ... depends on
    (seed, i) alone: not on the batch, nor on the number of GPUs."""
    noise = torch.stack([torch.randn(net.in_channels, net.grid, net.grid, generator=rng(SAMPLES, cfg.seed, first + i))
                         for i in range(len(labels))])
    with autocast(cfg, device):
        return sample(net, labels.to(device), noise.to(device), cfg.target, cfg.sample_steps, cfg.cfg, cfg.interval,
                      t_eps=cfg.t_eps)

def pictures(vae, latents):
    """-> uint8 (N, 3, H, W) on the CPU, decoded 32 at a time."""
    return torch.cat([to_uint8(decode(vae, z)).cpu() for z in latents.split(32)])

def sample_file(net, vae, n, cfg, device, out):
    """n images of class i mod num_classes as an npz like ADM's: arr_0, uint8 (n, H, W, 3). Finished batches wait in
    a hidden folder, where several processes share the work and an interrupted run continues."""
    micro, digest = cfg.micro_batch or 256, hashlib.sha256(repr((n, cfg)).encode())
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy())
    parts = out.with_name(f".tmp.{out.name}.{digest.hexdigest()[:12]}")
    parts.mkdir(parents=True, exist_ok=True)
    files = [parts / f"{first:09d}.npy" for first in range(0, n, micro)]
    with tqdm(total=n, unit="image", disable=RANK > 0) as bar:
        for k, path in enumerate(files):
            labels = torch.arange(k * micro, min(n, (k + 1) * micro)) % net.num_classes
            if k % WORLD == RANK and not path.exists():
                images = pictures(vae, generate(net, labels, k * micro, cfg, device)).permute(0, 2, 3, 1)
                with atomic(path) as tmp, open(tmp, "wb") as file:
                    np.save(file, images.contiguous().numpy())
            bar.update(len(labels))
    while RANK == 0 and not all(path.exists() for path in files):
        time.sleep(1)                                 # for the other processes
    if RANK == 0:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, *np.load(files[0], mmap_mode="r").shape[1:])}
        with atomic(out) as tmp, zipfile.ZipFile(tmp, "w") as z, z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for path in files:
                file.write(np.load(path).tobytes())
        shutil.rmtree(parts)

def sample_command(checkpoint, classes, n, given):
    """--sample: n images of all classes as an npz, or one of each class given as a PNG without gaps."""
    need((classes is None) != (n is None), "--sample: say what to sample, --classes 207 360 ... or --n 50000")
    useless = given.keys() - {"target", "t_eps", "sample_steps", "cfg", "interval", "micro_batch", "out", "vae", "seed",
                              "device", "precision", "compile"}
    need(not useless, f"--{min(useless, default='').replace('_', '-')}: has no use with --sample; the checkpoint decides")
    cfg = Config(**given)
    device, out = pick_device(cfg.device), Path(cfg.out or ("samples.npz" if n else "samples.png"))
    need(not out.exists() and out.parent.is_dir(), f"{out}: exists, or its folder does not; give another --out")
    net, known = load_network(checkpoint)
    cfg = replace(cfg, **{k: v for k, v in known.items() if k not in given})
    need(not classes or 0 <= min(classes) <= max(classes) < net.num_classes,
         f"--classes {classes}: this model has classes 0 to {net.num_classes - 1}")
    vae, net = load_vae(cfg.vae, device), net.to(device)
    if compiles(cfg, device):
        net.compile(dynamic=False)                    # in place: names and num_classes stay
    print(f"{cfg.target}-prediction, {cfg.sample_steps} Heun steps, guidance {cfg.cfg} on {cfg.interval}, seed {cfg.seed}")
    if n:
        sample_file(net, vae, n, cfg, device, out)
    else:
        micro = torch.tensor(classes).split(cfg.micro_batch or 64)
        images = [pictures(vae, generate(net, y, k * len(micro[0]), cfg, device)) for k, y in enumerate(tqdm(micro, unit="batch"))]
        rows = max(d for d in range(1, math.isqrt(len(classes)) + 1) if len(classes) % d == 0)    # as square as it gets
        save_grid(out, torch.cat(images), len(classes) // rows)
    print(f"wrote {out}")

# ================================================================ training
PEAK = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}    # dense bf16, datasheets

def forward_flops(net):
    """FLOP of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        copy.deepcopy(net).to("meta")(torch.empty(1, net.in_channels, net.grid, net.grid), torch.empty(1), torch.ones(1).long())
    return counter.get_total_flops()

def train(cfg):
    """Trains cfg.target on cfg.data, or continues the run in cfg.out. Returns the run folder."""
    device, cfg, data = pick_device(cfg.device), resolve(cfg), LatentDataset(cfg.data)
    cfg = replace(cfg, vae=cfg.vae or data.meta.get("vae", VAE))
    out, path, micros = Path(cfg.out), Path(cfg.out, "ckpt.pt"), cfg.batch // cfg.micro_batch
    need(WORLD <= micros, f"{WORLD} processes for {micros} micro-batches; give --micro-batch {max(1, cfg.batch // WORLD)} or less")
    if WORLD > 1:                                     # gloo, on the CPU, carries the flag that says "stop"
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    total = dist.all_reduce if WORLD > 1 else lambda tensor: None         # a sum over the processes, in place

    torch.manual_seed(cfg.seed)                       # initial weights: the same on every rank, for every target
    net = JLT(data.shape[1], cfg.patch_size, data.shape[0], cfg.hidden_size, cfg.depth, cfg.num_heads, data.num_classes,
              cfg.bottleneck)
    flops, net = 3 * forward_flops(net), net.to(device)                   # the backward pass costs two forward ones
    ema = copy.deepcopy(net).requires_grad_(False)
    params, averages = list(net.parameters()), list(ema.parameters())
    opt = torch.optim.AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)
    identity, start = f"{len(data)} latents {data.shape}, labels {hashlib.sha256(data.labels.numpy()).hexdigest()[:8]}", 0
    if path.exists():
        state = load_run(path, cfg, identity)
        for part, name in ((net, "model"), (ema, "ema"), (opt, "optimizer")):
            part.load_state_dict(state[name])
        start = state["step"]
    vae = None
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        print(f"{out}: {cfg.target}-prediction, {sum(p.numel() for p in params):,} parameters, {len(data):,} latents "
              f"{data.shape} of {data.num_classes} classes, batch {micros} x {cfg.micro_batch} on {WORLD} x {device}"
              + f", continuing at step {start:,}" * (start > 0), flush=True)
        log_file = out / "log.jsonl"                  # what was logged after the checkpoint will come again
        lines = log_file.read_text().splitlines(True) if log_file.exists() else []
        with atomic(log_file) as tmp:
            tmp.write_text("".join(line for line in lines if line[-1] == "\n" and json.loads(line)["step"] <= start))
        if 0 < cfg.sample_every <= cfg.steps:
            try:
                vae = load_vae(cfg.vae, device)
            except Stop as e:
                print(f"no pictures on the way: {e}", flush=True)

    loss_fn = torch.compile(flow_loss, dynamic=False) if compiles(cfg, device) else flow_loss
    warmup = max(1, round(cfg.warmup_epochs * len(data) / cfg.batch))
    peak = WORLD * PEAK.get(torch.cuda.get_device_name(device), 0) if device.type == "cuda" else 0
    stream = batches(data, cfg, ((s, m) for s in range(start, cfg.steps) for m in range(RANK, micros, WORLD)), device)
    recent, bins, clock, caught = [], torch.zeros(2, 10, device=device), time.perf_counter(), []
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
        for p in params:
            total(p.grad)
        norm = nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - cfg.ema)
        recent.append(torch.stack([step_loss, norm]))
        # ----------------------------------------------------------------------- once in a while
        total(stop := torch.tensor(len(caught)))
        log = step % cfg.log_every == 0 or step == cfg.steps
        save = step % cfg.save_every == 0 or step == cfg.steps or stop
        if log or save:                               # here, and only here, the host waits for the GPU
            losses, norms = torch.stack(recent, 1)                        # (steps since the last line,) each
            total(losses)
            good = (losses.isfinite() & norms.isfinite()).int()
            need(good.all(), f"{out}: loss or gradient not finite at step {step - len(recent) + 1 + int(good.argmin()):,}; ckpt.pt is "
                 "from before; try a lower --lr, or --precision fp32", 1)
        if log:
            total(bins)
            seconds = (time.perf_counter() - clock) / len(recent)
            row = {"step": step, "loss": losses.mean().item(), "grad_norm": norms.mean().item(), "lr": lr, "ms": 1000 * seconds,
                   "images_per_s": cfg.batch / seconds, "mfu": cfg.batch / seconds * flops / peak if peak else 0,
                   "gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0,
                   "loss_by_t": [total / n if n else None for total, n in zip(*bins.tolist())]}
            recent, clock = [], time.perf_counter()
            bins.zero_()
            if RANK == 0:
                print(f"step {step:,}/{cfg.steps:,} {step / cfg.steps:.1%} | loss {row['loss']:.4f} | grad {row['grad_norm']:.3f} | "
                      f"lr {lr:.2e} | {row['ms']:.0f} ms/step {row['images_per_s']:,.0f} images/s | mfu {row['mfu']:.1%} "
                      f"{row['gib']:.1f} GiB | eta {timedelta(seconds=round((cfg.steps - step) * seconds))}", flush=True)
                if step % (10 * cfg.log_every) == 0:
                    print("  loss by t, from noise to data:", *(f"{v:.3f}" if v else "-" for v in row["loss_by_t"]), flush=True)
                with open(log_file, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if save and RANK == 0:
            state = {"config": asdict(cfg), "identity": identity, "grid": data.shape[1], "step": step,
                     "model": net.state_dict(), "ema": ema.state_dict(), "optimizer": opt.state_dict()}
            try:
                with atomic(path) as tmp:
                    torch.save(state, tmp)
            except RuntimeError as e:                 # torch's zip writer makes this of a full disk
                raise Stop(f"{path}: cannot be written; is the disk full? ({str(e)[:60]}) The one before it is intact", 1) from None
        if vae and step % cfg.sample_every == 0:
            labels = torch.linspace(0, data.num_classes - 1, 16).long()
            save_grid(out / f"samples_{step:07d}.png", pictures(vae, generate(ema, labels, 0, cfg, device)), 8)
        if stop:
            raise Stop(f"{out}: stopped by a signal, saved at step {step:,}; the same command continues", 130)
    for s in before:
        signal.signal(s, before[s])
    print(f"{out}: {max(start, cfg.steps):,} steps done; python jlt.py --sample {out} --classes 0 1 shows samples, a larger --steps goes on")
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

def effective_rank(lam):
    """exp of the entropy of lam / sum(lam): how many directions carry the variance (Roy & Vetterli 2007)."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return torch.special.entr(lam / lam.sum()).sum().exp().item()

def participation_ratio(lam):
    """(sum lam)^2 / sum lam^2: the same question, asked of the large directions."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return (lam.sum() ** 2 / lam.square().sum()).item()

def tokens(latents, p):
    """Latents (B, C, H, W) -> tokens (B * H/p * W/p, p*p*C)."""
    return F.pixel_unshuffle(latents.float(), p).movedim(1, -1).flatten(0, 2)

def linear_probe(fit, held_out, t):
    """App. D: the best linear predictor of x, and of v, from z at time t (ridge regression in closed form, of tokens
    (N, D)) -> mean squared errors per dimension on held-out tokens, to set beside gaussian_risk."""
    x, n = torch.cat([fit, held_out]).double(), len(fit)
    eps = torch.randn(x.shape, generator=rng(NOISE, 0), dtype=x.dtype)
    z = F.pad(t * x + (1 - t) * eps, (0, 1), value=1)                     # a last column for the mean
    gram = z[:n].T @ z[:n] + 1e-3 * torch.eye(z.shape[1], dtype=z.dtype)
    error = {}
    for target, y in {"x": x, "v": x - eps}.items():                      # (2)
        error[target] = (y - z @ torch.linalg.solve(gram, z[:n].T @ y[:n]))[n:].square().mean().item()
    return error

def plot(draw, left, title, curves):
    """One 560 x 420 chart with a logarithmic y axis; curves: {name: (colour, [(x, y), ...])}."""
    xs, ys = zip(*(point for _, points in curves.values() for point in points))
    low, high, font = math.floor(math.log10(max(min(ys), 1e-5))), math.ceil(math.log10(max(ys))), ImageFont.load_default(14)
    at = lambda x, y: (left + 60 + 480 * (x - min(xs)) / (max(xs) - min(xs)),
                       380 - 340 * (math.log10(max(y, 10.0 ** low)) - low) / (high - low))
    draw.text((left + 60, 10), title, "black", font)
    for e in range(low, high + 1):
        draw.line([at(min(xs), 10.0 ** e), at(max(xs), 10.0 ** e)], "#dddddd")
        draw.text((left + 8, at(0, 10.0 ** e)[1] - 9), f"1e{e}", "black", font)
    for x in (min(xs), max(xs)):
        draw.text((at(x, 1)[0] - 8, 386), f"{x:g}", "black", font)
    for k, (name, (colour, points)) in enumerate(curves.items()):
        draw.line([at(*point) for point in points], colour, 3)
        draw.text((left + 110, 310 + 20 * k), name, colour, font)

def geometry(folder, cfg):
    """--geometry: the spectrum of a cache's tokens, and what (3)-(6) make of it. A table, and geometry.png."""
    if not folder:
        cache_digits(folder := Path("runs/digits"))
    data, p, out = LatentDataset(folder), resolve(cfg).patch_size, Path(cfg.out or "geometry.png")
    need(data.shape[1] % p == 0 and len(data) > 1, f"{folder}: no statistics of {p} x {p} tokens in {len(data)} latents {data.shape}")
    rows = lambda index: tokens(data.rows(index, [False] * len(index)), p)
    statistics = Statistics(data.shape[0] * p * p)
    for i in tqdm(range(0, len(data), 64), unit="x 64 latents"):
        statistics.update(rows(range(i, min(i + 64, len(data)))))
    lam = torch.linalg.eigvalsh(torch.from_numpy(statistics.cov)).flip(0).clamp(min=0)
    spectra = {"x": lam, "eps": torch.ones_like(lam), "v": lam + 1}       # x and eps are independent
    some = rows(range(0, len(data), -(-statistics.n // 60_000)))
    fit, held_out = some[torch.randperm(len(some), generator=rng(ORDER, 0))].chunk(2)

    print(f"{folder}: {statistics.n:,} tokens of {len(lam)} dimensions, {p} x {p} positions each; variance per dimension "
          f"{lam.mean():.3f}, largest {lam[0]:.3g}, median {lam[len(lam) // 2]:.3g}, smallest {lam[-1]:.3g}\n\n"
          "target   effective rank   participation ratio   share of variance in the smaller half")
    for target, s in spectra.items():
        print(f"{target:6} {effective_rank(s):12.1f} {participation_ratio(s):17.1f} {s[len(s) // 2:].sum() / s.sum():23.1%}")
    print("\n   t     R_x   R_eps     R_v   linear probe: x       v   gain in the smallest direction: x       v")
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        risk, probe, (gain_x, gain_v) = gaussian_risk(lam, t), linear_probe(fit, held_out, t), gaussian_gain(lam[-1].item(), t)
        print(f"{t:4.1f} {risk['x']:7.4f} {risk['eps']:7.4f} {risk['v']:7.4f} {probe['x']:16.4f} {probe['v']:7.4f} "
              f"{gain_x:32.4f} {gain_v:7.3f}")
    sheet, colours = Image.new("RGB", (1120, 420), "white"), {"x": "#1f77b4", "eps": "#7f7f7f", "v": "#d62728"}
    plot(ImageDraw.Draw(sheet), 0, "Eigenvalues of the targets' covariance, by rank",
         {f"y_{k}": (colours[k], [*enumerate(s.tolist(), 1)]) for k, s in spectra.items()})
    plot(ImageDraw.Draw(sheet), 560, "Least error per dimension, over t (0: noise)",
         {f"R_{k}": (colours[k], [(i / 100, gaussian_risk(lam, i / 100)[k]) for i in range(1, 100)]) for k in spectra})
    with atomic(out) as tmp:
        sheet.save(tmp, "PNG")
    print(f"\nwrote {out}")

# ================================================================ the demo
DEMO = {"hidden_size": 64, "depth": 3, "batch": 64, "steps": 1500, "lr": 3e-3, "cooldown": 1.0, "warmup_epochs": 0.3, "ema": 0.99,
        "sample_steps": 25, "cfg": 1.5, "interval": (0.0, 1.0), "micro_batch": 64, "sample_every": 0, "log_every": 250}
DEMO_IMAGES = 2000                                    # samples of each target, and digits to compare them with

def demo(given):
    """--demo: the same network, loss, loop and sampler on drawn digits, for x and for v from the same weights, data
    order and noise. Prints the table and writes the picture: rows of real digits, of x's and of v's."""
    need("data" not in given, "--data: has no use with --demo, which draws its own")
    started, targets = time.time(), [given["target"]] if "target" in given else ["x", "v"]
    changed = "".join(f"-{k}-{v}" for k, v in sorted(given.items()) if k not in FREE - {"steps"} | {"target"})
    out = Path(given.pop("out", "runs/demo" + changed))
    cfg = Config(**DEMO | {"data": "runs/digits"} | given)
    device, n = pick_device(cfg.device), DEMO_IMAGES
    cache_digits(Path(cfg.data))
    codec, judge = load_vae(f"{cfg.data}/codec.safetensors"), DigitNet(*draw_digits(2 * n, seed=2))
    real, labels = draw_digits(2 * n, seed=3)         # two held-out halves: to compare with, and to be compared
    print(f"the judge reads {judge.accuracy(real, labels):.1%} of the held-out digits right [{time.time() - started:.0f} s]")

    def spaces(images):
        """Mean and covariance in the two feature spaces: pooled pixels, and what the judge looks at."""
        for features in (F.avg_pool2d(images / 127.5 - 1, 4).flatten(1), judge(images)[0]):
            statistics = Statistics(features.shape[1])
            statistics.update(features)
            yield statistics.mean, statistics.cov

    low = lambda z: tokens(z, 1)[:, 64:].var(0).sum() # energy where the digits have least
    reference, z_real = list(spaces(real[:n])), encode(codec, real[n:] / 127.5 - 1)
    def row(name, images, latents, loss=""):
        pooled, learned = (frechet_distance(*a, *b) for a, b in zip(spaces(images), reference))
        return (f"{name:12} {loss:>6} {pooled:15.2f} {learned:17.1f} {low(latents) / low(z_real):17.2f} "
                f"{judge.accuracy(images, labels[:n]):13.1%}")

    table, shown = [row("real", real[n:], z_real), row("real, coded", pictures(codec, z_real), z_real)], [real[:20]]
    for target in targets:
        run = train(replace(cfg, target=target, out=str(out / target)))
        loss = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["loss"]
        net, _ = load_network(run)
        z = generate(net.to(device), labels[:n], 0, replace(cfg, target=target), device).cpu()
        shown.append((images := pictures(codec, z))[:20])
        table.append(row(f"{target}-pred.", images, z, f"{loss:.3f}"))
        print(f"[{time.time() - started:.0f} s]")
    save_grid(out / "demo.png", F.interpolate(torch.cat(shown).float(), scale_factor=3).to(torch.uint8), 10)
    print("\n               loss   pooled pixels   digit features   low directions   read right\n" + "\n".join(table))
    print("\nFrechet distances to held-out digits (of pooled pixels, of a digit classifier's features): lower is better, 'real' "
          f"is the floor.\nlow directions: energy in the 64 of 128 directions where data has least, data's own is 1.\n"
          f"{out / 'demo.png'}: two rows each of real digits, {', '.join(targets)}. [{time.time() - started:.0f} s]")

# ================================================================ command line
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--demo", action="store_true", help="x against v on drawn digits, in two minutes, without data or GPU")
    parser.add_argument("--geometry", nargs="?", const="", metavar="LATENTS", help="what the targets look like on a cache (or the digits)")
    parser.add_argument("--sample", metavar="CKPT", help="sample from a run folder, its ckpt.pt, or the paper's checkpoint-last.pth")
    parser.add_argument("--classes", type=int, nargs="+", metavar="Y", help="with --sample: a PNG grid, one picture per class given")
    parser.add_argument("--n", type=positive, help="with --sample: this many pictures of all classes, as an npz")
    for f in fields(Config):
        kind = {"type": float, "nargs": 2} if f.type is tuple else {"type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument("--" + f.name.replace("_", "-"), default=SUPPRESS, metavar=f.name[0].upper(), **kind,
                            help=f"{f.metadata['help']} ({f.default})" if f.default else f.metadata["help"])
    given = vars(parser.parse_args())
    show, folder, checkpoint, classes, n = (given.pop(k) for k in ("demo", "geometry", "sample", "classes", "n"))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    need(checkpoint is not None or not classes and not n, "--classes and --n go with --sample CKPT")
    need(bool(checkpoint) + show + (folder is not None) < 2, "--demo, --geometry and --sample: one at a time")
    if checkpoint is not None:
        sample_command(checkpoint, classes, n, given)
    elif show:
        demo(given)
    elif folder is not None:
        geometry(folder, Config(**given))
    else:
        train(Config(**given))

if __name__ == "__main__":
    run(main)
