"""JLT: clean-latent prediction in latent diffusion transformers (arXiv 2605.27102), in one file.

The data are latents: a frozen autoencoder, the VAE of FLUX.2, makes of a 256 x 256 picture 16 x 16
positions of 128 channels, and a transformer sees each position as one token. It learns to turn
noise eps into such latents x, along the straight path between the two:

    z_t = t x + (1 - t) eps,    t = 0 is noise, t = 1 is data,    velocity v = dz/dt = x - eps.

Many pairs (x, eps) pass through one z_t, so a network that is trained by squared error learns a
mean: E[v | z_t]. Points that follow that mean velocity do not end in an average picture: at every
t they are distributed as the z_t of real pairs are, and so, at t = 1, as the data (Lipman et al.
2022, 2210.02747).

The network may be asked for v itself, or for the clean latent x, from which the velocity is
(x - z_t) / (1 - t). The best velocity is the same, and so is the loss. What differs is the
network's work. In a direction in which the data hardly varies, x is about 0 and z_t is about
(1 - t) eps. There the best answer for x is 0; for v it is -z_t / (1 - t), about -eps: the network
must copy the noise in its input to its output. Asked for x it may forget that noise; the formula
puts z_t back in, outside of the network. With everything else equal, the paper has FID (lower is
better) 2.56 for x and 6.56 for v. A network narrower than a token cannot copy all of its noise,
and the demo shows what becomes of it. The paper's networks are wide enough for that; what is known
of the reason there is in the README, "Why x, and when".

    python jlt.py --demo                               # see it: digits, a minute, no data, no GPU
    python encode.py imagenet/                         # once: pictures -> a cache, latents/
    python jlt.py --target x                           # the paper's run; --target v is its baseline
    torchrun --nproc-per-node 8 jlt.py --micro-batch 128     # on eight GPUs
    python jlt.py --sample runs/B-1-x --classes 207 360      # or --n 50000, and fid.py scores them

Interrupted? The same command continues.
"""

import contextlib
import copy
import difflib
import hashlib
import json
import math
import signal
import tempfile
import time
import zipfile
from argparse import SUPPRESS, Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import encode
from encode import Stop, processes, replacing, require

# =============================================================== the method
# Equation numbers are the paper's. Clean latents x, noise eps, points z on the path between them
# and velocities v are (B, C, H, W); times t and class labels y are (B,). The paper compares x and
# v; a network may also be asked for the noise eps.
TARGETS = ("x", "eps", "v")
LOSSES = ("v", "x")


def interpolate(x, eps, t):
    """(1) The point z at time t on the straight line from noise (t = 0) to data (t = 1)."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * eps


def true_output(x, eps, target):
    """(2) What the network is asked for."""
    if target == "x":
        return x
    if target == "eps":
        return eps
    return x - eps


def velocity(out, z, t, target, t_eps=0.05):
    """The readout (App. A): what the network's output means as a velocity. On the path
    v = x - eps = (x - z) / (1 - t) = (z - eps) / t; a divisor below t_eps becomes t_eps."""
    assert target in TARGETS, f"target {target!r} is none of {TARGETS}"
    t = t.view(-1, 1, 1, 1)
    if target == "x":
        return (out - z) / (1 - t).clamp_min(t_eps)
    if target == "eps":
        return (z - out) / t.clamp_min(t_eps)
    return out


def flow_error(net, x, y, t, eps, target="x", t_eps=0.05, loss="v"):
    """The loss of each image: (B,). A pure function: times t, noise eps and labels y are given.

    loss="v", the paper's: the squared error of the velocity, for every target. In terms of what the
    network puts out it is |v^ - v|^2 for target v, |x^ - x|^2 / (1 - t)^2 for target x, and
    |eps^ - eps|^2 / t^2 for target eps, with divisors of t_eps^2 at least.
    loss="x", of the paper's second version: the same times (1 - t)^2, which is |x^ - x|^2 for
    target x."""
    assert loss in LOSSES, f"loss {loss!r} is none of {LOSSES}"
    z = interpolate(x, eps, t)
    v_hat = velocity(net(z, t, y), z, t, target, t_eps)
    # The true output goes through the same readout, with the same floor: where 1 - t < t_eps, a
    # perfect x^ has a velocity of (x - z) / t_eps, not x - eps, and should still have no loss.
    v = velocity(true_output(x, eps, target), z, t, target, t_eps)
    error = (v_hat - v).square()
    if loss == "x":
        error = error * (1 - t).view(-1, 1, 1, 1).clamp_min(t_eps) ** 2
    return error.mean((1, 2, 3))


def flow_loss(net, x, y, t, eps, target="x", t_eps=0.05, loss="v"):
    """The mean of flow_error, a number. (Training takes flow_error, for its loss by t.)"""
    return flow_error(net, x, y, t, eps, target, t_eps, loss).mean()


@torch.no_grad()
def sample(
    net, y, noise, target="x", steps=50, cfg=2.9, interval=(0.1, 1.0), method="heun", t_eps=0.05
):
    """Follows dz/dt = v from noise (B, C, H, W) at t = 0 to latents at t = 1, for classes y (B,).

    Guidance: the network has also learned to do without a class. What the class changes in the
    velocity is multiplied by `cfg` while low < t < high (low = 0 includes t = 0). Earlier, amid
    strong noise, it would cost variety and gain nothing (Kynkaanniemi et al. 2024, 2404.07724)."""
    assert method in ("heun", "euler"), f"method {method!r} is none of ('heun', 'euler')"
    low, high = interval
    no_class = torch.full_like(y, net.num_classes)

    def network_velocity(z, t, classes):
        times = torch.full((len(z),), t, device=z.device, dtype=z.dtype)
        # Under autocast the output is bfloat16; the sum over the steps is float32.
        return velocity(net(z, times, classes), z, times, target, t_eps).to(z.dtype)

    def guided_velocity(z, t):
        v = network_velocity(z, t, y)
        if cfg == 1 or t >= high or (t <= low and low > 0):
            return v  # at half the cost
        v_without = network_velocity(z, t, no_class)
        return v_without + cfg * (v - v_without)

    z = noise
    for i in range(steps):
        # Python floats: 5 / 50 is exactly the interval's 0.1, hence outside; float32 need not be.
        t = i / steps
        t_next = (i + 1) / steps
        # Euler step: go on with the velocity here.
        v = guided_velocity(z, t)
        z_next = z + (t_next - t) * v

        # Second-order correction (Heun): average it with the velocity there. Not in the last
        # step: at its end, t = 1, no velocity can be read from x^ (the divisor 1 - t is 0).
        if method == "heun" and i < steps - 1:
            v_next = guided_velocity(z_next, t_next)
            z_next = z + (t_next - t) * (v + v_next) / 2
        z = z_next
    return z


# =============================================================== the network
# The transformer of JiT (arXiv 2511.13720) with the module names of DiT (Peebles & Xie 2022), so
# that the weights published with the paper load by name. A latent (B, C, H, W) is cut into N
# patches of p x p positions, each of which becomes a token of D channels; blocks of attention and
# MLP work on the tokens; time and class act on every block through scale, shift and gate (adaLN);
# the last layer makes of each token its patch of the output.
#
# Under autocast, matrix products and the stream of tokens are bfloat16, the weights float32.
# Shapes at the end of a line are those of what the line computes.


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 and returned as precise as x. (Cast by hand: what
    autocast makes of F.rms_norm changed between torch 2.11 and 2.12.)"""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        h = F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)
        return h.to(x.dtype)


def modulate(h, shift, scale):
    """How time and class act on the tokens: h (B, N, D), shift and scale (B, D)."""
    return h * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) -> tokens (B, N, D), row by row. `bottleneck` channels in between are in
    the paper's text (128), not in its released weights (0: none)."""

    def __init__(self, in_channels, patch_size, hidden_size, bottleneck=0):
        super().__init__()
        if bottleneck:
            self.proj1 = nn.Conv2d(in_channels, bottleneck, patch_size, patch_size, bias=False)
            self.proj2 = nn.Conv2d(bottleneck, hidden_size, 1)
        else:
            self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.bottleneck = bottleneck

    def forward(self, z):
        x = self.proj2(self.proj1(z)) if self.bottleneck else self.proj(z)  # (B, D, H/p, W/p)
        # Contiguous once, here: a transposed stream would make every norm in every block a
        # strided pass over memory.
        return x.flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D). The sinusoids are of t itself as in JiT; DiT's are of 1000 t."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t):
        exponents = torch.arange(128, device=t.device)
        frequencies = torch.exp(-math.log(10000) / 128 * exponents)
        angles = t.float()[:, None] * frequencies  # (B, 128)
        sinusoids = torch.cat([angles.cos(), angles.sin()], -1)  # (B, 256)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) -> (B, D). One more class, the last, stands for "no class"."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def rope_tables(grid, head_dim):
    """cos and sin (N, head_dim/2) for rotary position embedding on a grid x grid image: the first
    half of a head's channel pairs turns with the row, the second half with the column."""
    frequencies = 10000 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    turns = torch.arange(grid)[:, None] * frequencies  # (grid, head_dim/4)
    rows = turns.repeat_interleave(grid, 0)  # (N, head_dim/4)
    columns = turns.repeat(grid, 1)
    angles = torch.cat([rows, columns], -1)  # (N, head_dim/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin, dtype):
    """Turns each pair of neighbouring channels of x (B, N, heads, head_dim) by its angle."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, heads, head_dim/2) each
    cos = cos[:, None]  # (N, 1, head_dim/2)
    sin = sin[:, None]
    # Cast before they are put together, so that only half as much is written.
    turned = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    return torch.stack(turned, -1).flatten(-2)


class Attention(nn.Module):
    """Every token looks at every other. Queries and keys are normalised, which keeps training
    stable, and turned by their token's place in the image (RoPE)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim // num_heads)
        self.k_norm = RMSNorm(dim // num_heads)

    def forward(self, x, cos, sin):
        # (B, N, heads, head_dim) each. They stay in this order until they have been turned:
        # transposed here, q, k and attention's output would have to be copied.
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # A norm returns the type it is given: q and k stay float32 until they have been turned,
        # and are rounded once.
        q = rotate(self.q_norm(q.float()), cos, sin, v.dtype).transpose(1, 2)
        k = rotate(self.k_norm(k.float()), cos, sin, v.dtype).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))  # (B, heads, N, head_dim)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """The MLP of each block: one half of the hidden channels gates the other."""

    def __init__(self, dim):
        super().__init__()
        # Three matrices of this width cost what two of 4 * dim would. w12 holds two of them.
        hidden = int(4 * dim * 2 / 3)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, -1)  # (B, N, hidden) each
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """Attention and MLP; the conditioning c (time and class) sets scale and shift after each norm
    and a gate on each branch (DiT's adaLN-Zero)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):
        modulation = self.adaLN_modulation(c).chunk(6, -1)  # (B, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        h = modulate(self.norm1(x), shift_msa, scale_msa)
        x = x + gate_msa[:, None] * self.attn(h, cos, sin)  # (B, N, D)
        h = modulate(self.norm2(x), shift_mlp, scale_mlp)
        x = x + gate_mlp[:, None] * self.mlp(h)  # (B, N, D)
        return x


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> (B, N, p*p*C), from an adaLN of its own."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class JLT(nn.Module):
    """Noisy latent z (B, C, H, W), time t (B,), class y (B,) -> (B, C, H, W), a prediction of x,
    eps or v: the network itself does not know which. The defaults are JLT-B/1: 130,508,672
    parameters, 46.09 GFLOP an image."""

    def __init__(
        self,
        input_size=16,
        patch_size=1,
        in_channels=128,
        hidden_size=768,
        depth=12,
        num_heads=12,
        num_classes=1000,
        bottleneck=0,
    ):
        super().__init__()
        assert input_size % patch_size == 0, f"patches of {patch_size} do not tile {input_size}"
        assert hidden_size % (4 * num_heads) == 0, "RoPE needs heads of a multiple of 4 channels"
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size, bottleneck)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        cos, sin = rope_tables(input_size // patch_size, hidden_size // num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's rules: Xavier for all Linears, small normals for the embeddings, zeros where a
        block or the output is to start as nothing."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # A view of the weight: a patch convolution is a Linear of the patch's values.
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # Blocks start as the identity, and the output as 0.
        nn.init.zeros_(self.final_layer.linear.weight)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)

    def forward(self, z, t, y):
        x = self.x_embedder(z)  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            x = block(x, c, self.rope_cos, self.rope_sin)  # (B, N, D)
        x = self.final_layer(x, c)  # (B, N, p*p*C)
        return self.unpatchify(x)  # (B, C, H, W)

    def unpatchify(self, x):
        """Tokens (B, N, p*p*C) -> (B, C, H, W)."""
        p = self.patch_size
        n = self.input_size // p
        x = x.unflatten(1, (n, n)).unflatten(3, (p, p, -1))  # (B, row, column, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, row, p, column, p)
        return x.flatten(4, 5).flatten(2, 3)


# =============================================================== configuration
# One dataclass holds every setting of a run; its fields are the flags of the command line. The
# defaults are the paper's run of JLT-B/1 on ImageNet: 250,000 steps of 1,024 images. A checkpoint
# carries its settings, and a run is only continued with the same ones, but for those in FREE.

# The settings that a model's name stands for, where they differ from Config's defaults. Heads
# have 64 channels, but H's have 80.
MODELS = {
    "B/1": {},
    "B/2": {"patch_size": 2},
    "L/1": {"depth": 24, "hidden_size": 1024},
    "L/2": {"depth": 24, "hidden_size": 1024, "patch_size": 2},
    "H/1": {"depth": 32, "hidden_size": 1280, "num_heads": 16},
    "H/2": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "patch_size": 2},
    # For a laptop and some hundred photographs, with settings to match.
    "nano": {
        "depth": 4,
        "hidden_size": 256,
        "batch": 32,
        "lr": 3e-4,
        "warmup_epochs": 1.0,
        "ema": 0.99,
        "steps": 2000,
        "sample_every": 500,
    },
}


def setting(default, help, choices=None):
    """A field of Config, with what its flag says of it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """The paper's run of JLT-B/1 (section 4.1). Every field is a flag: sample_steps is
    --sample-steps. Made by configure(), which fills in num_heads, micro_batch, lr and out."""

    # What is learned.
    target: str = setting("x", "x: the clean latent, eps: the noise, v: the velocity", TARGETS)
    # The paper trains with loss v. Its second version (where the x of 2.56 has become 2.84) has
    # 2.38 for loss x.
    loss: str = setting("v", "squared error of v, or of x (that times (1 - t)^2)", LOSSES)
    # Matters little in training, where t > 0.95 is rare, but in the last steps of sampling: after
    # 50 steps with a perfect x^, the result still holds 1.7% of eps - x.
    t_eps: float = setting(0.05, "floor of the divisors 1 - t and t, also in sampling")
    # The same for every target: mostly t < 1/2, where it is still open what the picture will be.
    # Only 7% are above 0.6 (README, "What decides?").
    logit_t: tuple = setting((-0.8, 0.8), "t = sigmoid(n), n normal of this mean and deviation")
    # The network has to answer without a class, too: guidance takes the difference.
    label_drop: float = setting(0.1, "share of labels left out in training, for guidance")

    # The model. B, L and H have 130, 458 and 951 million parameters. All are wider than a token's
    # 128 channels.
    model: str = setting("B/1", "size/patch size; nano is for laptops", tuple(MODELS))
    depth: int = setting(12, "blocks")
    hidden_size: int = setting(768, "width of a token, in channels")
    # Heads of 64 channels are what attention kernels are made for.
    num_heads: int = setting(0, "attention heads; 0: of 64 channels each, or a little more")
    # At 1, a latent of 16 x 16 is 256 tokens; at 2 it is 64 of four times the channels.
    patch_size: int = setting(1, "side of a token, in latent positions")
    # The paper's text has 128, its released weights have none.
    bottleneck: int = setting(0, "channels between latent and token; 0: none, as released")

    # Optimisation. A step adds up the gradients of batch / micro_batch micro-batches, which GPUs
    # share: for eight GPUs there have to be eight, of 128. Noise is drawn by micro-batch, so a run
    # keeps their size. The average of the weights needs about 1 / (1 - ema) steps to form.
    steps: int = setting(250_000, "optimizer steps; the default is 200 epochs of ImageNet")
    batch: int = setting(1024, "images in a step, on however many GPUs")
    micro_batch: int = setting(0, "images at a time; 0: largest divisor of batch up to 256")
    # Proportional to the batch, as in JiT: 2e-4 at 1,024.
    lr: float = setting(0.0, "learning rate; 0: 5e-5 * batch / 256")
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up; constant afterwards")
    # The paper has none; the demo needs it, to end well after 1,500 steps.
    cooldown: float = setting(0.0, "last share of the steps, over which the rate falls to 0")
    ema: float = setting(0.9999, "decay of the averaged weights; 0.99 for 1,000 steps")
    seed: int = setting(0, "of weights, data order and noise")

    # Sampling. 50 Heun steps are 99 network calls, and 88 more where guidance is on.
    sample_steps: int = setting(50, "Heun steps")
    # The paper's for B/1; every model has a best one of its own.
    cfg: float = setting(2.9, "guidance weight; 1: none, at half the cost")
    interval: tuple = setting((0.1, 1.0), "guidance is on where low < t < high")

    # Files and machine
    data: str = setting("latents", "folder that encode.py wrote")
    out: str = setting("", "run folder; with --sample where the samples go")
    # Latents know their VAE; another decoder of the same latents may draw them.
    vae: str = setting("", "repository or folder of the decoder; default: the encoder's own")
    # Each line makes the host wait for the GPU once.
    log_every: int = setting(100, "steps between log lines")
    # What a power cut costs at most; saving stops training for the copy only.
    save_every: int = setting(0, "steps between checkpoints; 0: every 15 minutes")
    sample_every: int = setting(10_000, "steps between pictures of samples; 0: none")
    # Two workers read 18,000 latents a second where a GPU needs 3,000; four are for slow disks.
    workers: int = setting(4, "processes that read latents ahead, one a core at most")
    device: str = setting("", "cuda, mps or cpu; default: the best there is")
    # bfloat16 has float32's range: losses need no scaling.
    precision: str = setting(
        "auto", "of matrix products; auto: bf16 on cuda", ("auto", "bf16", "fp32")
    )
    compile: str = setting("auto", "torch.compile; auto: on cuda", ("auto", "on", "off"))


# What may be given anew when a run is continued, since it does not say what is learned.
FREE = {"steps", "sample_steps", "cfg", "interval", "vae", "out", "data"}
FREE |= {"log_every", "save_every", "sample_every", "workers", "device", "compile"}


def flag(name):
    """sample_steps -> --sample-steps"""
    return "--" + name.replace("_", "-")


def check_config(config):
    """Raises Stop, in one line that names the flag, for values that mean nothing."""

    def need(good, name, rule):
        require(good, f"{flag(name)} {getattr(config, name)}: must be {rule}")

    positive = ("depth", "hidden_size", "patch_size", "steps", "batch", "sample_steps", "log_every")
    for name in positive:
        need(getattr(config, name) > 0, name, "positive")
    for name in ("num_heads", "bottleneck", "micro_batch", "save_every", "sample_every", "workers"):
        need(getattr(config, name) >= 0, name, "0 or more")
    for name in ("lr", "warmup_epochs"):
        # Far below the largest float, so that a product with the images of an epoch is one, too.
        need(0 <= getattr(config, name) < 1e15, name, "a number, 0 or more")
    for name in ("cooldown", "label_drop"):
        need(0 <= getattr(config, name) <= 1, name, "from 0 to 1")
    need(0 <= config.seed < 2**63, "seed", "0 or more, and below 2^63")
    need(0 <= config.ema < 1, "ema", "from 0 to below 1")
    need(0 < config.t_eps <= 1, "t_eps", "above 0, and 1 at most")
    need(math.isfinite(config.cfg), "cfg", "a number")
    mean, std = config.logit_t
    good = math.isfinite(mean) and 0 <= std < math.inf
    need(good, "logit_t", "a mean and a standard deviation")
    low, high = config.interval
    need(0 <= low < high <= 1, "interval", "low < high, from 0 to 1")

    # RoPE turns pairs of channels, half of them by row and half by column.
    heads = max(1, config.num_heads)
    rule = f"a multiple of 4 for each of {heads} heads" if config.num_heads else "a multiple of 4"
    need(config.hidden_size % (4 * heads) == 0, "hidden_size", rule)
    if config.micro_batch:
        fits = config.batch % config.micro_batch == 0
        need(fits, "micro_batch", f"a divisor of --batch {config.batch}")


def configure(**given):
    """-> Config: the paper's values, then those of the model's name, then the given ones, then what
    follows from them. Raises Stop for values that mean nothing."""
    config = Config(**MODELS[given.get("model", "B/1")] | given)
    check_config(config)
    filled = {}
    if not config.num_heads:
        # Of 64 channels or a few more, and a multiple of 4 for RoPE.
        most = max(1, config.hidden_size // 64)
        fitting = [n for n in range(1, most + 1) if config.hidden_size % (4 * n) == 0]
        filled["num_heads"] = fitting[-1]
    if not config.micro_batch:
        most = min(config.batch, 256)
        filled["micro_batch"] = max(n for n in range(1, most + 1) if config.batch % n == 0)
    if not config.lr:
        filled["lr"] = 5e-5 * config.batch / 256
    if not config.out:
        suffix = "" if config.loss == "v" else "-xloss"
        filled["out"] = f"runs/{config.model.replace('/', '-')}-{config.target}{suffix}"
    return replace(config, **filled)


def autocast(config, device):
    """bfloat16 matrix products over float32 weights, or nothing."""
    on = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def compiles(config, device):
    """Whether torch.compile is used."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


# =============================================================== data order and noise
# Everything random is a function of the seed and of integers that follow from the step: epoch,
# step, micro-batch. So a checkpoint needs no state of a random generator or a data loader: with
# weights, average, optimizer and step, a run goes on as if it had never been interrupted. And
# whichever process computes a micro-batch, it is the same one: another number of processes only
# adds the gradients in another order. (A run may also go on on another kind of device, which
# draws other numbers from the same seed.)
ORDER, FLIPS, NOISE, SAMPLES = range(4)  # streams of random numbers


def rng(stream, *key, device="cpu"):
    """A random generator that is a function of integers."""
    # With their number, since SeedSequence takes (1,) and (1, 0) for the same.
    sequence = np.random.SeedSequence((stream, len(key), *key))
    seed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


@lru_cache(2)  # a micro-batch may lie across two epochs
def epoch_order(n, seed, epoch):
    """The order in which an epoch shows n images."""
    return torch.randperm(n, generator=rng(ORDER, seed, epoch))


def picks(n, config, step, m):
    """-> the (index, flip) pairs of micro-batch m of a step, of n images. An epoch shows every
    image once; each is mirrored half the time."""
    first = step * config.batch + m * config.micro_batch
    positions = range(first, first + config.micro_batch)
    indices = [int(epoch_order(n, config.seed, p // n)[p % n]) for p in positions]
    generator = rng(FLIPS, config.seed, step, m)
    flips = torch.rand(config.micro_batch, generator=generator) < 0.5
    return list(zip(indices, flips.tolist(), strict=True))


def own_micro_batches(config):
    """The numbers of this process's micro-batches of a step: of w processes, process r computes
    r, r + w, r + 2w, ..."""
    rank, world = processes()
    return range(rank, config.batch // config.micro_batch, world)


def reading_order(n, config, start=0):
    """What this process reads from step `start` on: the picks of one micro-batch after another."""
    for step in range(start, config.steps):
        for m in own_micro_batches(config):
            yield picks(n, config, step, m)


class PickedLatents(Dataset):
    """Item (index, flip), one of those picks: a latent (C, H, W), as precise as the file, and its
    label."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, pick):
        index, flip = pick
        return self.data.read(index, flip), self.data.labels[index]


def ignore_signals(worker):
    """Ctrl-C, or a scheduler's SIGTERM, reaches the loader's workers, too: the training process
    needs them to finish its step, and ends them itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def micro_batches(data, config, device, start=0):
    """-> iterator over x (B, C, H, W) and y (B,) of this process's micro-batches, which workers
    read ahead."""
    loader = DataLoader(
        PickedLatents(data),
        batch_sampler=reading_order(len(data), config, start),
        num_workers=min(config.workers, encode.cores()),
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    return iter(loader)


def draws(config, step, m, x, y, num_classes):
    """Times t (B,), noise eps (B, C, H, W) and labels after dropout (B,) of a micro-batch: the same
    for every target. t is logit-normal: neither end of the path teaches much."""
    generator = rng(NOISE, config.seed, step, m, device=x.device)
    mean, std = config.logit_t
    t = torch.sigmoid(torch.randn(len(x), generator=generator, device=x.device) * std + mean)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    dropped = torch.rand(len(x), generator=generator, device=x.device) < config.label_drop
    return t, eps, torch.where(dropped, num_classes, y)


# =============================================================== training
# From the inside out: one step, what is saved, what is printed, and the loop last (train).
#
# A step adds up the gradients of some micro-batches. Under torchrun each process takes its share
# of them, and the sum over the processes is what one process would have added up, so that all
# make the same update from the same weights. (DistributedDataParallel takes means over processes
# of equal shares; here three may share eight micro-batches.) The host waits for the GPU only where
# a line is printed: losses and norms stay there as tensors until then.


@dataclass
class Run:
    """A training run: its settings and data, and what changes from step to step."""

    config: Config
    data: encode.LatentDataset
    data_id: str  # tells caches apart, in words
    device: torch.device
    net: JLT
    ema: JLT  # the average of the weights over the steps, to sample with
    optimizer: torch.optim.Optimizer
    step: int = 0  # how many are done, and the number of the next: they count from 0

    # The folder holds ckpt.pt, ema.safetensors, log.jsonl, run.json and pictures.
    @property
    def folder(self):
        return Path(self.config.out)

    @property
    def checkpoint(self):
        return self.folder / "ckpt.pt"


def build(config, data, device):
    """-> Run with new weights, the same for every target and on every process."""
    channels, input_size, _ = data.shape
    tiles = input_size % config.patch_size == 0
    require(tiles, f"--patch-size {config.patch_size}: does not divide latents of {input_size}")
    torch.manual_seed(config.seed)
    net = JLT(
        input_size=input_size,
        patch_size=config.patch_size,
        in_channels=channels,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=data.num_classes,
        bottleneck=config.bottleneck,
    ).to(device)
    return Run(
        config=config,
        data=data,
        data_id=describe(data),
        device=device,
        net=net,
        ema=copy.deepcopy(net).requires_grad_(False),
        # No weight decay; the second moment's memory is short, as in JiT. `fused`: one kernel.
        optimizer=torch.optim.AdamW(
            net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True
        ),
    )


def describe(data):
    """A line that tells caches apart: other pictures, another encoder, other labels."""
    content = data.labels.numpy().tobytes() + repr(data.origin).encode()
    digest = hashlib.sha256(content).hexdigest()[:8]
    shape = "x".join(map(str, data.shape))
    return f"{len(data):,} latents {shape} of {data.num_classes} classes (digest {digest})"


# ------------------------------------------------------------- one step
def learning_rate(config, step, images):
    """The rate of step 0, 1, ... where an epoch has so many images: it rises during the warm-up,
    is constant, and falls over the last `cooldown` of the steps (the demo's over all of them, the
    paper's never)."""
    warmup = max(1, round(config.warmup_epochs * images / config.batch))
    cooldown = max(1, config.cooldown * config.steps)
    rising = (step + 1) / warmup
    falling = (config.steps - step) / cooldown
    return config.lr * min(1, rising, falling)


def accumulate_gradients(run, error_fn, batches, log):
    """Adds up the gradients of this process's micro-batches of the next step; error_fn is
    flow_error, or what the compiler made of it. -> its share of the loss, a tensor that is not
    waited for."""
    config = run.config
    count = config.batch // config.micro_batch
    loss = torch.zeros((), device=run.device)
    for m in own_micro_batches(config):
        x, y = next(batches)
        # float16 on the way to the device, float32 there.
        x = x.to(run.device, non_blocking=True).float()
        y = y.to(run.device, non_blocking=True)
        # Here, and not in the compiled function, where the same seed would draw other numbers.
        t, eps, y = draws(config, run.step, m, x, y, run.data.num_classes)
        with autocast(config, run.device):
            errors = error_fn(run.net, x, y, t, eps, config.target, config.t_eps, config.loss)
        (errors.mean() / count).backward()
        loss += errors.detach().mean() / count
        log.add_by_time(t, errors.detach())
    return loss


def sum_over_processes(tensor):
    """Makes of a process's share the sum of all, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def sum_gradients(net):
    """Adds up the gradients of all processes, as one vector: one message instead of hundreds."""
    if dist.is_initialized():
        gradients = [p.grad for p in net.parameters()]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)


def update(net, ema, optimizer, decay):
    """Clips the gradient to norm 1, takes AdamW's step, then averages the weights. -> the norm
    before clipping, a tensor that is not waited for."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    averages = [p.detach() for p in ema.parameters()]
    weights = [p.detach() for p in net.parameters()]
    # average += (1 - decay) * (weight - average), for all of them at once.
    torch._foreach_lerp_(averages, weights, 1 - decay)
    return norm


# ------------------------------------------------------------- what is saved
def load_checkpoint(path):
    """torch.load that runs no code from the file. The one class that it may name is
    argparse.Namespace, which holds the settings in the paper's checkpoint. Raises Stop for a
    damaged file."""
    advice = "damaged, or no checkpoint"
    with encode.explaining(path, advice), torch.serialization.safe_globals([Namespace]):
        # torch itself does not look at the checksums.
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, f"{path}: {advice}")
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        names = ", ".join(foreign)
        require(not foreign, f"{path}: names {names}, and no code is run for a checkpoint")
        return torch.load(path, map_location="cpu", weights_only=True)


def on_host(tensors):
    """A copy of a dict of tensors on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def average_of(run):
    """What is needed to sample: the averaged weights, and what has to be known of them."""
    return {
        "config": asdict(run.config),
        "classes": run.data.class_names,
        "grid": run.net.input_size,
        "step": run.step,
        "ema": on_host(run.ema.state_dict()),
    }


def checkpoint_of(run):
    """What a checkpoint holds, copied to the host: what is needed to sample, and to train on. Data
    order and noise need nothing but the step."""
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {i: on_host(moments) for i, moments in optimizer["state"].items()}
    return average_of(run) | {
        "latents": run.data_id,
        "model": on_host(run.net.state_dict()),
        "optimizer": optimizer,
    }


def resume(run):
    """Reads run.checkpoint into the run. Raises Stop, naming what differs, if it was made with
    other settings or from other data."""
    state = load_checkpoint(run.checkpoint)
    advice = "not a checkpoint of this program; give another --out"
    with encode.explaining(run.checkpoint, advice):
        # The cache may have moved (config.data is its folder), but it must be the same.
        old = state["config"] | {"latents": state["latents"]}
        new = asdict(run.config) | {"latents": run.data_id}
        # With a cool-down, the rate depends on where the run ends.
        free = FREE - {"steps"} if run.config.cooldown else FREE
        encode.refuse_changes(run.checkpoint, old, {k: v for k, v in new.items() if k not in free})
        run.net.load_state_dict(state["model"])
        run.ema.load_state_dict(state["ema"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.step = state["step"]


class Saver:
    """Writes checkpoints from a thread: training waits for the copy, not for the disk."""

    EVERY = 15 * 60  # seconds

    def __init__(self, run):
        self.run = run
        self.writer = ThreadPoolExecutor(1)
        self.writing = None
        self.last = time.monotonic()

    def due(self):
        """Whether this process would save now."""
        steps = self.run.config.save_every
        if steps:
            return self.run.step % steps == 0
        return time.monotonic() - self.last > self.EVERY

    def save(self):
        """Copies the run and has it written; waits only if the last one is not written yet."""
        self.wait()
        self.last = time.monotonic()
        rank, _ = processes()
        if rank == 0:
            state = checkpoint_of(self.run)
            self.writing = self.writer.submit(self.write, state)

    def write(self, state):
        with replacing(self.run.checkpoint) as temporary:
            torch.save(state, temporary)

    def wait(self):
        """Waits until the file is written. Raises what went wrong in the thread."""
        if self.writing:
            self.writing.result()
            self.writing = None


# ------------------------------------------------------------- what is printed
# Dense bfloat16 products a second, from the data sheets.
PEAK = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_flops(net):
    """Floating-point operations of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    z = torch.empty(1, net.in_channels, net.input_size, net.input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        copy.deepcopy(net).to("meta")(z, torch.empty(1), torch.ones(1).long())
    return counter.get_total_flops()


class Log:
    """Collects what steps make, on the device and without waiting for it; now and then prints a
    line and appends it to log.jsonl."""

    BINS = 10  # of t: the loss by t shows at which noise one target is learned better

    def __init__(self, run):
        self.run = run
        self.path = run.folder / "log.jsonl"
        self.rank, world = processes()
        self.peak_flops = 0  # unknown
        if run.device.type == "cuda":
            self.peak_flops = world * PEAK.get(torch.cuda.get_device_name(run.device), 0)
            torch.cuda.reset_peak_memory_stats(run.device)
        # A backward pass costs two forward ones.
        self.flops = 3 * forward_flops(run.net)
        if self.rank == 0 and self.path.exists():
            self.drop_lines_after(run.step)
        self.clear()
        self.restart_clock()

    def drop_lines_after(self, step):
        """A run that was killed takes those steps again."""
        kept = []
        # A power cut may leave half a line at the end.
        with contextlib.suppress(ValueError):
            for line in self.path.read_text().splitlines():
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def clear(self):
        self.losses = []
        self.norms = []
        self.by_time = torch.zeros(2, self.BINS, device=self.run.device)  # sums, counts

    def restart_clock(self):
        """Saving and drawing are not training."""
        self.started = time.perf_counter()

    def add_by_time(self, t, errors):
        """Adds errors (B,) of images at times t (B,) to the bins of their times."""
        bins = (self.BINS * t).long().clamp(max=self.BINS - 1)
        self.by_time.index_add_(1, bins, torch.stack([errors, torch.ones_like(errors)]))

    def add(self, loss, norm):
        """Takes note of a step; of the loss, this process's share."""
        self.losses.append(loss)
        self.norms.append(norm)

    def due(self):
        """The first line comes at once, the second soon."""
        return self.run.step in (1, 10) or self.run.step % self.run.config.log_every == 0

    def write(self, lr):
        """Called by all processes. Here the host waits for the GPU. Raises Stop if a loss or
        gradient was not finite."""
        losses = torch.stack(self.losses)  # (steps since the last line,)
        norms = torch.stack(self.norms)
        # Losses are shares. The norm is that of the summed gradient, the same in each process.
        sum_over_processes(losses)
        sum_over_processes(self.by_time)
        self.check_finite(losses, norms)
        seconds = (time.perf_counter() - self.started) / len(losses)
        rate = self.run.config.batch / seconds
        sums, counts = self.by_time.tolist()
        row = {
            "step": self.run.step,
            "loss": losses.mean().item(),
            "grad_norm": norms.mean().item(),
            "lr": lr,
            "ms": 1000 * seconds,
            "images_per_s": rate,
            "loss_by_t": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
        }
        if self.peak_flops:
            # MFU: the share of what the device could compute at most.
            row["mfu"] = rate * self.flops / self.peak_flops
        if self.run.device.type == "cuda":
            row["gib"] = torch.cuda.max_memory_allocated(self.run.device) / 2**30
        if self.rank == 0:
            self.show(row)
            self.append(row)
        self.clear()

    def append(self, row):
        full_disk = encode.explaining(self.path, "cannot be written; is the disk full?", status=1)
        with full_disk, open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def check_finite(self, losses, norms):
        """Raises Stop, naming the first bad step: no checkpoint is written after it."""
        bad = ~(losses.isfinite() & norms.isfinite())
        if bad.any():
            step = self.run.step - len(losses) + 1 + int(bad.int().argmax())
            line = f"{self.run.folder}: the loss or gradient of step {step:,} is not finite"
            advice = "any checkpoint is from before it; try a lower --lr, or --precision fp32"
            raise Stop(f"{line}; {advice}", status=1)

    def show(self, row):
        """Prints the row; every ten times log_every steps the loss by t, too."""
        steps = self.run.config.steps
        parts = [
            f"step {row['step']:,}/{steps:,} {row['step'] / steps:.1%}",
            f"loss {row['loss']:.4f}",
            f"grad {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{row['ms']:.0f} ms/step {row['images_per_s']:,.0f} images/s",
        ]
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.1%}")
        if "gib" in row:
            parts.append(f"{row['gib']:.1f} GiB")
        eta = (steps - row["step"]) * row["ms"] / 1000
        parts.append(f"eta {tqdm.format_interval(eta)}")
        print(" | ".join(parts), flush=True)
        if row["step"] % (10 * self.run.config.log_every) == 0:
            values = ["-" if value is None else f"{value:.3f}" for value in row["loss_by_t"]]
            print("  loss by t, from noise to data:", *values, flush=True)


# ------------------------------------------------------------- pictures on the way
def generate(net, labels, numbers, config, device):
    """Latents (N, C, H, W) of classes `labels` (N,). The noise of image i of `numbers` depends on
    (seed, i) alone: not on the batch, nor on how many processes share the work."""
    shape = (net.in_channels, net.input_size, net.input_size)
    noise = [torch.randn(shape, generator=rng(SAMPLES, config.seed, i)) for i in numbers]
    with autocast(config, device):
        return sample(
            net,
            labels.to(device),
            torch.stack(noise).to(device),
            config.target,
            config.sample_steps,
            config.cfg,
            config.interval,
            t_eps=config.t_eps,
        )


def pictures(vae, latents):
    """-> uint8 (N, 3, H, W) on the CPU."""
    line = "the sampled latents are not finite: damaged weights, or too large a --cfg"
    require(latents.isfinite().all(), line, status=1)
    images = [encode.to_uint8(vae.decode(part)).cpu() for part in latents.split(32)]
    return torch.cat(images)


def load_decoder(run):
    """-> the VAE that draws samples on the way, or None where it is not to be had: that costs the
    pictures, not the run, and a line says so."""
    config = run.config
    rank, _ = processes()
    if rank or not 0 < config.sample_every <= config.steps:
        return None
    try:
        vae = encode.load_vae(config.vae, run.device)
        channels = run.data.shape[0]
        require(vae.channels == channels, f"{config.vae} does not decode {channels} channels")
        return vae
    except Stop as error:
        print(f"no pictures on the way: {error}", flush=True)
        return None


def draw_samples(run, decoder):
    """A picture of 16 classes spread over all, from the averaged weights; always the same noise."""
    labels = torch.linspace(0, run.data.num_classes - 1, 16).long()
    try:
        latents = generate(run.ema, labels, range(16), run.config, run.device)
        grid = encode.image_grid(pictures(decoder, latents), columns=8)
        encode.save_png(run.folder / f"samples_{run.step:07d}.png", grid)
    except (RuntimeError, Stop) as error:
        # Out of memory, say, or weights that do not sample yet: training goes on.
        print(f"no picture at step {run.step:,}: {str(error).splitlines()[0]}", flush=True)


# ------------------------------------------------------------- the loop
@contextlib.contextmanager
def noted_signals():
    """Yields a list. The first SIGINT or SIGTERM is only noted in it, so that the step can be
    finished; a second one of the same kind ends the program as usual."""
    noted = []

    def note(number, frame):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(stop, save):
    """-> whether any process was told to stop, and whether any wants to save."""
    # On the CPU, so that the GPU is not waited for.
    flags = torch.tensor([stop, save], dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.bool().tolist()


def begin(config):
    """-> Run, new or continued: opens the data, joins the processes, reads the checkpoint."""
    rank, world = processes()
    device = encode.pick_device(config.device)
    data = encode.LatentDataset(config.data)
    count = config.batch // config.micro_batch
    advice = f"give --micro-batch {max(1, config.batch // world)} or less"
    require(world <= count, f"{world} processes for {count} micro-batches; {advice}")
    if world > 1:
        # NCCL sums gradients; gloo carries the flags of agree().
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if not config.vae:
        config = replace(config, vae=data.settings.get("vae", encode.VAE))
    run = build(config, data, device)
    if run.checkpoint.exists():
        resume(run)
    if rank == 0:
        introduce(run, world)
    return run


def introduce(run, world):
    """Makes the run's folder, writes run.json, and says what is going to happen."""
    config = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(config) | {"latents": run.data_id, "torch": torch.__version__}
    with replacing(run.folder / "run.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
    parameters = sum(p.numel() for p in run.net.parameters())
    passes = config.batch // config.micro_batch
    start = f"continuing at step {run.step:,}" if run.step else "from the start"
    print(
        f"{run.folder}: {config.target}-prediction, {parameters:,} parameters, {run.data_id}\n"
        f"batch {passes} x {config.micro_batch} on {world} x {run.device}, learning rate "
        f"{config.lr:g}, EMA {config.ema:g}, seed {config.seed}; all settings in run.json\n"
        f"{start}, up to step {config.steps:,}",
        flush=True,
    )


def train(config):
    """Trains config.target on config.data, or continues the run in config.out. -> its folder.
    Raises Stop for a cache or a checkpoint that does not fit, a loss that is not finite, and after
    a signal."""
    run = begin(config)
    config = run.config
    decoder = load_decoder(run)
    log = Log(run)
    saver = Saver(run)
    error_fn = flow_error
    if compiles(config, run.device):
        # For fixed shapes: each new one would cost a minute.
        error_fn = torch.compile(flow_error, dynamic=False)
    batches = micro_batches(run.data, config, run.device, run.step)
    stop = False
    with noted_signals() as signals:
        while run.step < config.steps and not stop:
            # One step.
            lr = learning_rate(config, run.step, len(run.data))
            run.optimizer.param_groups[0]["lr"] = lr
            loss = accumulate_gradients(run, error_fn, batches, log)
            sum_gradients(run.net)
            norm = update(run.net, run.ema, run.optimizer, config.ema)
            run.step += 1
            log.add(loss, norm)

            # Once in a while: log, save, draw. A checkpoint is saved after the log has looked at
            # the losses up to here.
            stop, save = agree(bool(signals), saver.due())
            save = save or stop or run.step == config.steps
            draw = config.sample_every and run.step % config.sample_every == 0
            if save or draw or log.due():
                log.write(lr)
                if save:
                    saver.save()
                if draw and decoder:
                    draw_samples(run, decoder)
                log.restart_clock()
    saver.wait()
    finish(run, stop)
    return run.folder


def finish(run, stopped):
    """After the last step: writes ema.safetensors. After a signal: raises Stop, with the exit
    status that a shell expects of an interrupted program."""
    rank, _ = processes()
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        line = f"{run.folder}: stopped by a signal, saved at step {run.step:,}"
        raise Stop(f"{line}; the same command continues", status=130)
    if rank == 0:
        write_ema(run.folder / "ema.safetensors", average_of(run))
        print(f"{run.folder}: {run.step:,} steps done", flush=True)


# =============================================================== sampling from checkpoints
# One can sample from three kinds of file: a run's ckpt.pt, which also holds what training needs to
# go on; its ema.safetensors, a quarter of the size, to give away; and the checkpoint that the
# paper's authors published. All are read without running code from them. What comes out is one
# picture of chosen classes, or a folder of numbered pictures that any program for FID reads.


@dataclass
class Trained:
    """A network to sample from, and what its checkpoint says of it."""

    net: JLT
    settings: dict  # those of Config that it decides, unless a flag does
    class_names: list
    description: str  # which weights these are


def write_ema(path, state):
    """Writes what a run gives away: the averaged weights of a checkpoint, or average_of a run,
    under the model's own names, settings and class names in the header, no pickle."""
    about = {key: state[key] for key in ("config", "classes", "grid", "step")}
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state["ema"], {"jlt": json.dumps(about)}))


def export(folder):
    """--export: ema.safetensors of a run as far as it is; training writes it at the end."""
    checkpoint = folder / "ckpt.pt"
    require(checkpoint.exists(), f"{checkpoint}: no such file; --export takes a run folder")
    write_ema(folder / "ema.safetensors", load_checkpoint(checkpoint))
    print(f"wrote {folder / 'ema.safetensors'}")


def read_ema(path):
    """-> the state that write_ema was given, of which it keeps what is needed to sample."""
    with encode.explaining(path, "no averaged weights of this program"):
        with safetensors.safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["jlt"])
        return state | {"ema": safetensors.torch.load_file(path)}


def network_of(weights, input_size):
    """-> JLT with these weights (by name); the architecture is read from their shapes."""
    direct = "x_embedder.proj.weight" in weights
    stem = weights["x_embedder.proj.weight" if direct else "x_embedder.proj1.weight"]
    hidden_size = len(weights["t_embedder.mlp.2.bias"])
    net = JLT(
        input_size=input_size,
        patch_size=stem.shape[2],
        in_channels=stem.shape[1],
        hidden_size=hidden_size,
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_heads=hidden_size // len(weights["blocks.0.attn.q_norm.weight"]),
        num_classes=len(weights["y_embedder.embedding_table.weight"]) - 1,
        bottleneck=0 if direct else len(stem),
    )
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def from_ours(state):
    """-> Trained, from our ckpt.pt or ema.safetensors: the average of the weights."""
    names = ("target", "t_eps", "vae", "sample_steps", "cfg", "interval")
    settings = {name: state["config"][name] for name in names}
    return Trained(
        net=network_of(state["ema"], state["grid"]),
        settings=settings | {"interval": tuple(settings["interval"])},  # in JSON it was a list
        class_names=state["classes"],
        description=f"EMA of step {state['step']:,}",
    )


def from_published(state):
    """The layout of the paper's checkpoint-last.pth. The first of its two EMAs is to be used."""
    args = state["args"]
    weights = {}
    for name, value in state["model_ema1"].items():
        name = name.removeprefix("module.").removeprefix("net.")
        weights[name] = value.float()
    # The file has a mask_token, which the network does not use.
    weights.pop("mask_token", None)
    # A bool in the released code: False is x-prediction, True is v. Older files lack it.
    predicts_v = getattr(args, "flow_matching", False)
    return Trained(
        # The VAE makes one position of 16 x 16 pixels.
        net=network_of(weights, args.img_size // 16),
        settings={
            "target": "v" if predicts_v else "x",
            "t_eps": getattr(args, "t_eps", 0.05),
            "vae": encode.VAE,
        },
        class_names=[],
        description=f"first EMA (model_ema1) of epoch {state.get('epoch', 'unknown')}",
    )


def checkpoint_file(path):
    """A run folder -> the file to sample from; a file as it is. Raises Stop if it is not there."""
    path = Path(path)
    if path.is_dir():
        # A run that was given away holds ema.safetensors only.
        there = (path / "ckpt.pt").exists()
        path = path / ("ckpt.pt" if there else "ema.safetensors")
    require(path.exists(), f"{path}: no such file; --sample takes a run folder or a checkpoint")
    return path


def load_network(path):
    """-> Trained, from our checkpoints (a run folder, its ckpt.pt or ema.safetensors) or the
    paper's. Raises Stop for anything else."""
    path = checkpoint_file(path)
    state = read_ema(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    with encode.explaining(path, "holds no JLT"):
        trained = from_published(state) if "model_ema1" in state else from_ours(state)
    print(f"{path}: {trained.settings['target']}-prediction, {trained.description}", flush=True)
    return trained


def find_checkpoint(name):
    """A path as it is; of a hub repository's name, the file that it holds, fetched once."""
    if Path(name).exists():
        return Path(name)
    local = f"{name}: no such file or run folder"
    # Where there is a folder "owner", a path was meant.
    meant_as_path = "/" in name and Path(name).parent.is_dir()
    require(not meant_as_path, local)
    require(name.count("/") == 1, f"{local}, and no repository's name (owner/name) either")
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    logging.set_verbosity_error()  # no line for each try
    print(f"{name}: no such file here; asking the hub for that repository ...", flush=True)
    by_hand = f"fetch it by hand: hf download {name} checkpoint-last.pth --local-dir ."
    with encode.explaining(name, f"not to be had from the hub; {by_hand}", status=1):
        try:
            return Path(hf_hub_download(name, "checkpoint-last.pth"))
        except LocalEntryNotFoundError:
            raise  # no network; it is a kind of EntryNotFoundError
        except EntryNotFoundError:
            # The repository holds a run of this program.
            return Path(hf_hub_download(name, "ema.safetensors"))


# What --sample takes beside its own flags. The other fields of Config are about training.
SAMPLE_FLAGS = {"sample_steps", "cfg", "interval", "seed", "t_eps", "micro_batch"}
SAMPLE_FLAGS |= {"out", "vae", "device", "precision", "compile"}


def check_sample_flags(classes, n, captions, given):
    """Raises Stop where --sample was not told what to make, or was told what it does not decide."""
    require(classes or not captions, "--labels goes with --classes")
    require(classes or n is not None, "--sample: say what, --classes 207 360 ... or --n 50000")
    require(classes is None or n is None, "--classes and --n: give one of the two")
    require(n is None or n > 0, f"--n {n}: must be positive")
    for name in sorted(set(given) - SAMPLE_FLAGS):
        raise Stop(f"{flag(name)}: has no use with --sample; the checkpoint decides it")


def sample_command(name, classes, n, captions, given):
    """--sample: one picture of each of `classes`, or n pictures of all classes in a folder. Without
    --out they lie beside a run's checkpoint, or in the current folder, under a name that holds
    what is varied most often."""
    check_sample_flags(classes, n, captions, given)
    # --micro-batch is how many images are made at once; as the batch, it is its own divisor.
    config = configure(batch=given.get("micro_batch") or 256, **given)
    device = encode.pick_device(config.device)
    path = checkpoint_file(find_checkpoint(name))
    trained = load_network(path)
    decided = {key: value for key, value in trained.settings.items() if key not in given}
    config = replace(config, **decided)
    made_by = f"cfg{config.cfg:g}_steps{config.sample_steps}_seed{config.seed}"
    home = path.parent if (path.parent / "run.json").exists() else Path()
    if classes is None:
        out = Path(given.get("out", home / f"n{n}_{made_by}"))
        sample_folder(trained, path, n, out, config, device)
    else:
        labels = [class_label(word, trained) for word in classes]
        which = "_".join(map(str, labels[:8]))
        out = Path(given.get("out", home / f"classes_{which}_{made_by}.png"))
        sample_classes(trained, labels, out, captions, config, device)


def class_label(word, trained):
    """The number or the name of a class -> its label. Raises Stop for others, naming near ones."""
    names = trained.class_names
    last = trained.net.num_classes - 1
    if word.isdigit():
        require(int(word) <= last, f"--classes {word}: the checkpoint has classes 0 to {last}")
        return int(word)
    numbered = f"--classes {word}: give numbers, 0 to {last}; the checkpoint knows no names"
    require(names, numbered)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.4) or names[:3]
    line = f"--classes {word}: no class of that name; there are, for instance, {', '.join(near)}"
    require(word in names, line)
    return names.index(word)


def prepare(trained, count, config, device):
    """-> the network and the VAE on the device, compiled if it is worth the minutes."""
    compiled = compiles(config, device) and (count >= 64 or config.compile == "on")
    vae = encode.load_vae(config.vae, device)
    channels = trained.net.in_channels
    line = f"--vae {config.vae}: decodes {vae.channels} channels, the network makes {channels}"
    require(vae.channels == channels, line)
    net = trained.net.to(device)
    if compiled:
        net.compile(dynamic=False)
        vae.compile()
    return net, vae


def sample_classes(trained, labels, out, captions, config, device):
    """One PNG, a picture for each label, in as many rows as fill it, at most as many as columns;
    `captions` asks for the class names under each row."""
    rank, _ = processes()
    if rank:
        return
    require(out.suffix == ".png", f"--out {out}: needs the ending .png with --classes")
    encode.require_new(out)
    net, vae = prepare(trained, len(labels), config, device)
    images = []
    for numbers in torch.arange(len(labels)).split(config.micro_batch):
        part = torch.tensor(labels)[numbers]
        images.append(pictures(vae, generate(net, part, numbers.tolist(), config, device)))
    images = torch.cat(images)
    if captions:
        names = trained.class_names or [str(i) for i in range(net.num_classes)]
        strips = [encode.caption(names[label], images.shape[3]) for label in labels]
        images = torch.cat([images, torch.stack(strips)], 2)
    rows = max(r for r in range(1, math.isqrt(len(images)) + 1) if len(images) % r == 0)
    encode.save_png(out, encode.image_grid(images, columns=len(images) // rows))
    print(f"wrote {out}: {describe_sampling(config)}")


def describe_sampling(config):
    """For the last line: what has to be said beside any FID."""
    return (
        f"{config.target}-prediction, {config.sample_steps} Heun steps, "
        f"guidance {config.cfg:g} on {config.interval}, seed {config.seed}"
    )


def sample_folder(trained, checkpoint, n, folder, config, device):
    """n pictures 000000.png, 000001.png, ... of classes 0, 1, 2, ... in turn, beside a
    settings.json. What is there is not made again, and processes share the batches."""
    rank, world = processes()
    open_sample_folder(folder, trained, checkpoint, config)
    net, vae = prepare(trained, n, config, device)
    paths = [folder / f"{i:06d}.png" for i in range(n)]
    size = min(n, config.micro_batch)
    batches = [range(first, first + size) for first in range(0, n, size)][rank::world]
    with ThreadPoolExecutor(8) as writers:
        writing = []
        for numbers in tqdm(batches, unit=f"x {size} images", disable=rank > 0):
            missing = [i for i in numbers if i < n and not paths[i].exists()]
            if not missing:
                continue
            # All of the batch, and the last one as large as the others, for the compiler.
            labels = torch.tensor(numbers) % net.num_classes
            images = pictures(vae, generate(net, labels, numbers, config, device))
            for task in writing:
                task.result()  # raises what went wrong there
            writing = [
                writers.submit(encode.save_png, paths[i], images[i - numbers.start])
                for i in missing
            ]
        for task in writing:
            task.result()
    if rank == 0:
        encode.wait_for_files(paths)
        print(f"wrote {folder}: {n:,} images, {describe_sampling(config)}")


def open_sample_folder(folder, trained, checkpoint, config):
    """Makes the folder with its settings.json. Raises Stop, naming what differs, if it is there
    with other settings."""
    settings = {
        "checkpoint": str(checkpoint.resolve()),
        "weights": trained.description,
        "target": config.target,
        "t_eps": config.t_eps,
        "vae": config.vae,
        "sample_steps": config.sample_steps,
        "cfg": config.cfg,
        "interval": list(config.interval),
        "seed": config.seed,
        "precision": config.precision,
        "num_classes": trained.net.num_classes,
    }
    path = folder / "settings.json"
    rank, _ = processes()
    if rank > 0:
        encode.wait_for_files([path])  # the first process writes it
    if path.exists():
        with encode.explaining(path, "damaged; give another --out"):
            old = json.loads(path.read_text())
        encode.refuse_changes(folder, old, settings)
        return
    if folder.exists():
        require(folder.is_dir(), f"{folder}: is a file; --n writes a folder of images")
        line = f"{folder}: holds other files; give another --out"
        require(not encode.list_images(folder), line)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


# =============================================================== why x
# Section 3.2, App. B and D of the paper. Suppose that tokens are Gaussian, x ~ N(0, diag(lam)), of
# variance lam in each direction. Then z has the variance V = t^2 lam + (1 - t)^2, and everything is
# known in closed form:
#
#     E[x|z] = t lam z / V                  Var(x|z)   = lam (1 - t)^2 / V
#     E[v|z] = (t lam - (1 - t)) z / V      Var(v|z)   = lam / V
#                                           Var(eps|z) = t^2 lam / V
#
# The variances left over (the risks) are the least squared errors that any network can reach. By
# the readout they are the same thing for all targets: Var(v|z) = Var(x|z) / (1 - t)^2. But what has
# to come out is not. Where lam is small, E[x|z] is about 0; E[v|z] is about -z / (1 - t), which is
# as large as the noise. Among the targets themselves: x has the covariance of the data, v that plus
# 1 in every direction, so that its spectrum has a floor.


def gaussian_risk(lam, t):
    """(5)-(6) The variances left in x, eps and v once z is known: the least mean squared errors
    that are possible, by direction on average. R_v is R_x / (1 - t)^2.
    -> {"x": R_x, "eps": R_eps, "v": R_v}"""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    variance_z = t**2 * lam + (1 - t) ** 2
    return {
        "x": (lam * (1 - t) ** 2 / variance_z).mean().item(),
        "eps": (t**2 * lam / variance_z).mean().item(),
        "v": (lam / variance_z).mean().item(),
    }


def gaussian_gain(lam, t):
    """(3)-(4) E[x|z] / z and E[v|z] / z in a direction of variance lam: how much of z the best
    answer hands on. For small lam, x damps z to nothing; v carries it through, as -z / (1 - t)."""
    variance_z = t**2 * lam + (1 - t) ** 2
    return t * lam / variance_z, (t * lam - (1 - t)) / variance_z


def shares(lam):
    """-> the shares (D,) of the variance that the directions have."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return lam / lam.sum()


def effective_rank(lam):
    """How many directions carry the variance: exp of the entropy of its shares (Roy & Vetterli
    2007). The paper means participation_ratio by this name."""
    return torch.special.entr(shares(lam)).sum().exp().item()


def participation_ratio(lam):
    """(sum lam)^2 / sum lam^2: the same question, with more weight on large directions."""
    return 1 / shares(lam).square().sum().item()


def directions_for(share, lam):
    """In how many directions, largest first, so large a share of the variance lies."""
    held = shares(lam).sort(descending=True).values.cumsum(0)
    return int((held < share).sum()) + 1


def tokens(latents, patch_size):
    """Latents (B, C, H, W) -> (B * N, C*p*p), row by row."""
    patches = F.pixel_unshuffle(latents.float(), patch_size)
    return patches.movedim(1, -1).flatten(0, 2)


def linear_probe(fit, held_out, t):
    """App. D: errors per dimension, on held-out tokens (N, D), of the best linear predictors of x
    and of v from z at time t (ridge regression), to set beside gaussian_risk."""
    x = torch.cat([fit, held_out]).double()
    eps = torch.randn(x.shape, generator=rng(NOISE, 0), dtype=x.dtype)
    z = F.pad(t * x + (1 - t) * eps, (0, 1), value=1)  # a last column for the mean
    n = len(fit)
    # The ridge, of 1e-3: solvable even if there are fewer tokens than dimensions.
    gram = z[:n].T @ z[:n] + 1e-3 * torch.eye(z.shape[1], dtype=z.dtype)

    def error(wanted):
        weights = torch.linalg.solve(gram, z[:n].T @ wanted[:n])
        return (wanted - z @ weights)[n:].square().mean().item()

    return {"x": error(x), "v": error(x - eps)}


def token_statistics(data, patch_size):
    """-> eigenvalues (D,) of the covariance of a cache's tokens, descending; how many tokens there
    are; and up to 60,000 of them, in random order."""
    from fid import Statistics

    def rows(indices):
        latents = torch.stack([data[i][0] for i in indices])
        return tokens(latents, patch_size)

    statistics = Statistics(data.shape[0] * patch_size**2)
    for first in tqdm(range(0, len(data), 64), unit="x 64 latents"):
        statistics.update(rows(range(first, min(first + 64, len(data)))))
    lam = torch.linalg.eigvalsh(torch.from_numpy(statistics.cov))
    # Enough for the linear probes, and in memory at once.
    some = rows(range(0, len(data), math.ceil(statistics.n / 60_000)))
    order = torch.randperm(len(some), generator=rng(ORDER, 0))
    # Rounding may leave an eigenvalue of 0 below it.
    return lam.flip(0).clamp(min=0), statistics.n, some[order]


def geometry(folder, config):
    """--geometry: the spectrum of a cache's tokens, and what (3)-(6) make of it: two tables, and
    geometry.png."""
    out = Path(config.out)
    data = encode.LatentDataset(folder)
    p = config.patch_size
    require(data.shape[1] % p == 0, f"{folder}: patches of {p} do not tile latents {data.shape}")
    require(len(data) > 1, f"{folder}: one latent has no statistics")
    lam, count, some = token_statistics(data, p)
    spectra = {"x": lam, "eps": torch.ones_like(lam), "v": lam + 1}  # x and eps are independent

    print(f"{folder}: {count:,} tokens of {len(lam)} dimensions; variances {lam[0]:.4g} to")
    print(f"{lam[-1]:.3g}, {lam.mean():.3f} on average")
    print("\n        effective   participation   90% of the variance   share of the variance")
    print("target       rank           ratio    in so many directions    in the smaller half")
    for target, spectrum in spectra.items():
        half = spectrum[len(spectrum) // 2 :].sum() / spectrum.sum()
        print(
            f"{target:6} {effective_rank(spectrum):10.1f} {participation_ratio(spectrum):15.1f} "
            f"{directions_for(0.9, spectrum):24} {half:22.1%}"
        )
    print(
        "(effective rank: exp of the entropy; the paper uses the name for the participation ratio)"
    )

    print("\n   t     R_x   R_eps     R_v   linear probe: x       v   gain, smallest: x       v")
    fit, held_out = some.chunk(2)
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        risk = gaussian_risk(lam, t)
        probe = linear_probe(fit, held_out, t)
        gain_x, gain_v = gaussian_gain(lam[-1].item(), t)
        print(
            f"{t:4.1f} {risk['x']:7.4f} {risk['eps']:7.4f} {risk['v']:7.4f} "
            f"{probe['x']:17.4f} {probe['v']:7.4f} {gain_x:19.4f} {gain_v:7.3f}"
        )
    print(
        "(R: least error per dimension, (5)-(6); gain: E[target|z] / z in the smallest direction)"
    )

    ranked = {k: list(enumerate(s.tolist(), 1)) for k, s in spectra.items()}
    times = [i / 100 for i in range(1, 100)]
    risks = {k: [(t, gaussian_risk(lam, t)[k]) for t in times] for k in spectra}
    left = encode.chart("Eigenvalues of each target's covariance", "rank", ranked)
    right = encode.chart("Least error per dimension", "t (0 is noise, 1 is data)", risks)
    encode.save_png(out, torch.cat([left, right], 2))
    print(f"\nwrote {out}")


# =============================================================== the demo
# The whole of this file on a toy: 10,000 drawn digits of 32 x 32 pixels, each 2 x 2 tokens of 128
# numbers by a linear codec (encode.py draws and encodes them). Two networks are trained, one for x
# and one for v, alike in everything else; both draw digits from the same noise; and their digits
# are compared with real ones, by FID in miniature.
DEMO = {
    # Below the token's 128 channels: the network cannot hand on all of them. README's table says
    # what happens in wider ones.
    "hidden_size": 64,
    "depth": 3,
    "batch": 64,
    "steps": 1500,
    "lr": 3e-3,
    "cooldown": 1.0,
    "warmup_epochs": 0.3,
    "ema": 0.99,
    "sample_steps": 10,
    "cfg": 1.5,
    "interval": (0.0, 1.0),
    "sample_every": 0,
    "log_every": 250,
    "workers": 0,
    "data": "runs/digits",
}
DEMO_IMAGES = 2000  # samples of each target, and digits to compare them with


def digit_judge(images, labels, steps=250):
    """The demo's Inception: a classifier trained in seconds on digits uint8 (N, 3, 32, 32).
    -> images (B, 3, 32, 32) in [-1, 1] -> logits (B, 10)."""

    def conv(c_in, c_out):
        """A convolution that halves the size, batch norm, ReLU."""
        layer = nn.Conv2d(c_in, c_out, 3, stride=2, bias=False)
        return [layer, nn.BatchNorm2d(c_out, eps=1e-3), nn.ReLU()]

    torch.manual_seed(0)
    net = nn.Sequential(
        *conv(3, 16),
        *conv(16, 32),
        *conv(32, 64),
        nn.Flatten(),
        nn.Linear(64 * 9, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    order = torch.randint(len(images), (steps, 128))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for batch in order:
        logits = net(encode.to_float(images[batch]))
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


class DigitScore:
    """Compares digits with held-out real ones: Frechet distances of pixels, averaged over 4x4, and
    of the judge's last features; what the judge reads; and the energy in low directions."""

    def __init__(self, codec, n):
        self.codec = codec
        self.judge = digit_judge(*encode.draw_digits(2 * n, seed=2))
        # One half is the reference. The other is scored as samples are: nothing scores better.
        images, labels = encode.draw_digits(2 * n, seed=3)
        self.labels = labels[:n]
        self.real = images[n:]
        self.reference = self.statistics(images[:n])
        self.real_energy = self.low_energy(codec.encode(encode.to_float(self.real)))

    def statistics(self, images):
        """-> mean and covariance in both spaces."""
        x = encode.to_float(images)
        pixels = F.avg_pool2d(x, 4).flatten(1).double()  # (N, 192)
        features = self.judge[:-1](x).double()  # (N, 64)
        return [(space.mean(0), space.T.cov()) for space in (pixels, features)]

    def low_energy(self, latents):
        """Variance in the 64 of 128 directions where the digits have least: the codec's last."""
        return tokens(latents, 1)[:, 64:].var(0).sum()

    def row(self, name, images, latents, loss=""):
        """A line of the table."""
        from fid import frechet_distance

        distances = [
            frechet_distance(*ours, *theirs)
            for ours, theirs in zip(self.statistics(images), self.reference, strict=True)
        ]
        energy = self.low_energy(latents) / self.real_energy
        read = self.judge(encode.to_float(images)).argmax(1)
        right = (read == self.labels).float().mean()
        return (
            f"{name:12} {loss:>6} {distances[0]:15.2f} {distances[1]:17.1f} "
            f"{energy:17.2f} {right:13.1%}"
        )


def demo(given):
    """--demo: the same network, loss, loop and sampler on drawn digits, for x and for v, from the
    same weights, data order and noise. Prints a table and draws a picture. Run again, it goes on
    with the networks that are there."""
    started = time.perf_counter()
    targets = [given["target"]] if "target" in given else ["x", "v"]
    # Settings that are not the demo's own get a folder of their own.
    free = (FREE - {"steps"}) | {"target"}
    changed = [f"{name}-{given[name]}" for name in sorted(given) if name not in free]
    name = "-".join(["demo", *changed]).replace("/", "-")
    name = "".join(letter for letter in name if letter not in " ()")
    out = Path(given.get("out", f"runs/{name}"))
    config = configure(**DEMO | given)
    device = encode.pick_device(config.device)
    n = DEMO_IMAGES
    if device.type == "cpu":
        # Matrices this small gain little from a second thread, and beside another program two
        # threads spend their time waiting for each other: 25 times slower was measured.
        torch.set_num_threads(1)

    print("drawing digits ...", flush=True)
    encode.cache_digits(config.data)
    codec = encode.load_vae(f"{config.data}/codec.safetensors")
    print("training the judge, a small classifier of digits ...", flush=True)
    score = DigitScore(codec, n)
    real_latents = codec.encode(encode.to_float(score.real))
    coded = pictures(codec, real_latents)
    table = [
        score.row("real", score.real, real_latents),
        score.row("real, coded", coded, real_latents),
    ]
    rows = {"real": score.real[:20]}
    for target in targets:
        folder = train(replace(config, target=target, out=str(out / target)))
        last = (folder / "log.jsonl").read_text().splitlines()[-1]
        net = load_network(folder).net.to(device)
        print(f"sampling and scoring {n:,} digits ...", flush=True)
        settings = replace(config, target=target)
        latents = generate(net, score.labels, range(n), settings, device).cpu()
        images = pictures(codec, latents)
        rows[f"predicts {target}"] = images[:20]
        loss = f"{json.loads(last)['loss']:.3f}"
        table.append(score.row(f"predicts {target}", images, latents, loss))
    encode.save_png(out / "demo.png", encode.labelled_rows(rows))

    print("\n               loss   pooled pixels   digit features   low directions   read right")
    print(*table, sep="\n")
    print(f"""
loss: in training, over the last {config.log_every} steps.
pooled pixels, digit features: how far the samples are from held-out digits, as Frechet distances
  (FID in miniature) of pixels averaged over 4x4 and of the judge's last layer; lower is better,
  and "real" is the floor. "real, coded": those digits, encoded and decoded.
low directions: energy in those 64 of 128 directions where the digits have least; theirs is 1.
read right: share that the judge reads as the digit that was asked for.

{out / "demo.png"}: two rows each of {", ".join(rows)}. [{time.perf_counter() - started:.0f} s]""")


# =============================================================== benchmark
def bench(given):
    """--bench: how fast this machine trains, samples and decodes, through the program's own
    functions, on random latents; and what that means for the run that the flags describe."""
    config = configure(**given)
    device = encode.pick_device(config.device)
    small = config
    if device.type == "cpu":
        # A CPU would be at a step of 1,024 images for hours.
        size = given.get("micro_batch", 4)
        small = replace(config, batch=size, micro_batch=size)
    with tempfile.TemporaryDirectory() as folder:
        latents = torch.randn(1024, 128, 16, 16)
        shard = Path(folder) / "latents_00000.safetensors"
        encode.save_shard(shard, latents, latents, torch.arange(1024) % 1000, classes=1000)
        # The rate is high so that no weight stays zero: zeros multiply faster.
        quick = {"steps": 20, "log_every": 5, "sample_every": 0, "lr": 1e-3, "warmup_epochs": 0.0}
        run = train(replace(small, data=folder, out=f"{folder}/run", **quick))
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        net = load_network(run).net.to(device)
    # The first line waited for the compiler.
    rate = float(np.median([row["images_per_s"] for row in rows[1:]]))
    share = "its share of the device's peak is unknown"
    if "mfu" in rows[-1]:
        share = f"{np.median([row['mfu'] for row in rows[1:]]):.1%} of the device's peak"
    memory = f", {rows[-1]['gib']:.1f} GiB at most" if "gib" in rows[-1] else ""
    print(f"\ntraining: {rate:,.1f} images/s at {small.micro_batch} a pass, {share}{memory}")

    if compiles(small, device):
        net.compile(dynamic=False)
    size = small.micro_batch
    labels = torch.arange(size) % 1000
    generated = seconds_for(lambda: generate(net, labels, range(size), small, device).cpu())
    per_image = generated / size
    print(f"sampling: {1 / per_image:,.2f} guided images/s, {config.sample_steps} Heun steps")
    counted = "without decoding, for which give --vae"
    if config.vae:
        vae = encode.load_vae(config.vae, device)
        if compiles(small, device):
            vae.compile()
        some = latents[: min(size, 32)]
        images = pictures(vae, some)
        encoding = seconds_for(lambda: vae.encode(encode.to_float(images)).cpu())
        decoding = seconds_for(lambda: pictures(vae, some))
        print(
            f"VAE: {len(some) / encoding:,.1f} images/s encode, {len(some) / decoding:,.1f} decode"
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "0.png"
            writing = seconds_for(lambda: encode.save_png(path, images[0])) / encode.cores()
        per_image += decoding / len(some) + writing
        counted = "decoded and written"
    hours = config.steps * config.batch / rate / 3600
    print(
        f"in all: {config.steps:,} steps of {config.batch:,} images take {hours:,.1f} hours here; "
        f"50,000 guided samples take {50_000 * per_image / 60:,.1f} minutes, {counted}"
    )


def seconds_for(work):
    """The second of two calls: the first one compiles."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# =============================================================== command line
# The first field of each group, for --help.
GROUPS = {
    "target": "what is learned",
    "model": "model",
    "steps": "optimisation",
    "sample_steps": "sampling; with --sample the default is what the run has",
    "data": "files and machine",
}
METAVARS = {
    "logit_t": ("MEAN", "STD"),
    "interval": ("LOW", "HIGH"),
    "data": "FOLDER",
    "out": "PATH",
    "vae": "NAME",
    "device": "NAME",
}


def make_flags():
    """-> ArgumentParser: what to do, then a flag for every field of Config, so that a setting is
    written down once."""
    parser = encode.make_parser(__doc__)
    group = parser.add_argument_group("what to do, if not to train")
    mode = group.add_mutually_exclusive_group().add_argument
    mode("--demo", action="store_true", help="x against v on drawn digits")
    mode("--sample", metavar="NAME", help="from a run folder, a checkpoint, or a hub repository")
    mode("--export", metavar="RUN", help="write the averaged weights so far as ema.safetensors")
    mode(
        "--geometry",
        nargs="?",
        const=DEMO["data"],
        metavar="LATENTS",
        help="spectra of a cache; without one, of the drawn digits",
    )
    mode("--bench", action="store_true", help="how fast this machine is")
    group.add_argument("--classes", nargs="+", metavar="CLASS", help="--sample: numbers or names")
    group.add_argument("--n", type=int, metavar="N", help="--sample: so many, of all classes")
    group.add_argument(
        "--labels",
        action="store_true",
        dest="captions",
        help="--sample: write the classes' names",
    )
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        help = f.metadata["help"]
        if f.default not in (0, ""):
            default = " ".join(map(str, f.default)) if f.type is tuple else f.default
            help = f"{help} ({default})"
        group.add_argument(
            flag(f.name),
            type=float if f.type is tuple else f.type,
            nargs=2 if f.type is tuple else None,
            choices=f.metadata["choices"],
            metavar=METAVARS.get(f.name, None if f.metadata["choices"] else "N"),
            default=SUPPRESS,
            help=help,
        )
    return parser


def refuse(flags, mode):
    """Raises Stop if any flags are left that a mode would ignore."""
    for name in sorted(flags):
        raise Stop(f"{flag(name)}: has no use with {mode}")


def read_flags():
    """-> what to do and with what, what --sample was given beside, and the settings of Config that
    were given."""
    given = vars(make_flags().parse_args())
    for name in given.keys() & {"logit_t", "interval"}:
        given[name] = tuple(given[name])
    mode = ("train", None)
    for name in ("demo", "sample", "export", "geometry", "bench"):
        value = given.pop(name)
        if value not in (None, False):
            mode = (name, value)
    samples = {name: given.pop(name) for name in ("classes", "n", "captions")}
    return mode, samples, given


def main():
    (mode, value), samples, given = read_flags()
    rank, world = processes()
    if mode == "sample":
        return sample_command(value, **samples, given=given)
    absent = samples == {"classes": None, "n": None, "captions": False}
    require(absent, "--classes, --n and --labels go with --sample")
    if mode == "train":
        folder = train(configure(**given))
        if rank == 0:
            print(f"to sample: python jlt.py --sample {folder} --classes 0 1")
        return None

    require(world == 1, f"--{mode} is for one process: start it with python, not torchrun")
    if mode == "demo":
        refuse(given.keys() & {"data", "vae"}, "--demo")
        return demo(given)
    if mode == "bench":
        refuse(given.keys() & {"data", "out"}, "--bench")
        return bench(given)
    if mode == "export":
        refuse(given, "--export")
        return export(Path(value))
    refuse(given.keys() - {"model", "patch_size", "out"}, "--geometry")
    if "out" in given:
        encode.require_new(given["out"])
    if value == DEMO["data"]:
        encode.cache_digits(value)
    return geometry(value, configure(**{"out": "geometry.png"} | given))


if __name__ == "__main__":
    encode.run_command(main)
