"""JLT: clean-latent prediction in latent diffusion transformers (arXiv 2605.27102), in one file.

The data are latents. A frozen autoencoder, the VAE of FLUX.2, turns a picture of 256 x 256 pixels
into 16 x 16 positions of 128 channels, each channel of about mean 0 and standard deviation 1. A
transformer sees each position as one token. It learns to turn noise eps ~ N(0, I) into such
latents x, along the straight path between the two:

    z_t = t x + (1 - t) eps,    t = 0 is noise, t = 1 is data,    velocity v = dz/dt = x - eps.

The lines of many pairs (x, eps) pass through the same point z_t, and a network that is trained by
squared error learns the mean of their velocities, E[v | z_t]. Sampling follows this mean velocity
from noise to data. The result is not an average picture. Think of many points, each on the line of
its own pair. At each place and time, give all points there their mean velocity: the flow of points
through the place stays the same, and with it, everywhere, their density. So points that follow the
mean velocity have the distribution of z_t at every t, and that of the data at t = 1, though each
takes another way (Lipman et al. 2022, 2210.02747).

The network may be asked for v, or for the clean latent x, from which v = (x - z_t) / (1 - t). The
best velocity is the same, and the loss is the squared error of the velocity for both. What differs
is what the network itself has to put out. The channels are correlated: some weighted sums of them,
directions as in PCA, hardly vary, though every channel does. In such a direction x is about 0, its
mean, and z_t is about (1 - t) eps. There the answer for x is 0. The answer for v is
-z_t / (1 - t), about -eps: the network has to copy the noise from its input to its output. Asked
for x, the network may forget that noise; the formula puts z_t back in, outside of it.

A network that is narrower than the 128 channels of a position cannot copy all of the noise; the
demo shows what becomes of it. The paper's networks are six to ten times as wide. They could copy
the noise, but with a gain, -1 / (1 - t), that grows steeply at late times, of which training draws
few. In small experiments (not in this file) we added g z_t to the output, with a learned gain g for
each channel that depends on t: it carries the noise past the network. Then v did as well as x in
narrow networks, and nearly as well in wide ones (assets/experiments.md). Whether copying explains
the paper's figures is open:

    FID (distance to real pictures)      x        v        everything else equal
    JLT-B/1, paper of May 2026           2.56     6.56
    JLT-B/1, revised in September        2.84     6.56
    JLT-L/1, revised in September        1.83     2.12

    python jlt.py --demo                               # see it: digits, a minute or two, no data
    python encode.py imagenet/                         # once: pictures -> a cache, latents/
    python jlt.py --target x                           # the paper's run; --target v is its baseline
    python jlt.py --sample runs/B-1-x --classes 207 360      # or --n 50000, and fid.py scores them
    torchrun --nproc-per-node 8 jlt.py --micro-batch 128 --out runs/eight

(Eight GPUs need at least eight micro-batches in a step, of 1,024 / 8 images. That makes another
run, in another folder.) Interrupted? The same command continues. Other latents will do, too:
`--data` takes a folder of files latents_*.safetensors with `latents` (N, C, H, H), of mean 0 and
standard deviation 1 over all, and `labels` (N,). With `latents_flip`, those of the mirrored
pictures, half of the latents shown are mirrored; without, none.

From top to bottom: the method; why x; the network; settings; data order and noise; training;
sampling; the geometry of a cache; the demo. In encode.py: pictures, the VAE, the cache, and how
mistakes are reported. `require` and `explaining` raise Stop, a ValueError, which the command line
prints as one line; `replacing` writes a file whole or not at all.
"""

import argparse
import copy
import hashlib
import json
import math
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import encode
from encode import Stop, explaining, positive, processes, replacing, require

# =============================================================== the method
# Equation numbers are the paper's. Clean latents x, noise eps, points z on the path between them
# and velocities v are (B, C, H, W); times t and class labels y are (B,). The paper compares the
# targets x and v; a network may also be asked for the noise eps.
TARGETS = ("x", "eps", "v")


def interpolate(x, eps, t):
    """(1) The point z at time t on the straight line from noise (t = 0) to data (t = 1)."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * eps


def true_output(x, eps, target):
    """(2) What the network is asked for."""
    return {"x": x, "eps": eps, "v": x - eps}[target]


def velocity(out, z, t, target, t_eps=0.05):
    """The readout (App. A): the velocity that the network's output means. On the path
    v = x - eps = (x - z) / (1 - t) = (z - eps) / t. A divisor below t_eps (a time, no noise)
    becomes t_eps; target v has no divisor. Raises ValueError for another target."""
    require(target in TARGETS, f"target {target!r} is none of {TARGETS}")
    t = t.view(-1, 1, 1, 1)
    if target == "x":
        return (out - z) / (1 - t).clamp_min(t_eps)
    if target == "eps":
        return (z - out) / t.clamp_min(t_eps)
    return out


def flow_loss(net, x, y, t, eps, target="x", t_eps=0.05, loss="v"):
    """The loss of each image: (B,). A pure function: times t, noise eps and labels y are given.
    `target` says what the network puts out; `loss` says in which of the three the error is taken.

    loss="v", the paper's: the squared error of the velocity, for every target. In terms of the
    network's output it is |v^ - v|^2 for target v, |x^ - x|^2 / max(1 - t, t_eps)^2 for target x,
    and |eps^ - eps|^2 / max(t, t_eps)^2 for target eps, where |.|^2 is a mean over C, H and W.
    loss="x": that error times max(1 - t, t_eps)^2, so that late times weigh less. For target x it
    is |x^ - x|^2, which the revised paper tries, too.
    loss="eps": that error times max(t, t_eps)^2.

    A new network puts out 0, and x has mean 0 and variance 1. So the first loss is 2 for target v,
    the variance of x - eps, and about 3 for target x, the mean of 1 / (1 - t)^2 over the times of
    training (--logit-t). Raises ValueError for another target or loss."""
    require(loss in TARGETS, f"loss {loss!r} is none of {TARGETS}")
    z = interpolate(x, eps, t)
    v_hat = velocity(net(z, t, y), z, t, target, t_eps)
    # The true output goes through the same readout, with the same floor: where 1 - t < t_eps, a
    # perfect x^ has a velocity of (x - z) / t_eps, not x - eps, and should still have no loss.
    v = velocity(true_output(x, eps, target), z, t, target, t_eps)
    error = (v_hat - v).square().mean((1, 2, 3))  # (B,)
    factor = {"v": 1, "x": (1 - t).clamp_min(t_eps), "eps": t.clamp_min(t_eps)}[loss]
    return error * factor**2


@torch.no_grad()
def sample(
    net, y, noise, target="x", steps=50, cfg=2.9, interval=(0.1, 1.0), method="heun", t_eps=0.05
):
    """Follows dz/dt = v from noise (B, C, H, W) at t = 0 to latents at t = 1, for classes y (B,).

    Classifier-free guidance makes pictures clearer and truer to their class, and less varied. The
    network has also learned to do without a class. What the class changes in the velocity is
    multiplied by the weight `cfg` while low < t < high (low = 0 includes t = 0), and by 1 at other
    times: amid strong noise guidance only costs variety (Kynkaanniemi et al. 2024, 2404.07724).

    50 steps take 99 velocities: Heun's method needs two in a step, and one in the last. With the
    interval (0.1, 1), 88 of them (t = 6/50 to 49/50, twice each) are guided and need a second call
    of the network: 187 calls.
    Raises ValueError for another method or target."""
    require(method in ("heun", "euler"), f"method {method!r} is none of ('heun', 'euler')")
    low, high = interval
    no_class = torch.full_like(y, net.num_classes)  # the label after the last class

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
        # Euler step.
        v = guided_velocity(z, t)
        z_next = z + (t_next - t) * v

        # Second-order correction (Heun): take the mean of this velocity and of that at the end of
        # the step. The last step has none: it ends at t = 1, where no network was trained.
        if method == "heun" and i < steps - 1:
            v_next = guided_velocity(z_next, t_next)
            z_next = z + (t_next - t) * (v + v_next) / 2
        z = z_next
    return z


# =============================================================== why x
# Section 3.2 and App. B of the paper. Suppose that positions are Gaussian, x ~ N(0, diag(lam)), of
# variance lam in each direction. Then z has the variance V = t^2 lam + (1 - t)^2, and everything is
# known in closed form:
#
#     E[x|z] = t lam z / V                  Var(x|z)   = lam (1 - t)^2 / V
#     E[v|z] = (t lam - (1 - t)) z / V      Var(v|z)   = lam / V
#                                           Var(eps|z) = t^2 lam / V
#
# The variances that remain (the risks) are the smallest errors that any network can reach.
# Converted to errors of the velocity they are equal: Var(v|z) = Var(x|z) / (1 - t)^2. So targets do
# not differ in what can be known. They differ in what has to come out of the network. Where lam is
# small, E[x|z] is about 0, and E[v|z] is about -z / (1 - t), as large as the noise. The target x
# has the covariance diag(lam), the target v diag(lam) + I: the noise lifts every direction of v by
# 1, and a network has to serve the weak directions as well as the strong ones.


def gaussian_risk(lam, t):
    """(5)-(6) The variances left in x, eps and v once z is known: the least possible mean squared
    errors, averaged over directions. R_v is R_x / (1 - t)^2.
    -> {"x": R_x, "eps": R_eps, "v": R_v}"""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    variance_z = t**2 * lam + (1 - t) ** 2
    risk_v = lam / variance_z
    risks = {"x": (1 - t) ** 2 * risk_v, "eps": t**2 * risk_v, "v": risk_v}
    return {target: risk.mean().item() for target, risk in risks.items()}


def gaussian_gain(lam, t):
    """(3)-(4) E[x|z] / z and E[v|z] / z in a direction of variance lam: how much of z the best
    answer hands on. For small lam the answer for x goes to 0, and that for v to -z / (1 - t)."""
    variance_z = t**2 * lam + (1 - t) ** 2
    return t * lam / variance_z, (t * lam - (1 - t)) / variance_z


# =============================================================== the network
# The transformer of JiT (arXiv 2511.13720) with the module names of DiT (Peebles & Xie 2022), so
# that the weights published with the paper load by name. A latent (B, C, H, W) is cut into N
# patches of p x p positions, each of which becomes a token of D channels. Blocks of attention and
# MLP work on the tokens h (B, N, D). Time and class act on every block through scale, shift and
# gate (adaLN). The last layer turns each token into its patch of the output.
#
# Under autocast, matrix products and tokens are bfloat16, the weights float32. Shapes at the end of
# a line are those of what the line computes.


class RMSNorm(nn.Module):
    """h / rms(h) * weight, computed in float32 and returned in the precision of h. (Cast by hand:
    what autocast does to F.rms_norm changed between torch 2.11 and 2.12.)"""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h):
        return F.rms_norm(h.float(), self.weight.shape, self.weight, eps=1e-6).to(h.dtype)


def modulate(h, shift, scale):
    """How time and class act on the tokens: h (B, N, D), shift and scale (B, D)."""
    return h * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """Latent (B, C, H, W) -> tokens (B, N, D), row by row."""

    def __init__(self, in_channels, patch_size, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, z):
        h = self.proj(z)  # (B, D, H/p, W/p)
        # Contiguous once, here: transposed tokens would make every norm in every block a strided
        # pass over memory.
        return h.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D). The sinusoids are of t itself, as in JiT, whose angles stay below
    1 radian; DiT's are of 1000 t."""

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


def rope_tables(side, head_dim):
    """cos and sin (N, head_dim/2) for the rotary position embedding of side x side tokens: the
    first half of a head's channel pairs turns with the row, the second half with the column."""
    frequencies = 10000 ** (-torch.arange(head_dim // 4) / (head_dim // 4))
    turns = torch.arange(side)[:, None] * frequencies  # (side, head_dim/4)
    rows = turns.repeat_interleave(side, 0)  # (N, head_dim/4)
    columns = turns.repeat(side, 1)
    angles = torch.cat([rows, columns], -1)  # (N, head_dim/2)
    return angles.cos(), angles.sin()


def rotate(q, cos, sin, dtype):
    """Turns each pair of neighbouring channels of q (B, N, heads, head_dim) by its angle."""
    a, b = q.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, heads, head_dim/2) each
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

    def forward(self, h, cos, sin):
        # (B, N, heads, head_dim) each. They stay in this order until they have been turned:
        # transposing them here would cost copies of queries, keys and attention's output.
        q, k, value = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # A norm returns the type it is given: queries and keys stay float32 until they have been
        # turned, and are rounded once.
        q = rotate(self.q_norm(q.float()), cos, sin, value.dtype).transpose(1, 2)
        k = rotate(self.k_norm(k.float()), cos, sin, value.dtype).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, value.transpose(1, 2))  # (B, heads, N, head_dim)
        return self.proj(h.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """The MLP of each block: one half of the hidden channels gates the other."""

    def __init__(self, dim):
        super().__init__()
        # Three matrices of this width cost what two of 4 * dim would. w12 holds two of them.
        hidden = int(4 * dim * 2 / 3)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, h):
        a, b = self.w12(h).chunk(2, -1)  # (B, N, hidden) each
        return self.w3(F.silu(a) * b)


class Block(nn.Module):
    """Attention and MLP. The conditioning c (time and class) sets scale and shift after each norm
    and a gate on each branch (DiT's adaLN-Zero)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c, cos, sin):
        modulation = self.adaLN_modulation(c).chunk(6, -1)  # (B, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        branch = self.attn(modulate(self.norm1(h), shift_msa, scale_msa), cos, sin)
        h = h + gate_msa[:, None] * branch  # (B, N, D)
        branch = self.mlp(modulate(self.norm2(h), shift_mlp, scale_mlp))
        return h + gate_mlp[:, None] * branch  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) -> (B, N, p*p*C), with an adaLN of its own."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class JLT(nn.Module):
    """Noisy latent z (B, C, H, W), time t (B,), class y (B,) -> (B, C, H, W), a prediction of x,
    eps or v: the network itself does not know which. The defaults are JLT-B/1: 130,508,672
    parameters, 46.09 GFLOP an image. Raises ValueError for sizes that do not fit."""

    def __init__(
        self,
        input_size=16,
        patch_size=1,
        in_channels=128,
        hidden_size=768,
        depth=12,
        num_heads=12,
        num_classes=1000,
    ):
        super().__init__()
        message = f"--patch-size {patch_size}: does not divide latents of {input_size}"
        require(input_size % patch_size == 0, message)
        # RoPE turns pairs of channels, half of them by row and half by column.
        message = f"--hidden-size {hidden_size}: is no multiple of 4 for each of {num_heads} heads"
        require(hidden_size % (4 * num_heads) == 0, message)
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
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
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # Blocks start as the identity, and the output as 0.
        nn.init.zeros_(self.final_layer.linear.weight)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)

    def forward(self, z, t, y):
        h = self.x_embedder(z)  # (B, N, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c, self.rope_cos, self.rope_sin)  # (B, N, D)
        h = self.final_layer(h, c)  # (B, N, p*p*C)
        return self.unpatchify(h)  # (B, C, H, W)

    def unpatchify(self, h):
        """Tokens (B, N, p*p*C) -> (B, C, H, W)."""
        p = self.patch_size
        n = self.input_size // p
        h = h.unflatten(1, (n, n)).unflatten(3, (p, p, -1))  # (B, row, column, p, p, C)
        h = h.permute(0, 5, 1, 3, 2, 4)  # (B, C, row, p, column, p)
        return h.flatten(4, 5).flatten(2, 3)


# =============================================================== settings
# Every setting is a flag of the command line. The defaults are the paper's run of JLT-B/1 on
# ImageNet (section 4.1): 250,000 steps of 1,024 images.

# What a model's name stands for, where it differs from B/1. B, L and H have 131, 458 and 951
# million parameters; their micro-batches fit a GPU of 80 GB.
MODELS = {
    "B/1": {},
    "B/2": {"patch_size": 2},
    "L/1": {"depth": 24, "hidden_size": 1024, "micro_batch": 128},
    "H/1": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "micro_batch": 64},
    # For a laptop and some hundred photographs, with settings to match.
    "nano": {
        "depth": 4,
        "hidden_size": 256,
        "batch": 32,
        "lr": 3e-4,
        "warmup_epochs": 1.0,
        "ema": 0.99,
        "steps": 2000,
        "save_every": 100,
        "sample_every": 500,
    },
}


def mode_flags():
    """What to do, if not to train. (DEMO stands at the end of this file.)"""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="x against v on drawn digits")
    add("--sample", metavar="NAME", help="from a run folder, a checkpoint, or a hub repository")
    add(
        "--geometry",
        nargs="?",
        const=DEMO["data"],
        metavar="LATENTS",
        help="spectra of a cache; without one, of the drawn digits",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--classes", nargs="+", metavar="CLASS", help="--sample: a picture of each; names, numbers")
    add("--n", type=positive, help="--sample: a folder of N pictures; the classes take turns")
    return parser


def fixed_flags():
    """The settings that a run keeps when it is continued: they decide what it learns."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("what is learned (a run keeps these)").add_argument
    add("--target", default="x", choices=TARGETS, help="what the network predicts (%(default)s)")
    add("--loss", default="v", choices=TARGETS, help="take the error in x, eps or v (%(default)s)")
    # In training 1 - t is rarely below the floor. In the last steps of sampling it is, and the
    # velocity comes out too small: 50 steps with a perfect x^ stop 1.7% of the way from eps to x
    # before the end.
    add("--t-eps", default=0.05, type=float, help="floor of the divisors 1 - t, t (%(default)s)")
    # Most times are below 1/2, where z_t does not tell yet which picture it becomes; 7% are above
    # 0.6.
    add(
        "--logit-t",
        default=[-0.8, 0.8],
        nargs=2,
        type=float,
        metavar=("MEAN", "STD"),
        help="t is the sigmoid of a normal number; its mean and deviation (%(default)s)",
    )
    # Guidance needs a network that can also do without a class.
    add("--label-drop", default=0.1, type=float, help="share of labels left out (%(default)s)")
    add("--model", default="B/1", choices=MODELS, help="size/patch size (%(default)s)")
    add("--depth", default=12, type=positive, help="blocks (%(default)s)")
    add("--hidden-size", default=768, type=positive, help="width of a token (%(default)s)")
    # Attention kernels are made for heads of 64 channels.
    add("--num-heads", type=positive, help="attention heads (one for each 64 of the width)")
    # At 1, a latent of 16 x 16 makes 256 tokens; at 2 it makes 64, each of four positions.
    add("--patch-size", default=1, type=positive, help="side of a patch, positions (%(default)s)")
    add("--batch", default=1024, type=positive, help="images in a step, all GPUs (%(default)s)")
    # A step adds up the gradients of batch / micro_batch micro-batches, so that memory depends on
    # the micro-batch alone. GPUs share the micro-batches: eight GPUs need at least eight. A run
    # keeps its micro-batch, since noise is drawn by micro-batch.
    add(
        "--micro-batch",
        default=256,
        type=positive,
        help="most images at a time, also with --n; a divisor of the batch (%(default)s)",
    )
    # The rate is proportional to the batch, as in JiT: 2e-4 at 1,024.
    add("--lr", type=float, help="learning rate (5e-5 * batch / 256)")
    add("--warmup-epochs", default=5.0, type=float, help="in which the rate rises (%(default)s)")
    # The paper has none. The demo needs it, to end well after 1,500 steps.
    add(
        "--cooldown", default=0.0, type=float, help="share of steps in which it falls (%(default)s)"
    )
    # Each step's gradient is inexact and shakes the weights. Their average over about the last
    # 1 / (1 - ema) steps does not shake, and samples better. At 0.9999 that is 10,000 steps: a run
    # of some thousand steps needs 0.99 or 0.999.
    add("--ema", default=0.9999, type=float, help="decay of the averaged weights (%(default)s)")
    add("--seed", default=0, type=int, help="of weights, data order and noise (%(default)s)")
    # Positions are computed (RoPE), not learned: weights of 16 x 16 latents fit 8 x 8 and 32 x 32.
    add("--init", metavar="NAME", help="start from a run, a checkpoint or a hub repository")
    # bfloat16 has float32's range: losses need no scaling.
    add("--precision", choices=("bf16", "fp32"), help="of matrix products (bf16 on cuda)")
    return parser


def sampling_flags():
    """How to sample. A checkpoint brings its own as defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("sampling").add_argument
    add("--sample-steps", default=50, type=positive, help="Heun steps (%(default)s)")
    # The paper's for B/1; every model has a best one of its own.
    add("--cfg", default=2.9, type=float, help="weight of guidance; 1: none (%(default)s)")
    add(
        "--interval",
        default=[0.1, 1.0],
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="guidance is on where low < t < high (%(default)s)",
    )
    # Another decoder of the same latents may make the pictures.
    add("--vae", help="hub repository or folder of the decoder (that of the latents)")
    return parser


def free_flags():
    """These and the sampling flags may change when a run is continued. With a cooldown, --steps
    may not."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("length, files and machine (free)").add_argument
    add("--steps", default=250_000, type=positive, help="to train; 200 epochs (%(default)s)")
    add("--data", default="latents", help="folder that encode.py wrote (%(default)s)")
    add("--out", help="folder of the run; with --sample, of the samples, or the picture")
    # Printing a line makes the host wait for the GPU once.
    add("--log-every", default=100, type=positive, help="steps between lines (%(default)s)")
    # A kill costs the steps since the last checkpoint: at step 1,234, the last 234.
    add("--save-every", default=1000, type=positive, help="between checkpoints (%(default)s)")
    add("--sample-every", default=10_000, type=int, help="between pictures; 0: no (%(default)s)")
    # Two workers read 18,000 latents a second where a GPU needs 3,000; four are for slow disks.
    add("--workers", default=4, type=int, help="processes that read latents (%(default)s)")
    add("--device", default="", help="cuda, mps or cpu (the best there is)")
    return parser


# Names and default values.
FIXED = vars(fixed_flags().parse_args([]))
SAMPLING = vars(sampling_flags().parse_args([]))
# What a checkpoint decides, also for those who sample from it or start from it.
NETWORK = ("target", "depth", "hidden_size", "num_heads", "patch_size")


def read_flags(arguments=None):
    """-> the settings (a Namespace, called `config` from here on) and the Trained that --sample or
    --init names, or None. Defaults lie in layers: the paper's; over them those of the model's name;
    then those of the demo or of the checkpoint; and over all of them the command line."""
    groups = [mode_flags(), fixed_flags(), sampling_flags(), free_flags()]
    parser = encode.make_parser(__doc__, groups)
    # Parsed twice: first only to learn the model's name and what to do; then again with what these
    # bring as defaults, which the flags override.
    first = parser.parse_args(arguments)
    asked = bool(first.classes or first.n)
    message = "--sample NAME goes with --classes 207 360 ... or with --n 50000, and they with it"
    require(asked == bool(first.sample), message)
    name = f"{first.model.replace('/', '-')}-{first.target}"
    if first.init:
        name = f"{Path(first.init).name}-init"
    folder = Path(first.out or f"runs/{name}")
    parser.set_defaults(**MODELS[first.model], out="samples" if first.sample else str(folder))
    trained = None
    if first.demo:
        parser.set_defaults(**DEMO)
    elif first.sample:
        trained = load_network(find_checkpoint(first.sample))
        parser.set_defaults(**trained.settings)
    elif first.init:
        # A run that is continued reads these from its own settings.json.
        known = FIXED | encode.read_settings(folder)
        if not (folder / "ckpt.pt").exists():
            trained = load_network(find_checkpoint(first.init))
            known = trained.settings
        parser.set_defaults(**{name: known[name] for name in (*NETWORK, "t_eps")})
    config = parser.parse_args(arguments)

    # What follows from other settings, and from the machine.
    config.device = str(encode.pick_device(config.device))
    config.precision = config.precision or ("bf16" if "cuda" in config.device else "fp32")
    config.lr = config.lr or 5e-5 * config.batch / 256
    config.num_heads = config.num_heads or max(1, config.hidden_size // 64)
    fitting = [n for n in range(1, config.micro_batch + 1) if config.batch % n == 0]
    config.micro_batch = fitting[-1]
    if trained:
        others = [name for name in NETWORK if getattr(config, name) != trained.settings[name]]
        require(not others, f"the checkpoint decides {', '.join(others)}; leave the flag out")
    return config, trained


def autocast(config):
    """bfloat16 matrix products over float32 weights; for fp32 it does nothing."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


# =============================================================== data order and noise
# Everything random is a function of the seed and of integers that follow from the step: epoch,
# step, micro-batch. So a checkpoint needs no state of a random generator or a data loader: with
# weights, average, optimizer and step, a run goes on as if it had never been interrupted. And
# whichever process computes a micro-batch, it is the same one: another number of processes only
# adds the gradients in another order. (Another kind of device draws other numbers from the same
# seed.)
ORDER, FLIPS, NOISE, SAMPLES = range(4)  # streams of random numbers


def rng(stream, *key, device="cpu"):
    """A random generator that is a function of integers."""
    # The length of the key goes in, too: SeedSequence takes (1,) and (1, 0) for the same.
    sequence = np.random.SeedSequence((stream, len(key), *key))
    seed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


@lru_cache(2)  # a micro-batch may lie across two epochs
def epoch_order(n, seed, epoch):
    """The order in which an epoch shows n images."""
    return torch.randperm(n, generator=rng(ORDER, seed, epoch))


def picks(n, config, step, m):
    """-> the (index, flip) pairs of micro-batch m of a step, of n images. An epoch shows every
    image once. `flip`, half the time, asks for the latent of the mirrored picture, which a cache
    holds, too."""
    first = step * config.batch + m * config.micro_batch
    shown = range(first, first + config.micro_batch)
    indices = [int(epoch_order(n, config.seed, k // n)[k % n]) for k in shown]
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
    """Item (index, flip), one of those picks: a latent (C, H, W) in the precision of the file, and
    its label."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, pick):
        index, flip = pick
        return self.data.read(index, flip), self.data.labels[index]


def micro_batches(data, config, start=0):
    """-> iterator over x (B, C, H, W) and y (B,) of this process's micro-batches, which workers
    read ahead."""
    loader = DataLoader(
        PickedLatents(data),
        batch_sampler=reading_order(len(data), config, start),
        num_workers=min(config.workers, encode.cores()),
        pin_memory="cuda" in config.device,
        worker_init_fn=encode.ignore_interrupts,
    )
    return iter(loader)


def draws(config, step, m, x, y, num_classes):
    """Times t (B,), noise eps (B, C, H, W) and labels after dropout (B,) of a micro-batch: the same
    for every target. This is the place for another law of t. The three share one stream of random
    numbers, in this order: a law that takes B normal numbers, as this one, leaves eps as it is."""
    generator = rng(NOISE, config.seed, step, m, device=x.device)
    mean, std = config.logit_t
    t = torch.sigmoid(torch.randn(len(x), generator=generator, device=x.device) * std + mean)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    dropped = torch.rand(len(x), generator=generator, device=x.device) < config.label_drop
    return t, eps, torch.where(dropped, num_classes, y)


# =============================================================== training
# A step adds up the gradients of its micro-batches. Under torchrun each process takes its own
# micro-batches of the step. The sum over the processes is what one process would have added up, and
# all processes make the same update. The host waits for the GPU only where a line is printed:
# losses and norms stay on the device until then.


@dataclass
class Run:
    """A training run: its settings and data, and what changes from step to step. Its folder holds
    settings.json, ckpt.pt, ema.safetensors, log.jsonl and pictures."""

    config: argparse.Namespace
    data: encode.LatentDataset
    net: JLT
    ema: JLT  # the average of the weights over the steps, to sample with
    optimizer: torch.optim.Optimizer
    step: int = 0  # how many are done; the next one's number, as they count from 0
    rows: list = field(default_factory=list)  # what log.jsonl says

    @property
    def folder(self):
        return Path(self.config.out)


def train(config, trained=None):
    """Trains a network by these settings, from new weights or those of a Trained, or continues the
    run in config.out. -> the Run. Raises Stop for a cache, a folder or a checkpoint that does not
    fit, and for a loss that is not finite."""
    run = begin(config, trained)
    loss_fn = flow_loss
    if "cuda" in config.device:
        # For fixed shapes: the compiler takes a minute for each.
        loss_fn = torch.compile(flow_loss, dynamic=False)
    batches = micro_batches(run.data, config, run.step)
    recent = []  # of each step since the last line: times and losses (2, n), and the norm
    started = time.perf_counter()
    while run.step < config.steps:
        lr = learning_rate(config, run.step, len(run.data))
        run.optimizer.param_groups[0]["lr"] = lr
        made = accumulate_gradients(run, loss_fn, batches)
        sum_gradients(run.net)
        norm = update(run.net, run.ema, run.optimizer, config.ema)
        run.step += 1
        recent.append((made, norm))

        # Once in a while: a line, a checkpoint, a picture. The first line comes at once, the
        # second soon. log() goes before the others: it stops the run if a loss is not finite.
        line_due = run.step in (1, 10) or run.step % config.log_every == 0
        save_due = run.step % config.save_every == 0 or run.step == config.steps
        picture_due = config.sample_every and run.step % config.sample_every == 0
        if line_due or save_due or picture_due:
            log(run, recent, lr, started)
            if save_due:
                save_checkpoint(run)
            if picture_due:
                save_picture(run)
            recent = []
            started = time.perf_counter()
    if dist.is_initialized():
        dist.destroy_process_group()
    return run


# ------------------------------------------------------------- how it begins
def begin(config, trained):
    """-> Run, new or continued: opens the data, joins the processes, reads the checkpoint."""
    rank, world = processes()
    data = encode.LatentDataset(config.data)
    count = config.batch // config.micro_batch
    advice = f"{count} processes at most, or for a new run --micro-batch {config.batch // world}"
    require(world <= count, f"{world} processes for {count} micro-batches: take {advice}")
    if world > 1:
        dist.init_process_group("nccl" if "cuda" in config.device else "gloo")
    config.vae = config.vae or data.settings.get("vae", encode.VAE)
    run = build(config, data)
    if trained:
        start_from(run, trained)
    # Writes settings.json, or compares with the one that is there. The folder of another run is
    # not written to, even if its checkpoint is gone.
    encode.refuse_other_settings(run.folder, fixed_settings(run), FIXED)
    if (run.folder / "ckpt.pt").exists():
        resume(run)
    if rank == 0:
        introduce(run, world)
    return run


def build(config, data):
    """-> Run with new weights, the same for every target and on every process."""
    torch.manual_seed(config.seed)
    net = JLT(
        input_size=data.shape[1],
        patch_size=config.patch_size,
        in_channels=data.shape[0],
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=data.num_classes,
    ).to(config.device)
    return Run(
        config=config,
        data=data,
        net=net,
        ema=copy.deepcopy(net).requires_grad_(False),
        # No weight decay; the second moment's memory is short, as in JiT. `fused`: one kernel.
        optimizer=torch.optim.AdamW(
            net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True
        ),
    )


def fixed_settings(run):
    """What must be the same when a run is continued: the fixed flags and the latents, told apart by
    their labels and by what encode.py noted. The cache may move."""
    config = run.config
    settings = {name: getattr(config, name) for name in FIXED}
    if config.cooldown:
        # Then the learning rate depends on where the run ends.
        settings["steps"] = config.steps
    content = run.data.labels.numpy().tobytes() + repr(run.data.settings).encode()
    return settings | {"latents": f"digest {hashlib.sha256(content).hexdigest()[:16]}"}


def load_checkpoint(path):
    """torch.load that runs no code from the file, and maps it instead of reading it whole. The one
    class that it may name is argparse.Namespace, which holds the settings in the paper's
    checkpoint. Raises Stop for a damaged file."""
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with explaining(path, "damaged, or no checkpoint"), allowed:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def resume(run):
    """Goes back to the run's checkpoint."""
    state = load_checkpoint(run.folder / "ckpt.pt")
    run.net.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step = state["step"]
    # The steps after the checkpoint are taken again, and their rows are written again.
    run.rows = state["log"]


def start_from(run, trained):
    """--init: gives the weights and their average the trained ones. Where the classes are others,
    each starts as "no class": then the network answers at first as it does without a class."""
    weights = trained.net.state_dict()
    names = (trained.class_names, run.data.class_names)
    # Where one of them knows no names, the number of classes decides.
    same = names[0] == names[1] or [] in names
    kept = same and run.data.num_classes == trained.net.num_classes
    if not kept:
        table = weights["y_embedder.embedding_table.weight"]
        new = table[-1:].expand(run.data.num_classes + 1, -1)
        weights["y_embedder.embedding_table.weight"] = new
    with explaining(f"--init {run.config.init}", f"does not fit {run.config.data}"):
        run.net.load_state_dict(weights)
    run.ema.load_state_dict(weights)
    if processes()[0] == 0:
        print(f"from {trained.source}; classes are {'kept' if kept else 'new'}", flush=True)


def introduce(run, world):
    """Prints what is trained, on what, and from which step to which."""
    config = run.config
    print(
        f"{run.folder}: predicts {config.target}, {len(run.data):,} latents, batch "
        f"{config.batch // config.micro_batch} x {config.micro_batch} on {world} x "
        f"{config.device}, from step {run.step:,} to {config.steps:,}",
        flush=True,
    )


# ------------------------------------------------------------- one step
def learning_rate(config, step, images):
    """The rate of a step, 0, 1, ..., where an epoch has so many images: it rises in the warm-up,
    stays, and falls over the last share `cooldown` of the steps (the paper: 0; the demo: 1)."""
    warmup = max(1, round(config.warmup_epochs * images / config.batch))
    cooldown = max(1, config.cooldown * config.steps)
    rising = (step + 1) / warmup
    falling = (config.steps - step) / cooldown
    return config.lr * min(1, rising, falling)


def accumulate_gradients(run, loss_fn, batches):
    """Adds up the gradients of this process's micro-batches of the next step; loss_fn is flow_loss,
    or what the compiler made of it. -> times and losses of its images, (2, n)."""
    config = run.config
    count = config.batch // config.micro_batch
    made = []
    for m in own_micro_batches(config):
        x, y = next(batches)
        # float16 on the way to the device, float32 there.
        x = x.to(config.device, non_blocking=True).float()
        y = y.to(config.device, non_blocking=True)
        # Drawn here, and not in the compiled function, where a seed draws other numbers.
        t, eps, y = draws(config, run.step, m, x, y, run.data.num_classes)
        with autocast(config):
            losses = loss_fn(run.net, x, y, t, eps, config.target, config.t_eps, config.loss)
        (losses.mean() / count).backward()
        made.append(torch.stack([t, losses.detach()]))
    return torch.cat(made, 1)


def sum_over_processes(tensor):
    """Turns what each process has into the sum of all, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def sum_gradients(net):
    """Adds up the gradients of all processes, as one vector: one message instead of hundreds.
    (DistributedDataParallel would take means over processes; here three may share eight
    micro-batches.)"""
    if dist.is_initialized():
        gradients = [p.grad for p in net.parameters()]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)


@torch.no_grad()
def update(net, ema, optimizer, decay):
    """Clips the gradient to norm 1, takes AdamW's step, then averages the weights. -> the norm
    before clipping, a tensor that is not waited for."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    # average += (1 - decay) * (weight - average), for all of them at once.
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm


# ------------------------------------------------------------- once in a while
def log(run, recent, lr, started):
    """Prints loss, norm and speed of the recent steps, and adds them to log.jsonl. All processes
    call this. Here the host waits for the GPU. Raises Stop for a loss that is not finite."""
    t, losses = torch.cat([made for made, _ in recent], 1)  # of this process's images
    step_losses = torch.stack([made[1].sum() for made, _ in recent]) / run.config.batch
    norms = torch.stack([norm for _, norm in recent])
    # Ten bins: the loss by t shows at which noise one target is learned better.
    bins = (10 * t).long().clamp(max=9)
    by_time = torch.zeros(2, 10, device=run.config.device)  # sums and counts
    by_time.index_add_(1, bins, torch.stack([losses, torch.ones_like(losses)]))
    # The norm is that of the summed gradient, the same in each process.
    sum_over_processes(step_losses)
    sum_over_processes(by_time)
    check_finite(run, step_losses, norms)
    sums, counts = by_time.tolist()
    row = {
        "step": run.step,
        "loss": step_losses.mean().item(),
        "grad_norm": norms.mean().item(),
        "lr": lr,
        "ms": 1000 * (time.perf_counter() - started) / len(recent),
        "loss_by_t": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
    }
    run.rows.append(row)
    rank, _ = processes()
    if rank == 0:
        show(run.config, **row)
        with replacing(run.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in run.rows))


def check_finite(run, losses, norms):
    """Raises Stop, naming the first bad step (counted from 1): no checkpoint is written after
    it."""
    bad = ~(losses.isfinite() & norms.isfinite())
    if bad.any():
        step = run.step - len(losses) + 1 + bad.tolist().index(True)
        advice = "any checkpoint is from before; a lower --lr in another --out may help"
        raise Stop(f"{run.folder}: loss or gradient of step {step:,} is not finite; {advice}")


def show(config, step, loss, grad_norm, lr, ms, loss_by_t):
    """Prints a row; every ten times log_every steps the loss by t, too."""
    eta = tqdm.format_interval((config.steps - step) * ms / 1000)
    print(
        f"step {step:,}/{config.steps:,} {step / config.steps:.1%} | loss {loss:.4f} | "
        f"grad {grad_norm:.3f} | lr {lr:.2e} | {ms:.0f} ms/step "
        f"{1000 * config.batch / ms:,.0f} images/s | "
        f"eta {eta}",
        flush=True,
    )
    if step % (10 * config.log_every) == 0:
        values = ["-" if value is None else f"{value:.3f}" for value in loss_by_t]
        print("  loss by t, from noise to data:", *values, flush=True)


def save_checkpoint(run):
    """Writes ema.safetensors, the file to share and to sample from: the averaged weights under the
    network's own names, settings and class names in the header. Then ckpt.pt, to continue from."""
    rank, _ = processes()
    if rank:
        return

    def on_host(tensors):
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    about = {
        "config": vars(run.config),
        "classes": run.data.class_names,
        "grid": run.net.input_size,
        "step": run.step,
    }
    ema = on_host(run.ema.state_dict())
    # In this order: a run that is killed between the two continues from the older ckpt.pt, and
    # writes both again.
    with replacing(run.folder / "ema.safetensors") as temporary:
        save_file(ema, temporary, {"jlt": json.dumps(about)})
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {i: on_host(moments) for i, moments in optimizer["state"].items()}
    model = on_host(run.net.state_dict())
    state = about | {"model": model, "ema": ema, "optimizer": optimizer, "log": run.rows}
    with replacing(run.folder / "ckpt.pt") as temporary:
        torch.save(state, temporary)


def save_picture(run):
    """A picture of 16 classes spread over all, from the averaged weights; always the same noise.
    Where the VAE is not to be had, or memory does not suffice, a line says so and training goes
    on."""
    rank, _ = processes()
    if rank:
        return
    labels = torch.linspace(0, run.data.num_classes - 1, 16).long()
    path = run.folder / f"samples_{run.step:07d}.png"
    try:
        latents = generate(run.ema, labels, range(16), run.config)
        images = pictures(load_decoder(run.config, run.ema), latents)
        encode.save_png(path, encode.image_grid(images, columns=8))
    except (Stop, RuntimeError) as error:
        print(f"no picture at step {run.step:,}: {error}", flush=True)


# =============================================================== sampling
# One can sample from three kinds of file: a run's ema.safetensors; its ckpt.pt, four times as
# large; and the checkpoint that the paper's authors published. All are read without running code
# from them. `sample` (at the top) follows the flow, `generate` gives it the noise of numbered
# images, `pictures` decodes; the two commands at the end make one picture of chosen classes, or a
# folder of numbered pictures that any program for FID reads.
FILES = ("ema.safetensors", "ckpt.pt", "checkpoint-last.pth")


@dataclass
class Trained:
    """A network to sample from, and what its file says of it."""

    net: JLT
    settings: dict  # what the network is, and how it is sampled unless a flag says otherwise
    class_names: list
    source: str  # which weights these are


def find_checkpoint(name):
    """A file, a folder that holds one, or a hub repository, from which it is fetched once -> path.
    Raises Stop where there is none."""
    path = Path(name)
    if not path.exists():
        is_repository = name.count("/") == 1 and not path.parent.is_dir()
        require(is_repository, f"{name}: no such run folder or checkpoint")
        from huggingface_hub import snapshot_download

        with explaining(
            name, f"not fetched from the hub; by hand: hf download {name} --local-dir jlt"
        ):
            path = Path(snapshot_download(name, allow_patterns=[FILES[0], FILES[2]]))
    if path.is_dir():
        there = [path / file for file in FILES if (path / file).exists()]
        require(there, f"{path}: holds none of {', '.join(FILES)}")
        path = there[0]
    return path


def load_network(path):
    """-> Trained, from any of the three kinds of file. Raises Stop for anything else."""
    with explaining(path, "holds no JLT"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["jlt"]) | {"ema": load_file(path)}
        else:
            state = load_checkpoint(path)
        if "model_ema1" in state:
            state = translate_published(state)
        # A setting that an older version did not write down has its default.
        config = FIXED | SAMPLING | state["config"]
        net, sizes = network_of(state["ema"], state["grid"])
        return Trained(
            net=net,
            settings=sizes | {name: config[name] for name in ("target", "t_eps", *SAMPLING)},
            class_names=state["classes"],
            source=f"EMA of step {state['step']}, {path.resolve()}",
        )


def translate_published(state):
    """The layout of the paper's checkpoint-last.pth -> that of save_checkpoint. Of its two averages
    the released sampler takes the first."""
    args = state["args"]
    weights = {}
    for name, value in state["model_ema1"].items():
        name = name.removeprefix("module.").removeprefix("net.")
        # The file has a mask_token, which the network does not use.
        if name != "mask_token":
            weights[name] = value.float()
    # A bool in the released code: False is x-prediction, True is v. Older files lack it.
    predicts_v = getattr(args, "flow_matching", False)
    return {
        "config": {
            "target": "v" if predicts_v else "x",
            "t_eps": getattr(args, "t_eps", 0.05),
            "vae": encode.VAE,
        },
        "classes": [],
        "grid": args.img_size // 16,  # the VAE makes one position of 16 x 16 pixels
        "step": f"unknown (epoch {state.get('epoch')})",
        "ema": weights,
    }


def network_of(weights, input_size):
    """-> JLT with these weights (by name), and the sizes that are read from their shapes."""
    stem = weights["x_embedder.proj.weight"]  # (D, C, p, p)
    head_dim = len(weights["blocks.0.attn.q_norm.weight"])
    sizes = {
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "hidden_size": len(stem),
        "num_heads": len(stem) // head_dim,
        "patch_size": stem.shape[2],
    }
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    net = JLT(input_size, in_channels=stem.shape[1], num_classes=num_classes, **sizes)
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False), sizes


# ------------------------------------------------------------- from noise to pictures
def generate(net, labels, numbers, config):
    """Latents (N, C, H, W) of classes `labels` (N,). The noise of image i of `numbers` depends on
    (seed, i) alone: not on the batch, nor on how many processes make the images."""
    shape = (net.in_channels, net.input_size, net.input_size)
    noise = [torch.randn(shape, generator=rng(SAMPLES, config.seed, i)) for i in numbers]
    with autocast(config):
        return sample(
            net,
            labels.to(config.device),
            torch.stack(noise).to(config.device),
            config.target,
            config.sample_steps,
            config.cfg,
            config.interval,
            t_eps=config.t_eps,
        )


def load_decoder(config, net, compiled=False):
    """-> the VAE that decodes what a network makes."""
    vae = encode.load_vae(config.vae, config.device, compiled)
    message = f"--vae {config.vae}: decodes {vae.channels} channels, not {net.in_channels}"
    require(vae.channels == net.in_channels, message)
    return vae


def pictures(vae, latents):
    """-> uint8 (N, 3, H, W) on the CPU."""
    message = "the sampled latents are not finite: damaged weights, or too large a --cfg"
    require(latents.isfinite().all(), message)
    images = [encode.to_uint8(encode.decode(vae, part)).cpu() for part in latents.split(32)]
    return torch.cat(images)


def class_label(word, trained):
    """The name or the number of a class -> its label. A name goes first: a folder called 10 is the
    class "10", whatever its number. Raises Stop for a word that is neither."""

    # Macs write accents as letters of their own.
    names = [unicodedata.normalize("NFC", name) for name in trained.class_names]
    name = unicodedata.normalize("NFC", word)
    if name in names:
        return names.index(name)
    last = trained.net.num_classes - 1
    message = (
        f"--classes {word}: neither a number from 0 to {last} nor one of the names {names[:3]}"
    )
    require(word.isdecimal() and int(word) <= last, message)
    return int(word)


def sampling_settings(config, trained):
    """Everything that decides the samples; say it beside any FID."""
    names = ("target", "t_eps", *SAMPLING, "seed", "precision")
    return {name: getattr(config, name) for name in names} | {"weights": trained.source}


# ------------------------------------------------------------- the commands
def sample_classes(config, trained):
    """--classes: one PNG, the pictures of these classes side by side."""
    rank, _ = processes()
    if rank:
        return
    labels = [class_label(word, trained) for word in config.classes]
    vae = load_decoder(config, trained.net)
    net = trained.net.to(config.device)
    latents = generate(net, torch.tensor(labels), range(len(labels)), config)
    images = pictures(vae, latents)
    path = Path(f"{config.out.removesuffix('.png')}.png")
    encode.save_png(path, encode.image_grid(images, columns=len(labels)))
    names = trained.class_names or [""] * net.num_classes
    shown = ", ".join(f"{label} {names[label]}".strip() for label in labels)
    print(f"wrote {path}: {shown}\n{sampling_settings(config, trained)}")


def sample_folder(config, trained):
    """--n: pictures 000000.png, 000001.png, ... of classes 0, 1, 2, ... in turn, beside a
    settings.json. Pictures that exist are skipped, and processes take batches in turn."""
    rank, world = processes()
    folder = Path(config.out)
    net = trained.net.to(config.device)
    compiled = "cuda" in config.device
    vae = load_decoder(config, net, compiled)
    if compiled:
        net.compile(dynamic=False)
    settings = sampling_settings(config, trained)
    # A folder of other weights' pictures, or of others in any way, is refused.
    encode.refuse_other_settings(folder, settings, FIXED | SAMPLING)

    paths = [folder / f"{i:06d}.png" for i in range(config.n)]
    size = min(config.n, config.micro_batch)
    starts = range(rank * size, config.n, world * size)
    with ThreadPoolExecutor(8) as writers:
        writing = ()
        for start in tqdm(starts, unit="image", unit_scale=size, disable=rank > 0):
            # The whole batch, even if some are there or beyond n: one shape for the compiler.
            numbers = range(start, start + size)
            missing = [i for i in numbers if i < config.n and not paths[i].exists()]
            if not missing:
                continue
            labels = torch.tensor(numbers) % net.num_classes
            images = pictures(vae, generate(net, labels, numbers, config))
            list(writing)  # waits for the batch before, and raises what went wrong there
            files = [paths[i] for i in missing]
            writing = writers.map(encode.save_png, files, images[[i - start for i in missing]])
        list(writing)
    if rank == 0:
        encode.wait_for_files(paths)
        there = len(list(folder.glob("[!.]*.png")))
        print(f"{folder}: holds {there:,} images\n{settings}")


# =============================================================== the geometry of a cache
# Section 3.2 and App. D of the paper: what (3)-(6) say of given latents.


def fractions(lam):
    """-> what fraction of the variance each direction has, (D,)."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return lam / lam.sum()


def effective_rank(lam):
    """How many directions carry the variance: exp of the entropy of its fractions (Roy & Vetterli
    2007). What the paper calls effective rank is the participation ratio below."""
    return torch.special.entr(fractions(lam)).sum().exp().item()


def participation_ratio(lam):
    """(sum lam)^2 / sum lam^2: the same question, with more weight on large directions."""
    return 1 / fractions(lam).square().sum().item()


def directions_for(fraction, lam):
    """How many directions, largest first, hold this fraction of the variance."""
    held = fractions(lam).sort(descending=True).values.cumsum(0)
    return int((held < fraction).sum()) + 1


def positions(latents):
    """Latents (B, C, H, W) -> (B * H * W, C), row by row."""
    return latents.movedim(1, -1).flatten(0, 2)


def spectrum(data):
    """-> eigenvalues (C,) of the covariance of a cache's positions, descending."""
    from fid import Statistics  # here, since only this and the demo need fid.py

    statistics = Statistics(data.shape[0])
    for latents, _ in tqdm(DataLoader(data, batch_size=64), unit="x 64 latents"):
        statistics.update(positions(latents))
    lam = torch.linalg.eigvalsh(torch.from_numpy(statistics.cov))
    # Rounding may leave an eigenvalue of 0 below it.
    return lam.flip(0).clamp(min=0)


def geometry(config):
    """--geometry: the spectrum of a cache's positions, and what (3)-(6) make of it: two tables."""
    if config.geometry == DEMO["data"]:
        encode.cache_digits(config.geometry)
    lam = spectrum(encode.LatentDataset(config.geometry))
    print(f"{config.geometry}: {len(lam)} channels, variances {lam[0]:.4g} to {lam[-1]:.3g}")
    print("\n        effective   participation      directions for")
    print("target       rank           ratio   90% of the variance")
    # x and eps are independent, so that v = x - eps has the sum of their variances.
    for target, variances in {"x": lam, "eps": torch.ones_like(lam), "v": lam + 1}.items():
        rank = effective_rank(variances)
        ratio = participation_ratio(variances)
        print(f"{target:6} {rank:10.1f} {ratio:15.1f} {directions_for(0.9, variances):21}")
    print("(effective rank: exp of the entropy; the paper's is the participation ratio)")

    print("\n   t      R_x    R_eps      R_v  gain of x     of v")
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        values = (*gaussian_risk(lam, t).values(), *gaussian_gain(lam[-1], t))
        print(f"{t:4.1f}", *(f"{value:8.4f}" for value in values))
    print("(R: least error per dimension, (5)-(6); gain: E[target|z] / z in the last direction)")


# =============================================================== the demo
# The method on a toy: 10,000 drawn digits of 32 x 32 pixels. A linear codec turns each
# into 2 x 2 positions of 128 channels (encode.py draws and encodes them). Two networks are trained,
# one for x and one for v, alike in everything else. Both make digits from the same noise, and a
# judge compares their digits with real ones.
DEMO = {
    # The width is below the 128 channels of a position: the network cannot hand on all of them.
    # README says what happens in wider ones.
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
    "interval": [0.0, 1.0],
    "sample_every": 0,
    "log_every": 250,
    "workers": 0,
    "device": "cpu",  # nothing to compile, and the same digits everywhere
    "data": "runs/digits",
    "out": "runs/demo",
}


def digit_judge(images, labels, steps=250):
    """The demo's Inception: a classifier, trained in seconds on digits uint8 (N, 3, 32, 32). It
    takes images (B, 3, 32, 32) in [-1, 1] and gives logits (B, 10)."""

    torch.manual_seed(0)
    layers = []
    for c_in, c_out in ((3, 16), (16, 32), (32, 64)):  # each about halves the size
        layers.append(nn.Conv2d(c_in, c_out, 3, stride=2, bias=False))
        layers += [nn.BatchNorm2d(c_out, eps=1e-3), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10)]
    net = nn.Sequential(*layers)
    order = torch.randint(len(images), (steps, 128))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for batch in order:
        logits = net(encode.to_float(images[batch]))
        F.cross_entropy(logits, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def digit_statistics(judge, images):
    """-> mean and covariance of the features of digits uint8 (N, 3, 32, 32): the judge's last
    layer but one."""
    features = judge[:-1](encode.to_float(images)).double()  # (N, 64)
    return features.mean(0), features.T.cov()


def low_variance(latents):
    """-> variance in the 64 of 128 directions where digits have least. The codec is a PCA, scaled
    as a whole: its channels are the directions, sorted by variance."""
    return positions(latents)[:, 64:].var(0).sum()


def demo(config):
    """--demo: the same network, loss, loop and sampler on drawn digits, for x and for v, from the
    same weights, data order and noise. Prints a table and makes a picture. Run again, it goes on
    with the networks that are there."""
    from fid import frechet_distance

    # Matrices this small gain little from a second thread, and beside another program two threads
    # spend their time waiting for each other: 25 times slower was measured.
    torch.set_num_threads(1)
    print("drawing digits ...", flush=True)
    encode.cache_digits(config.data)
    codec = encode.load_vae(f"{config.data}/codec.safetensors")
    n = 2000
    # One half is the reference. The other is scored as samples are: a perfect sampler would score
    # about as well.
    images, labels = encode.draw_digits(2 * n, seed=3)
    labels = labels[:n]  # of both halves: digit i is of class i % 10
    real_latents = encode.encode(codec, encode.to_float(images[n:]))
    print("training the judge, a small classifier of digits ...", flush=True)
    judge = digit_judge(*encode.draw_digits(2 * n, seed=2))
    reference = digit_statistics(judge, images[:n])

    # Of each row of the table: pictures, latents, loss.
    rows = {"real": (images[n:], real_latents, "")}
    for target in ("x", "v"):
        own = {"target": target, "out": f"{config.out}/{target}"}
        run = train(argparse.Namespace(**(vars(config) | own)))
        print(f"sampling and scoring {n:,} digits ...", flush=True)
        latents = generate(run.ema, labels, range(n), run.config).cpu()
        loss = f"{run.rows[-1]['loss']:.3f}"
        rows[f"predicts {target}"] = (pictures(codec, latents), latents, loss)

    print("\n               loss   digit features   low directions   read right")
    for name, (digits, latents, loss) in rows.items():
        distance = frechet_distance(*digit_statistics(judge, digits), *reference)
        variance = low_variance(latents) / low_variance(real_latents)
        right = (judge(encode.to_float(digits)).argmax(1) == labels).float().mean()
        print(f"{name:12} {loss:>6} {distance:16.1f} {variance:16.2f} {right:12.1%}")
    path = Path(config.out) / "demo.png"
    encode.save_png(path, encode.labelled_rows({name: row[0][:20] for name, row in rows.items()}))
    print(f"""
loss: in training, over the last {config.log_every} steps.
digit features: how far the samples are from held-out digits, as Frechet distance in the judge's
  last layer but one; lower is better. A perfect sampler has about what "real" has, other digits.
low directions: variance in those 64 of 128 directions where real digits have least, relative to
  theirs.
read right: how many the judge reads as the digit that was asked for.

{path}: two rows each of {", ".join(rows)}.""")


def main():
    config, trained = read_flags()
    if config.demo:
        demo(config)
    elif config.geometry:
        geometry(config)
    elif config.classes:
        sample_classes(config, trained)
    elif config.n:
        sample_folder(config, trained)
    else:
        train(config, trained)


if __name__ == "__main__":
    encode.run_command(main)
