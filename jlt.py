"""JLT: clean-latent prediction in latent diffusion transformers (arXiv 2605.27102), in one file.

A generative model turns noise into data. Here the data are latents: a frozen autoencoder, the VAE
of FLUX.2, turns a picture of 256 x 256 pixels into 16 x 16 positions with 128 channels, and back.
Each channel has about mean 0 and standard deviation 1. A transformer takes each position as one
token.

A straight path leads from noise to each latent:

    z_t = t x + (1 - t) eps     t = 0: noise, eps ~ N(0, I);   t = 1: the latent x
    v = dz/dt = x - eps         the velocity along the path

A network is trained to tell the velocity from z_t, t and the class. It cannot: for every latent x
there is a noise eps whose path passes through z_t at time t. With squared error it learns the mean
of all the velocities there, E[v | z_t], and this mean is all that sampling needs. Imagine the
points of all paths as a fluid. Its density at a place changes only by what flows in and out, and
this flow is density times mean velocity. So if every point moves with the mean velocity of its
place, and not with its own, it ends elsewhere; but the start is the same, and so is the flow, and
therefore the density at every time: that of noise at t = 0, that of latents at t = 1. (Lipman et
al. 2022, arXiv 2210.02747. It is not the average picture that comes out: at t = 0 the mean points
there, but it is taken anew at each place on the way, as ever fewer latents are likely.)

What should the network put out? Most systems of this kind ask for v. JLT asks for x, and computes
the velocity from it: v = (x - z_t) / (1 - t). The best velocity is the same, and both are trained
with the same loss, the squared error of the velocity. What differs is the work of the network. The
channels of a latent are correlated: there are combinations of channels that hardly vary, the last
directions of a PCA. In such a direction x is about 0, and z_t is about (1 - t) eps, nothing but
noise. Asked for x, the network answers 0 and may forget the noise: the formula takes it from z_t.
Asked for v, it answers -z_t / (1 - t), about -eps: it has to carry the noise from its input to its
output.

The paper trains both, it says with everything else equal. FID-50K on ImageNet 256 x 256, the
distance of 50,000 guided samples from real pictures; lower is better:

                                                       x       v
    B/1, 131 million parameters, paper of May 2026     2.56    6.56
    B/1, revision of September 2026                    2.84    6.56
    L/1, 458 million parameters, revision              1.83    2.12

Is the noise the reason? Where the network is narrower than a position, and cannot carry all of it:
yes, as the demo shows (width 64, 128 channels). B/1 and L/1 are 768 and 1,024 wide, and could carry
it. Why x is ahead there is not known; assets/experiments.md tells what we tried.

    python jlt.py --demo                               # see it: digits, a minute or two, no data
    python encode.py imagenet/                         # once: pictures -> a cache, latents/
    python jlt.py --target x                           # the paper's run; --target v is its baseline
    python jlt.py --sample runs/B-1-x --classes 207 360      # or --n 50000, and fid.py scores them

    torchrun --nproc-per-node 8 -- jlt.py --target x   # on eight GPUs

Interrupted? The same command continues. Latents of another autoencoder: see encode.py's
LatentDataset.

Part one of this file is the paper: the method, why x, the network, training. Read it from top to
bottom, and stop at part two if you like: that is what surrounds the method when it is run, namely
settings, the order of the data, a run's folder, checkpoints, commands, and the demo.
"""

import argparse
import copy
import json
import math
import time
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
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from tqdm import tqdm

import encode
from encode import Stop, natural, positive, processes, replacing, require, stop_on_error  # part two

# #################################################################
# Part one: the paper
# #################################################################

# =============================================================== the method
# Latents x, noise eps, points z on the path between them and velocities v are (B, C, H, W); times t
# and class labels y are (B,). Numbers in parentheses are the paper's equations. The target is what
# the network puts out: the paper compares x and v; the noise eps is the third possibility.
# `require(condition, message)` raises Stop, a ValueError, unless the condition holds.
TARGETS = ("x", "eps", "v")


def interpolate(x, eps, t):
    """(1) The point z at time t on the straight line from noise (t = 0) to data (t = 1)."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * eps


def true_output(x, eps, target):
    """(2) What the network is asked for."""
    return {"x": x, "eps": eps, "v": x - eps}[target]


def velocity(out, z, t, target, t_eps=0.05):
    """The readout (App. A): from the network's output to the velocity. On the path
    v = x - eps = (x - z) / (1 - t) = (z - eps) / t. The divisors 1 - t and t have a floor, t_eps,
    which has nothing to do with the noise eps; target v has no divisor."""
    require(target in TARGETS, f"target {target!r} is none of {TARGETS}")
    t = t.view(-1, 1, 1, 1)
    if target == "x":
        return (out - z) / (1 - t).clamp_min(t_eps)
    if target == "eps":
        return (z - out) / t.clamp_min(t_eps)
    return out


def flow_loss(net, x, y, t, eps, target="x", t_eps=0.05, loss="v"):
    """The loss of each image: (B,). A pure function: times t, noise eps and labels y are given.

    `target` says what the network puts out, and `loss` in what the error is measured. The paper's
    is loss="v" for every target: the squared error of the velocity, a mean over C, H and W. For
    target x this is |x^ - x|^2 / (1 - t)^2, an error of x that counts 100 times as much at t = 0.9
    as at t = 0, and 400 times at 0.95 and later, where t_eps takes over. loss="x" is the error of x
    itself, |x^ - x|^2, which the revised paper also tries; loss="eps" is that of eps. (Where the
    floor acts, these are exact only if loss and target are the same.)

    A new network puts out 0. So with loss="v" the first loss is 2 for target v, the variance of
    x - eps, and about 3 for target x, the mean of 1 / (1 - t)^2 over the times of training."""
    require(loss in TARGETS, f"loss {loss!r} is none of {TARGETS}")
    z = interpolate(x, eps, t)
    v_hat = velocity(net(z, t, y), z, t, target, t_eps)
    # The true output goes through the same readout, with the same floor: where 1 - t < t_eps, a
    # perfect x^ has a velocity of (x - z) / t_eps, not x - eps, and should still have no loss.
    v = velocity(true_output(x, eps, target), z, t, target, t_eps)
    error = (v_hat - v).square().mean((1, 2, 3))  # (B,)
    # x^ - x = (1 - t) (v^ - v), and eps^ - eps = -t (v^ - v), with the floor of the readout.
    factor = {"v": 1, "x": (1 - t).clamp_min(t_eps), "eps": t.clamp_min(t_eps)}[loss]
    return error * factor**2


@torch.no_grad()
def sample(net, y, noise, target="x", steps=50, cfg=2.9, interval=(0.1, 1.0), t_eps=0.05):
    """Follows dz/dt = v from noise (B, C, H, W) at t = 0 to latents at t = 1, for classes y (B,).

    Classifier-free guidance makes pictures clearer and truer to their class, and less varied.
    Training hides the class of one image in ten, so that there is a velocity without a class, too.
    The difference that the class makes is multiplied by the weight `cfg` while low < t < high (and
    at t = 0, too, if low is 0). At other times it counts once: amid strong noise guidance only
    costs variety (Kynkaanniemi et al. 2024, 2404.07724). The defaults are the paper's for B/1.

    Heun's method needs two velocities in a step, and here one in the last: 99 for 50 steps. With
    the interval (0.1, 1), 88 of them are guided and need a second call of the network: 187 calls.
    (Two at each of the 44 times 6/50 to 49/50: the end of one step, and the start of the next.)"""
    low, high = interval
    no_class = torch.full_like(y, net.num_classes)  # the label after the last class

    def network_velocity(z, t, classes):
        times = torch.full((len(z),), t, device=z.device, dtype=z.dtype)
        # Under autocast the output is bfloat16; z and all sums stay float32, as the noise is.
        return velocity(net(z, times, classes), z, times, target, t_eps).to(z.dtype)

    def guided_velocity(z, t):
        v = network_velocity(z, t, y)
        if cfg == 1 or t >= high or (t <= low and low > 0):
            return v  # at half the cost
        v_without = network_velocity(z, t, no_class)
        return v_without + cfg * (v - v_without)

    z = noise
    for i in range(steps):
        # Python floats, in which 5 / 50 == 0.1: the default interval leaves out t = 0.1.
        t = i / steps
        t_next = (i + 1) / steps
        # Euler step.
        v = guided_velocity(z, t)
        z_next = z + (t_next - t) * v

        # Second-order correction (Heun): take the mean of this velocity and of that at the end of
        # the step. The last step has none, for any target: at t = 1, where no network was trained,
        # x's readout would divide by 0 but for its floor. (After t = 0.95 the floor makes x's
        # velocities too small: in 50 steps, even a perfect network leaves 1.7% of the noise.)
        if i < steps - 1:
            v_next = guided_velocity(z_next, t_next)
            z_next = z + (t_next - t) * (v + v_next) / 2
        z = z_next
    return z


# =============================================================== why x
# Section 3.2 and App. B of the paper. Suppose that the numbers of a position, along the directions
# of its PCA, are independent and Gaussian: x ~ N(0, diag(lam)), with a variance lam of its own in
# each direction. Then z has the variance V = t^2 lam + (1 - t)^2, and everything is known in closed
# form:
#
#     (3)  E[x|z] = t lam z / V                  (5)  Var(x|z)   = lam (1 - t)^2 / V
#     (4)  E[v|z] = (t lam - (1 - t)) z / V      (6)  Var(v|z)   = lam / V
#                                                     Var(eps|z) = t^2 lam / V
#
# The variances that remain (the risks) are the smallest errors that any network can reach.
# Converted to errors of the velocity they are equal: Var(v|z) = Var(x|z) / (1 - t)^2. So targets do
# not differ in what can be known. They differ in what has to come out of the network. Where lam is
# small, E[x|z] is about 0, and E[v|z] is about -z / (1 - t), as large as the noise. The target x
# has the covariance diag(lam), the target v diag(lam) + I: the noise lifts every direction of v by
# 1, and a network has to serve the weak directions as well as the strong ones. (`--demo` shows what
# becomes of one that is too narrow for all of them. `--geometry` calls the two functions below for
# the latents that encode.py wrote.)


def gaussian_risk(lam, t):
    """(5)-(6) The variances left in x, eps and v once z is known: the least possible mean squared
    errors, averaged over directions. R_v is R_x / (1 - t)^2.
    -> {"x": R_x, "eps": R_eps, "v": R_v}"""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    variance_z = t**2 * lam + (1 - t) ** 2
    risk_v = (lam / variance_z).mean().item()
    return {"x": (1 - t) ** 2 * risk_v, "eps": t**2 * risk_v, "v": risk_v}


def gaussian_gain(lam, t):
    """(3)-(4) The best answers for x and for v, divided by z, in a direction of variance lam. For
    small lam that for x goes to 0, and that for v to -1 / (1 - t)."""
    variance_z = t**2 * lam + (1 - t) ** 2
    return t * lam / variance_z, (t * lam - (1 - t)) / variance_z


# =============================================================== the network
# The blocks of JiT (arXiv 2511.13720) with the module names of DiT (Peebles & Xie 2022), so
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
    """t (B,) in [0, 1] -> (B, D). The sinusoids are of t itself, as in JiT, so that angles stay
    below 1 radian; DiT takes 1000 t."""

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
        # (B, N, heads, head_dim) each. They stay so in memory, and the fast kernels of attention
        # keep the order of what they are given, so that the flatten below copies nothing.
        q, k, value = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # In float32, so that they are rounded to bfloat16 again in rotate only, not in the norm.
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
    parameters, 46 GFLOPs an image (a multiplication with its addition is two). Raises Stop for
    sizes that do not fit."""

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
        require(
            input_size % patch_size == 0, f"patch_size {patch_size} does not divide {input_size}"
        )
        # RoPE turns pairs of channels, half of them by row and half by column.
        message = f"hidden_size {hidden_size} is no multiple of 4 for each of {num_heads} heads"
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
                # A patch convolution is a Linear of the patch's values: hence flatten, which is a
                # view of the weight.
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


# =============================================================== training
# One step: the gradients of a batch, added up over its micro-batches, so that a large batch fits
# into memory; AdamW; and the average of the weights, with which we sample. Under torchrun the
# processes share the micro-batches, of which each has at least one. They add up their gradients and
# all make the same update. The first process alone prints and writes.


@dataclass
class Run:
    """A training run: its settings and data, and what changes from step to step."""

    config: argparse.Namespace
    data: encode.LatentDataset
    net: JLT
    ema: JLT  # the average of the weights over the steps, to sample with
    optimizer: torch.optim.Optimizer
    step: int = 0  # how many are done; the next one's number, as they count from 0
    rows: list = field(default_factory=list)  # the lines of the log

    @property
    def folder(self):
        return Path(self.config.out)


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
        # No weight decay; the second moment's memory is short, as in JiT.
        optimizer=torch.optim.AdamW(
            net.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True
        ),
    )


def train(config):
    """Trains a network by these settings, or continues the run in config.out. -> the Run. Raises
    Stop for a cache, a folder or a checkpoint that does not fit, and for a loss that is not
    finite.

    The paper's settings, which are the defaults: 250,000 steps of 1,024 images; AdamW with betas
    (0.9, 0.95) and without weight decay; a rate of 2e-4 after five epochs of warm-up; times from
    sigmoid(N(-0.8, 0.8^2)); one label in ten hidden; gradients clipped to norm 1; weights averaged
    with a decay of 0.9999."""
    # Opens the data. The run is new, as `build` makes it, or as its last checkpoint has it.
    run = begin(config)
    loss_fn = flow_loss
    if "cuda" in config.device:
        loss_fn = torch.compile(flow_loss, dynamic=False)  # takes a minute, once
    first = run.step
    batches = micro_batches(run.data, config, first)
    count = config.batch // config.micro_batch
    seen, norms = [], []  # since the last line of the log: (t, loss) of images, norms of steps
    started = time.perf_counter()
    while run.step < config.steps:
        lr = learning_rate(config, run.step, len(run.data))
        run.optimizer.param_groups[0]["lr"] = lr

        # The gradient of the batch, from this process's micro-batches m. What is random is drawn
        # for the whole batch, so that it does not matter how the batch is divided; and drawn here,
        # since inside of the compiled function the same seed gives other numbers.
        t, eps, hidden = draws(config, run.step, run.data.shape)
        for m in own_micro_batches(config):
            x, y = next(batches)  # in the same order: latents (B, C, H, W), classes (B,)
            own = slice(m * config.micro_batch, (m + 1) * config.micro_batch)
            y = torch.where(hidden[own], run.data.num_classes, y)
            with autocast(config):
                losses = loss_fn(
                    run.net, x, y, t[own], eps[own], config.target, config.t_eps, config.loss
                )
            (losses.mean() / count).backward()
            seen.append(torch.stack([t[own], losses.detach()]))  # (2, B)

        # The update. Nothing here waits for the GPU: norms and losses stay there until a line is
        # due.
        sum_gradients(run.net)
        norms.append(update(run.net, run.ema, run.optimizer, config.ema))
        run.step += 1

        # Once in a while: a line of the log, a checkpoint, a picture. The log goes first, since it
        # stops the run if a loss is not finite. The first line comes at once, the second soon.
        line_due = run.step - first in (1, 10) or run.step % config.log_every == 0
        save_due = run.step % config.save_every == 0 or run.step == config.steps
        picture_due = config.sample_every and run.step % config.sample_every == 0
        if line_due or save_due or picture_due:
            log(run, torch.cat(seen, 1), torch.stack(norms), lr, started)
            if save_due:
                save_checkpoint(run)
            if picture_due:
                save_picture(run)
            seen, norms = [], []
            started = time.perf_counter()
    if dist.is_initialized():
        dist.destroy_process_group()
    return run


def draws(config, step, shape):
    """Times t (N,), noise eps (N, C, H, W), and for which images the class is hidden (N,), for the
    N = config.batch images of a step, whose latents have the shape (C, H, W): the same for every
    target. Another law of t goes here. (If it too draws N normal numbers, eps is not changed.)"""
    n = config.batch
    # rng: a generator that is seeded by these three numbers alone, purpose, seed and step.
    on = {"device": config.device, "generator": rng(NOISE, config.seed, step, device=config.device)}
    mean, std = config.logit_t
    # By default 84% of these times are below 1/2, where z_t is more noise than latent.
    t = torch.sigmoid(torch.randn(n, **on) * std + mean)
    eps = torch.randn(n, *shape, **on)
    # Guidance needs a network that can also do without a class.
    hidden = torch.rand(n, **on) < config.label_drop
    return t, eps, hidden


def learning_rate(config, step, images):
    """The rate of step 0, 1, ..., with `images` images in an epoch: it rises in the warm-up, then
    stays. With a cooldown, a share of all steps (the paper has none), it falls to 0 at the end."""
    warmup = max(1, round(config.warmup_epochs * images / config.batch))
    cooldown = max(1, config.cooldown * config.steps)
    rising = (step + 1) / warmup
    falling = (config.steps - step) / cooldown  # at least 1 where there is no cooldown
    return config.lr * min(1, rising, falling)


@torch.no_grad()
def update(net, ema, optimizer, decay):
    """Clips the gradient to norm 1, takes AdamW's step, then averages the weights. -> the norm
    before clipping.

    Each step's gradient is inexact and shakes the weights. Their average over about the last
    1 / (1 - decay) steps shakes less, and samples better."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    # average += (1 - decay) * (weight - average), for all of them at once.
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    return norm


def sum_gradients(net):
    """Adds up the gradients of all processes, as one vector: one message instead of hundreds. Since
    `train` divides by the count of all micro-batches, the sum is right however they are shared, up
    to rounding."""
    if dist.is_initialized():
        gradients = [p.grad for p in net.parameters()]
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)  # each gradient becomes its piece of flat


def autocast(config):
    """bfloat16 matrix products over float32 weights; for fp32 it does nothing."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bf16")


# #################################################################
# Part two: what surrounds it
# #################################################################
# Settings, the order of the data, a run and its folder, checkpoints, sampling, the geometry of a
# cache, the demo. From encode.py come pictures, the VAE, the cache, and helpers: `require` and
# `stop_on_error` raise Stop, a ValueError that the command line prints as one line; `claim_folder`
# keeps a folder for one group of settings; `replacing` writes a file whole or not at all;
# `processes` is this process's number and how many there are.

# =============================================================== settings
# What part one calls `config`. Every setting is a flag, and its default is that of the paper's B/1
# on ImageNet (section 4.1): 250,000 steps of 1,024 images. A model's name brings defaults of its
# own, those that differ from B/1's. B, L and H have 131, 458 and 951 million parameters; their
# micro-batches fit a GPU of 80 GB.
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
    # For the demo's drawn digits. The width is half of the 128 channels of a position.
    "demo": {
        "depth": 3,
        "hidden_size": 64,
        "batch": 64,
        "lr": 3e-3,
        "warmup_epochs": 0.3,
        "cooldown": 1.0,
        "ema": 0.99,
        "steps": 1500,
        "sample_steps": 10,
        "cfg": 1.5,
        "interval": [0.0, 1.0],
        "sample_every": 0,
        "log_every": 250,
        "workers": 0,
        "device": "cpu",  # nothing to compile, and the same digits everywhere
        "data": "runs/digits",
        "out": "runs/demo",
    },
}


# The flags stand in four groups. The fixed ones decide what is learned: a run that continues has to
# keep them. All others are free to change. So a new flag belongs to the group that says which it
# is. (One that also decides how a trained network is used, as --t-eps does, belongs to USE, too.)
def command_flags(parser):
    """What to do, if not to train."""
    group = parser.add_argument_group("commands (without one: train)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="x against v on drawn digits")
    add("--sample", metavar="NAME", help="from a run's folder, a checkpoint, or a hub repository")
    add("--geometry", metavar="LATENTS", help="variances of a cache's directions, and (3)-(6)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--classes", nargs="+", metavar="CLASS", help="with --sample: one picture of each")
    add("--n", type=positive, help="with --sample: a folder of N pictures, of all classes in turn")


def fixed_flags(parser):
    """What decides the result of training."""
    add = parser.add_argument_group("what is learned (a run keeps these)").add_argument
    add("--target", default="x", choices=TARGETS, help="what the network puts out (%(default)s)")
    add("--loss", default="v", choices=TARGETS, help="in what the error is taken (%(default)s)")
    add("--t-eps", default=0.05, type=float, help="least divisor 1 - t or t (%(default)s)")
    add(
        "--logit-t",
        default=[-0.8, 0.8],
        nargs=2,
        type=float,
        metavar=("MEAN", "STD"),
        help="t is the sigmoid of a normal number of this mean and deviation (%(default)s)",
    )
    add("--label-drop", default=0.1, type=float, help="share of classes hidden (%(default)s)")
    add("--model", default="B/1", choices=MODELS, help="size/patch size (%(default)s)")
    add("--depth", default=12, type=positive, help="blocks (%(default)s)")
    add("--hidden-size", default=768, type=positive, help="width of a token (%(default)s)")
    add("--num-heads", type=positive, help="attention heads (one for each 64 of the width)")
    add("--patch-size", default=1, type=positive, help="side of a patch, positions (%(default)s)")
    add("--batch", default=1024, type=positive, help="images in a step, all GPUs (%(default)s)")
    add("--lr", type=float, help="learning rate (as in JiT, 5e-5 * batch / 256)")
    add("--warmup-epochs", default=5.0, type=float, help="in which the rate rises (%(default)s)")
    add("--cooldown", default=0.0, type=float, help="share of steps where it falls (%(default)s)")
    # 0.9999 averages over 10,000 steps; a run of some thousand needs 0.99 or 0.999.
    add("--ema", default=0.9999, type=float, help="decay of the averaged weights (%(default)s)")
    add("--seed", default=0, type=natural, help="of weights, data order and noise (%(default)s)")
    add("--init", metavar="NAME", help="start from the weights of a run, checkpoint, repository")
    add("--precision", choices=("bf16", "fp32"), help="of matrix products (bf16 on cuda)")


def sampling_flags(parser):
    """How to sample. A checkpoint brings its own as defaults."""
    add = parser.add_argument_group("sampling (free)").add_argument
    add("--sample-steps", default=50, type=positive, help="Heun steps (%(default)s)")
    add("--cfg", default=2.9, type=float, help="weight of guidance; 1: none (%(default)s)")
    add(
        "--interval",
        default=[0.1, 1.0],
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="guidance is on where low < t < high (%(default)s)",
    )
    add("--vae", type=encode.full_path, help="the decoder: a repository or folder (the latents')")


def free_flags(parser):
    """What decides how long, where, and how fast."""
    add = parser.add_argument_group("length, files and machine (free)").add_argument
    add("--steps", default=250_000, type=positive, help="to train; 200 epochs (%(default)s)")
    # A divisor of the batch is taken, and under torchrun at most a process's share.
    add("--micro-batch", default=256, type=positive, help="images at a time, at most (%(default)s)")
    add("--data", default="latents", help="folder that encode.py wrote (%(default)s)")
    add(
        "--out",
        help="folder of a run (runs/MODEL-TARGET) or of samples (samples); or a picture's file "
        "(samples.png)",
    )
    add("--log-every", default=100, type=positive, help="steps between lines (%(default)s)")
    # A kill costs the steps since the last checkpoint: at step 1,234, the last 234.
    add("--save-every", default=1000, type=positive, help="between checkpoints (%(default)s)")
    add(
        "--sample-every", default=10_000, type=natural, help="between pictures; 0: no (%(default)s)"
    )
    add("--workers", default=4, type=natural, help="processes that read latents (%(default)s)")
    add("--device", default="", help="cuda, mps or cpu (the best there is)")


def defaults_of(flags):
    """-> {name: default} of a group of flags."""
    parser = argparse.ArgumentParser()
    flags(parser)
    return vars(parser.parse_args([]))


FIXED = defaults_of(fixed_flags)
SAMPLING = defaults_of(sampling_flags)
# What a checkpoint brings along when it is sampled from.
USE = ("target", "t_eps", *SAMPLING)


def read_flags(arguments=None):
    """-> the settings (a Namespace, called `config` from here on), and the Trained that --sample
    names, or None."""
    parser = encode.make_parser(__doc__)
    for add_flags in (command_flags, fixed_flags, sampling_flags, free_flags):
        add_flags(parser)
    # Parsed twice: first to learn the names of a model and a checkpoint; then again, with what
    # these bring as defaults, the checkpoint's over the model's. A flag that is given always wins.
    named = parser.parse_args(arguments)
    wanted = bool(named.classes or named.n)
    message = "--sample NAME goes with --classes 207 360 ... or with --n 50000, and they with it"
    require(wanted == bool(named.sample), message)
    model = "demo" if named.demo else named.model
    parser.set_defaults(**MODELS[model])
    trained = None
    if named.sample:
        trained = load_network(find_checkpoint(named.sample))
        parser.set_defaults(out="samples", **trained.settings)
    config = parser.parse_args(arguments)

    # What follows from other settings, and from the machine.
    config.model = model
    config.out = config.out or f"runs/{model.replace('/', '-')}-{config.target}"
    config.device = str(encode.pick_device(config.device))
    config.precision = config.precision or ("bf16" if "cuda" in config.device else "fp32")
    config.lr = 5e-5 * config.batch / 256 if config.lr is None else config.lr
    config.num_heads = config.num_heads or max(1, config.hidden_size // 64)
    require(config.interval == sorted(config.interval), "--interval LOW HIGH: LOW goes first")
    if trained:
        refuse_other_network(config.sample, trained, config)
    else:
        _, world = processes()
        share = config.batch // world
        require(share, f"--batch {config.batch}: fewer images than there are processes, {world}")
        config.micro_batch = min(config.micro_batch, share)
        while config.batch % config.micro_batch:
            config.micro_batch -= 1
    return config, trained


def refuse_other_network(name, trained, config):
    """Raises Stop unless the settings describe the network of the checkpoint `name`, saying which
    flags do."""
    flags = [
        f"--{setting.replace('_', '-')} {trained.settings[setting]}"
        for setting in ("target", "depth", "hidden_size", "num_heads", "patch_size")
        if trained.settings[setting] != getattr(config, setting)
    ]
    require(not flags, f"{name}: is another network; it takes {' '.join(flags)}")


# =============================================================== the order of the data
# What `train` sees in a step. All randomness is a function of the seed and of integers such as the
# step. So a checkpoint needs no state of a random generator or a data loader: with weights,
# average, optimizer and step a run goes on as if it had never been interrupted, on a CPU to the
# bit, on CUDA up to rounding (some kernels there add in no fixed order). And it does not matter how
# many processes share a step, but for the order in which gradients are added up. (On another kind
# of device, or another model of GPU, the same seed may draw other numbers.)
ORDER, FLIPS, NOISE, SAMPLES = range(4)  # streams of random numbers


def rng(stream, *key, device="cpu"):
    """A random generator that is a function of integers."""
    # With the key's length, since SeedSequence takes (1,) and (1, 0) for the same.
    sequence = np.random.SeedSequence((stream, len(key), *key))
    seed = int(sequence.generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


@lru_cache(2)  # a micro-batch may lie across two epochs
def epoch_order(n, seed, epoch):
    """The order in which an epoch shows n images."""
    return torch.randperm(n, generator=rng(ORDER, seed, epoch))


def picks(n, config, step, m):
    """-> the (index, flip) pairs of micro-batch m of a step, of n images. An epoch shows every
    image once; half the time `flip` asks for the latent of the mirrored picture."""
    flips = torch.rand(config.batch, generator=rng(FLIPS, config.seed, step)) < 0.5
    pairs = []
    for i in range(m * config.micro_batch, (m + 1) * config.micro_batch):
        shown = step * config.batch + i  # how many images were shown before this one
        order = epoch_order(n, config.seed, shown // n)
        pairs.append((int(order[shown % n]), bool(flips[i])))
    return pairs


def own_micro_batches(config):
    """The numbers of this process's micro-batches of a step: of w processes, process r computes
    r, r + w, r + 2w, ..."""
    rank, world = processes()
    return range(rank, config.batch // config.micro_batch, world)


def micro_batches(data, config, start=0):
    """Yields x (B, C, H, W) float32 and y (B,), on the device, of this process's micro-batches from
    step `start` on. Workers read ahead."""
    loader = DataLoader(
        data,
        batch_sampler=(
            picks(len(data), config, step, m)
            for step in range(start, config.steps)
            for m in own_micro_batches(config)
        ),
        num_workers=min(config.workers, encode.cores()),
        pin_memory="cuda" in config.device,
        worker_init_fn=encode.ignore_interrupts,
    )
    for x, y in loader:
        # float16 on the way to the device, float32 there.
        x = x.to(config.device, non_blocking=True).float()
        yield x, y.to(config.device, non_blocking=True)


# =============================================================== a run and its folder
# How `train` begins, and what it does once in a while. A run's folder holds settings.json, which
# refuses other settings; ckpt.pt, to continue from; ema.safetensors, to sample from; log.jsonl; and
# pictures.
def begin(config):
    """-> Run, new or continued: opens the data, joins the processes, reads the checkpoint."""
    rank, world = processes()
    data = encode.LatentDataset(config.data)
    if world > 1:
        dist.init_process_group("nccl" if "cuda" in config.device else "gloo")
    config.vae = config.vae or data.settings.get("vae", encode.VAE)
    run = build(config, data)
    checkpoint = run.folder / "ckpt.pt"
    # Before anything is written, so that a mistake leaves no folder behind.
    if config.init and not checkpoint.exists():
        start_from(run, load_network(find_checkpoint(config.init)))
    # Whatever else is in it: nothing is written into the folder of another run, even if its
    # checkpoint is gone.
    encode.claim_folder(run.folder, fixed_settings(run), defaults=FIXED)
    if checkpoint.exists():
        resume(run)
    if dist.is_initialized():
        steps = torch.zeros(world, device=config.device)
        steps[rank] = run.step
        dist.all_reduce(steps)
        message = f"{run.folder}: its processes find it at steps {steps.tolist()}; it has to be"
        require((steps == run.step).all(), f"{message} one folder, that all of them see")
    if rank == 0:
        std, mean = torch.std_mean(data.some())
        print(
            f"{run.folder}: predicts {config.target}, {len(data):,} latents of mean {mean:.2f} and "
            f"deviation {std:.2f}, batch {config.batch // config.micro_batch} x "
            f"{config.micro_batch} on {world} x {config.device}, from step {run.step:,} to "
            f"{config.steps:,}",
            flush=True,
        )
        if abs(mean) > 0.5 or not 0.5 < std < 2:
            print("  not normalised? latents should have mean 0 and deviation 1", flush=True)
    return run


def fixed_settings(run):
    """What must be the same when a run is continued: the fixed flags, and a digest of labels,
    shape and encode.py's notes, which stands for the latents. The cache may move."""
    config = run.config
    settings = {name: getattr(config, name) for name in FIXED}
    if config.cooldown:
        # Then the learning rate depends on where the run ends.
        settings["steps"] = config.steps
    content = run.data.labels.numpy().tobytes() + repr((run.data.shape, run.data.settings)).encode()
    return settings | {"latents": encode.digest(content)}


def load_checkpoint(path):
    """torch.load that runs no code from the file, and maps it instead of reading it whole. The one
    class that it may name is argparse.Namespace, which holds the settings in the paper's
    checkpoint. Raises Stop for a damaged file."""
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with stop_on_error(path, "damaged, or no checkpoint"), allowed:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def resume(run):
    """Goes back to the run's checkpoint."""
    state = load_checkpoint(run.folder / "ckpt.pt")
    run.net.load_state_dict(state["model"])
    run.ema.load_state_dict(state["ema"])
    run.optimizer.load_state_dict(state["optimizer"])  # with the betas that it had
    run.step = state["step"]
    # The steps after the checkpoint are taken again, and their rows are written again.
    run.rows = state["log"]


def start_from(run, trained):
    """--init: gives the weights and their average the trained ones. Loss, times and the size of
    latents may be others. Where the classes are others, each starts as "no class": then the network
    answers at first as it does without a class."""
    refuse_other_network(run.config.init, trained, run.config)
    weights = trained.net.state_dict()
    unknown = not (trained.class_names and run.data.class_names)  # then their number decides
    same = unknown or trained.class_names == run.data.class_names
    kept = same and run.data.num_classes == trained.net.num_classes
    if not kept:
        table = weights["y_embedder.embedding_table.weight"]
        new = table[-1:].expand(run.data.num_classes + 1, -1)
        weights["y_embedder.embedding_table.weight"] = new
    with stop_on_error(f"--init {run.config.init}", f"does not fit {run.config.data}"):
        run.net.load_state_dict(weights)
    run.ema.load_state_dict(weights)
    if processes()[0] == 0:
        print(f"from {trained.source}; classes are {'kept' if kept else 'new'}", flush=True)


# ------------------------------------------------------------- once in a while
def log(run, seen, norms, lr, started):
    """Prints and writes a line on the steps since the last: `seen` (2, n) holds times and losses
    of this process's images, `norms` (steps,) the norms of the summed gradient. All processes call
    this. Raises Stop for a loss that is not finite."""
    t, losses = seen
    # Here the host waits for the GPU. Ten bins: the loss by t shows at which noise one target is
    # learned better.
    bins = (10 * t).long().clamp(max=9)
    sums = torch.bincount(bins, losses, 10)
    counts = torch.bincount(bins, torch.ones_like(losses), 10)
    by_time = torch.stack([sums, counts])
    if dist.is_initialized():
        dist.all_reduce(by_time)
    sums, counts = by_time.tolist()
    loss = sum(sums) / sum(counts)
    # No checkpoint is written after a bad step.
    first = run.step - len(norms) + 1
    line = f"{run.folder}: loss or gradient is not finite in steps {first:,} to {run.step:,}"
    advice = "any checkpoint is from before; a lower --lr in another --out may help"
    require(math.isfinite(loss) and norms.isfinite().all(), f"{line}; {advice}")
    row = {
        "step": run.step,
        "loss": loss,
        "grad_norm": norms.mean().item(),
        "lr": lr,
        "ms": 1000 * (time.perf_counter() - started) / len(norms),
        "loss_by_t": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
    }
    run.rows.append(row)
    rank, _ = processes()
    if rank:
        return
    with replacing(run.folder / "log.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    steps = run.config.steps
    print(
        f"step {run.step:,}/{steps:,} {run.step / steps:.1%} | loss {loss:.4f} | "
        f"grad {row['grad_norm']:.3f} | lr {lr:.2e} | {row['ms']:.0f} ms/step "
        f"{1000 * run.config.batch / row['ms']:,.0f} images/s | "
        f"eta {tqdm.format_interval((steps - run.step) * row['ms'] / 1000)}",
        flush=True,
    )
    if run.step % (10 * run.config.log_every) == 0:
        values = ["-" if value is None else f"{value:.3f}" for value in row["loss_by_t"]]
        print("  loss by t, from noise to data:", *values, flush=True)


def save_checkpoint(run):
    """Writes ema.safetensors, the file to share and to sample from: the averaged weights under the
    network's own names, settings and class names in the header. Then ckpt.pt, to continue from."""
    rank, _ = processes()
    if rank:
        return

    about = {
        "config": vars(run.config),
        "classes": run.data.class_names,
        "grid": run.net.input_size,
        "step": run.step,
    }
    ema = run.ema.state_dict()
    # In this order: a run that is killed between the two continues from the older ckpt.pt, and
    # writes both again.
    encode.save_tensors(run.folder / "ema.safetensors", ema, {"jlt": json.dumps(about)})
    state = about | {
        "model": run.net.state_dict(),
        "ema": ema,
        "optimizer": run.optimizer.state_dict(),
        "log": run.rows,
    }
    with replacing(run.folder / "ckpt.pt") as temporary:
        # From the host's memory, so that the file asks for no GPU when it is read.
        torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, state), temporary)


def save_picture(run):
    """A picture of 16 classes spread over all, from the averaged weights; always the same noise.
    Where the VAE is not to be had, or memory does not suffice, a line says so and training goes on.
    The other processes wait."""
    rank, _ = processes()
    if rank:
        return
    labels = torch.linspace(0, run.data.num_classes - 1, 16).long()
    path = run.folder / f"samples_{run.step:07d}.png"
    try:
        vae = load_decoder(run.config, run.ema)  # first: without it nothing need be sampled
        latents = generate(run.ema, labels, range(16), run.config)
        encode.save_png(path, encode.image_grid(pictures(vae, latents), columns=8))
    except (Stop, OSError, RuntimeError, MemoryError) as error:
        print(f"no picture at step {run.step:,}: {error}", flush=True)


# =============================================================== sampling
# What leads to `sample` and on from it to pictures. The weights are those of a run's
# ema.safetensors, of its ckpt.pt, four times as large, or of the checkpoint that the paper's
# authors published. `generate` gives `sample` the noise of numbered images, `pictures` decodes; the
# two commands at the end make one picture of chosen classes, or a folder of numbered pictures that
# any program for FID reads.
FILES = ("ema.safetensors", "ckpt.pt", "checkpoint-last.pth")


@dataclass
class Trained:
    """A network to sample from, and what its file says of it."""

    net: JLT
    settings: dict  # what the network is, and how it is sampled unless a flag says otherwise
    class_names: list
    source: str  # which weights these are: the step, and a digest


def find_checkpoint(name):
    """A file, a folder that holds one, or a hub repository, from which it is fetched once -> path.
    Raises Stop where there is none."""
    path = Path(name)
    if not path.exists():
        is_repository = name.count("/") == 1 and not path.parent.is_dir()
        require(is_repository, f"{name}: no such run folder or checkpoint")
        from huggingface_hub import snapshot_download

        advice = f"not fetched from the hub; by hand: hf download {name} --local-dir jlt"
        with stop_on_error(name, advice):
            path = Path(snapshot_download(name, allow_patterns=[FILES[0], FILES[2]]))
    if path.is_dir():
        there = [path / file for file in FILES if (path / file).exists()]
        require(there, f"{path}: holds none of {', '.join(FILES)}")
        path = there[0]
    return path


def load_network(path):
    """-> Trained, from any of the three kinds of file. Raises Stop for anything else."""
    with stop_on_error(path, "holds no JLT"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["jlt"]) | {"ema": load_file(path)}
        else:
            state = load_checkpoint(path)
        if "model_ema1" in state:
            state = translate_published(state)
        weights = state["ema"]
        net, sizes = network_of(weights, state["grid"])
        # A setting that an older version did not write down has its default.
        config = FIXED | SAMPLING | state["config"]
        # One tensor tells networks apart: every step of training changes it.
        digest = encode.digest(weights["final_layer.linear.weight"].numpy().tobytes())
        return Trained(
            net=net,
            settings=sizes | {name: config[name] for name in USE},
            class_names=state["classes"],
            source=f"EMA of step {state['step']}, {digest}",
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
    return {
        "config": {
            # A bool in the released code: False is x-prediction, True is v. Older files lack it.
            "target": "v" if getattr(args, "flow_matching", False) else "x",
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
    # On no device at first: random weights, which take seconds, would only be overwritten. The
    # tables of RoPE are in no file.
    with torch.device("meta"):
        net = JLT(input_size, in_channels=stem.shape[1], num_classes=num_classes, **sizes)
    net.load_state_dict(weights, assign=True)
    net.rope_cos, net.rope_sin = rope_tables(input_size // stem.shape[2], head_dim)
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
            config.t_eps,
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
    """The name or the number of a class -> its label. Where names are numbers themselves (a folder
    called 10), a word is a name only. Raises Stop for a word that is neither."""
    names = trained.class_names
    if word in names:
        return names.index(word)
    count = trained.net.num_classes
    numbered = any(name.isdecimal() for name in names)
    fits = word.isdecimal() and int(word) < count and not numbered
    known = f"the names {names[:3]} ..., nor (where no name is a number) a number below {count}"
    require(fits, f"--classes {word}: is none of {known}")
    return int(word)


def sampling_settings(config, trained):
    """Everything that decides the samples; say it beside any FID."""
    settings = {name: getattr(config, name) for name in (*USE, "seed", "precision")}
    return settings | {"weights": trained.source}


# ------------------------------------------------------------- the commands
def sample_classes(config, trained):
    """--classes: one PNG, the pictures of these classes side by side."""
    rank, _ = processes()
    if rank:
        return
    labels = [class_label(word, trained) for word in config.classes]
    path = Path(f"{config.out.removesuffix('.png')}.png")  # no suffix: .png, of --out folder/
    message = f"--out {config.out}: name a file, in a folder that is there"
    require(path.suffix and path.parent.is_dir(), message)
    vae = load_decoder(config, trained.net)
    net = trained.net.to(config.device)
    images = pictures(vae, generate(net, torch.tensor(labels), range(len(labels)), config))
    done = "replaced" if path.exists() else "wrote"
    encode.save_png(path, encode.image_grid(images, columns=len(labels)))
    names = trained.class_names or [""] * net.num_classes
    shown = ", ".join(f"{label} {names[label]}".strip() for label in labels)
    print(f"{done} {path}: {shown}\n{sampling_settings(config, trained)}")


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
    encode.claim_folder(folder, settings, defaults=FIXED | SAMPLING)

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
# Section 3.2 and App. D of the paper: what (3)-(6) of "why x" say of given latents.


def participation_ratio(lam):
    """(sum lam)^2 / sum lam^2: how many directions carry the variance, counted with weight. The
    paper calls it effective rank."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return (lam.sum() ** 2 / lam.square().sum()).item()


def positions(latents):
    """Latents (B, C, H, W) -> (B * H * W, C), row by row."""
    return latents.movedim(1, -1).flatten(0, 2)


def spectrum(data):
    """-> eigenvalues (C,) of the covariance of a cache's positions, descending; of 4,096 latents,
    if there are more."""
    tokens = positions(data.some(4096)).double()
    # Rounding may leave an eigenvalue of 0 below it.
    return torch.linalg.eigvalsh(tokens.T.cov()).flip(0).clamp(min=0)


def geometry(config):
    """--geometry: the spectrum of a cache's positions, and what (3)-(6) make of it: two tables."""
    lam = spectrum(encode.LatentDataset(config.geometry))
    print(f"{config.geometry}: {len(lam)} channels, variances {lam[0]:.4g} to {lam[-1]:.3g}")
    print("\ntarget   participation ratio   directions for 90% of the variance")
    # x and eps are independent, so that v = x - eps has the sum of their variances.
    for target, variances in {"x": lam, "eps": torch.ones_like(lam), "v": lam + 1}.items():
        needed = (variances.cumsum(0) < 0.9 * variances.sum()).sum() + 1
        print(f"{target:6} {participation_ratio(variances):21.1f} {needed:36}")

    print("\n   t      R_x    R_eps      R_v  gain of x     of v")
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        values = (*gaussian_risk(lam, t).values(), *gaussian_gain(lam[-1], t))
        print(f"{t:4.1f}", *(f"{value:8.4f}" for value in values))
    print("(R: least error per dimension, (5)-(6); gain: E[target|z] / z in the last direction)")


# =============================================================== the demo
# The method on a toy: 10,000 drawn digits of 32 x 32 pixels. A linear codec turns each
# into 2 x 2 positions of 128 channels (encode.py draws and encodes them). Two networks are trained,
# one for x and one for v, alike in everything else. Both make digits from the same noise, and a
# judge compares their digits with real ones. The settings are those of MODELS["demo"].


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


def demo(config, n=2000):
    """--demo: the same network, loss, loop and sampler on drawn digits, for x and for v, from the
    same weights, data order and noise. Prints a table of n digits each, and makes a picture."""
    from fid import frechet_distance

    # Beside another program, two threads on matrices this small mostly wait for each other.
    torch.set_num_threads(1)
    if (Path(config.out) / "v/ckpt.pt").exists():
        print(f"{config.out}: goes on with the networks that are there")
    print("drawing digits ...", flush=True)
    encode.cache_digits(config.data)
    codec = encode.load_vae(f"{config.data}/codec.safetensors")
    # One half is the reference. The other is scored as samples are: a perfect sampler would score
    # about as well.
    images, labels = encode.draw_digits(2 * n, seed=3)
    labels = labels[:n]  # of both halves: digit i is of class i % 10
    real_latents = encode.encode(codec, encode.to_float(images[n:]))
    print("training the judge, a small classifier of digits ...", flush=True)
    judge = digit_judge(*encode.draw_digits(2 * n, seed=2))
    reference = digit_statistics(judge, images[:n])

    # Of each row of the table: pictures and latents.
    rows = {"real": (images[n:], real_latents)}
    for target in ("x", "v"):
        own = {"target": target, "out": f"{config.out}/{target}"}
        run = train(argparse.Namespace(**(vars(config) | own)))
        print(f"sampling and scoring {n:,} digits ...", flush=True)
        latents = generate(run.ema, labels, range(n), run.config).cpu()
        rows[f"predicts {target}"] = (pictures(codec, latents), latents)

    print("\n             digit features   low directions   read right")
    for name, (digits, latents) in rows.items():
        distance = frechet_distance(*digit_statistics(judge, digits), *reference)
        variance = low_variance(latents) / low_variance(real_latents)
        right = (judge(encode.to_float(digits)).argmax(1) == labels).float().mean()
        print(f"{name:12} {distance:14.1f} {variance:16.2f} {right:12.1%}")
    path = Path(config.out) / "demo.png"
    encode.save_png(path, encode.labelled_rows({name: row[0][:20] for name, row in rows.items()}))
    print(f"""
digit features: how far the samples are from held-out digits, as Frechet distance in the judge's
  last layer but one; lower is better. A perfect sampler has about what "real" has, other digits.
low directions: variance in those 64 of 128 directions where real digits have least, relative to
  theirs; 1 is best. Noise in them ruins a digit to the eye, and not to the judge, which looks at
  strokes: hence "read right", how many it reads as the digit that was asked for.

{path}: two rows each of {", ".join(rows)}.
Next: --hidden-size 192 --out runs/wide, wider than the 128 channels. There v wins (at this
guidance), and it takes three times as long.""")


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
        train(config)


if __name__ == "__main__":
    encode.run_command(main)
