"""FID and Inception Score as torch-fidelity 0.4 computes them, which is what the paper reports.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # ADM's reference (of it, only mu and sigma)
    python fid.py samples/ photos/                              # two folders of images
    python fid.py photos/ --save stats.npz                      # a reference of my own, for any later SAMPLES

Images are a folder, searched recursively, or an npz whose arr_0 is uint8 (N, H, W, 3). They are scored as they
are: crop photographs to the samples' size beforehand. Memory is constant, but for 4 kB per image scored.
"""
import argparse, hashlib, math, os, sys, zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from encode import Stop, atomic, list_images, open_rgb, pick_device, run

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


@contextmanager
def readable(path, kind):
    """Whatever goes wrong in reading a user's file (zlib, pickle, Pillow ... differ) becomes a Stop that names it."""
    try:
        yield
    except (Stop, MemoryError):
        raise
    except Exception as e:
        raise Stop(f"{path}: not a readable {kind} ({str(e).split('. ')[0][:200] or type(e).__name__})") from None


# ---------------------------------------------------------------- the network
def tf_resize(images):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [-1, 1), bilinear as in TensorFlow 1's resize_bilinear_op:
    output i samples position i * in/299 (no half-pixel shift), without antialiasing or rounding, all in float32."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")

    def taps(size):
        c = torch.arange(299, device=images.device).float() * torch.tensor(size / 299, dtype=torch.float32)
        low = c.long()
        return low, (low + 1).clamp(max=size - 1), c - low

    low, high, d = taps(images.shape[3])
    left, right = images[..., low].float(), images[..., high].float()
    x = left + (right - left) * d                                               # (B, 3, H, 299)
    low, high, d = taps(images.shape[2])
    top, bottom = x[:, :, low], x[:, :, high]
    return (top + (bottom - top) * d[:, None] - 128) / 128                      # (B, 3, 299, 299)


def conv(c_in, c_out, kernel):
    """Convolution, batch norm, ReLU. "1x7": rows x columns, padded to keep the size; "3x3/2": stride 2, unpadded."""
    size, _, stride = kernel.partition("/")
    layer = nn.Conv2d(c_in, c_out, [int(k) for k in size.split("x")], int(stride or 1),
                      "valid" if stride else "same", bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True)))


# Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it on 2015-12-05, in the names of pytorch-fid's
# state dict. A block lays branches side by side; a branch is a chain of width@kernel, N the block's own width; in
# 384@1x3@3x1 two convolutions share their input; branch_pool pools first.
A = dict(branch1x1="64@1x1", branch5x5="48@1x1 64@5x5", branch3x3dbl="64@1x1 96@3x3 96@3x3", branch_pool="N@1x1")
B = dict(branch3x3="384@3x3/2", branch3x3dbl="64@1x1 96@3x3 96@3x3/2", branch_pool="")
C = dict(branch1x1="192@1x1", branch7x7="N@1x1 N@1x7 192@7x1",
         branch7x7dbl="N@1x1 N@7x1 N@1x7 N@7x1 192@1x7", branch_pool="192@1x1")
D = dict(branch3x3="192@1x1 320@3x3/2", branch7x7x3="192@1x1 192@1x7 192@7x1 192@3x3/2", branch_pool="")
E = dict(branch1x1="320@1x1", branch3x3="384@1x1 384@1x3@3x1",
         branch3x3dbl="448@1x1 384@3x3 384@1x3@3x1", branch_pool="192@1x1")
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)          # TensorFlow's mean leaves the padding out
MAX, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)         # MAX in 7c is an oddity of this graph: keep it
BLOCKS = {"5b": (192, A, 32, MEAN), "5c": (256, A, 64, MEAN), "5d": (288, A, 64, MEAN), "6a": (288, B, 0, HALVE),
          "6b": (768, C, 128, MEAN), "6c": (768, C, 160, MEAN), "6d": (768, C, 160, MEAN), "6e": (768, C, 192, MEAN),
          "7a": (768, D, 0, HALVE), "7b": (1280, E, 0, MEAN), "7c": (2048, E, 0, MAX)}


class Mixed(nn.Module):
    def __init__(self, c_in, branches, width, pool):
        super().__init__()
        self.pool, self.chains = pool, {branch: [] for branch in branches}
        for branch, chain in branches.items():
            c = c_in
            for i, step in enumerate(chain.replace("N", str(width)).split(), 1):
                c_out, *kernels = step.split("@")
                stem = f"{branch}_{i}" if " " in chain else branch
                names = [stem + fork for fork in "ab"] if len(kernels) == 2 else [stem]
                for name, kernel in zip(names, kernels):
                    self.add_module(name, conv(c, int(c_out), kernel))
                self.chains[branch].append(names)
                c = int(c_out)

    def forward(self, x):
        out = []
        for branch, chain in self.chains.items():
            h = [self.pool(x) if branch == "branch_pool" else x]
            for names in chain:
                h = [self.get_submodule(name)(h[0]) for name in names]
            out += h
        return torch.cat(out, 1)


class Inception(nn.Module):
    """uint8 images (B, 3, H, W) -> features (B, 2048), logits (B, 1008). `weights`: pytorch-fid's state dict of 566
    tensors or the path of its file; raises Stop where it is something else. Turns TF32 off for the process."""

    def __init__(self, weights):
        super().__init__()
        self.Conv2d_1a_3x3 = conv(3, 32, "3x3/2")
        self.Conv2d_2a_3x3 = conv(32, 32, "3x3/1")
        self.Conv2d_2b_3x3 = conv(32, 64, "3x3")
        self.Conv2d_3b_1x1 = conv(64, 80, "1x1")
        self.Conv2d_4a_3x3 = conv(80, 192, "3x3/1")
        for name, block in BLOCKS.items():
            self.add_module(f"Mixed_{name}", Mixed(*block))
        self.fc = nn.Linear(2048, 1008)
        with readable("weights" if isinstance(weights, dict) else weights, "file of the Inception 2015-12-05 weights"):
            if not isinstance(weights, dict):
                weights = torch.load(weights, map_location="cpu", weights_only=True)
            self.load_state_dict(weights)
        self.eval()
        torch.backends.cudnn.conv.fp32_precision = "ieee"      # TF32's 10-bit mantissa would move the features
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    @torch.inference_mode()
    def forward(self, images):
        x = tf_resize(images)                                                             # (B, 3, 299, 299)
        x = HALVE(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))          # (B, 64, 73, 73)
        x = HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                              # (B, 192, 35, 35)
        for name in BLOCKS:
            x = self.get_submodule(f"Mixed_{name}")(x)         # 35x35 in 5, 17x17 from 6a, 8x8 from 7a
        features = x.mean((2, 3))                                                         # (B, 2048)
        return features, features @ self.fc.weight.T           # without the bias, as the first Inception Score was


def load_inception(path, device):
    """The network and its name for the result line. path None: downloaded once (96 MB), its hash checked."""
    name = "Inception 2015-12-05"
    if path is None:
        try:
            with redirect_stdout(sys.stderr):                  # stdout is for the result
                path = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
        except Exception as e:
            raise Stop(f"cannot download the Inception weights ({e}); fetch {URL} elsewhere, then --weights FILE", 1)
    elif not hashlib.sha256(path.read_bytes()).hexdigest().startswith("6726825d"):
        name = f"weights {path.name}"                          # the same tensors saved anew, or others: who knows
    return Inception(path).to(device), name


# ---------------------------------------------------------------- statistics and scores
class Statistics:
    """Count `n`, `mean` (dim,) and covariance `cov` (dim, dim) of features that come in batches, in float64. Batches
    are merged as in Chan, Golub & LeVeque (1979): plain sums of squares cancel where the mean is large."""

    def __init__(self, dim=2048):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, features):
        """features (B, dim), torch or numpy. Raises Stop on NaN or infinity, ValueError on another shape."""
        x = torch.as_tensor(features).detach().cpu().double().numpy()
        if x.shape[1:] != self.mean.shape or not len(x):
            raise ValueError(f"expected features (B, {len(self.mean)}), got {x.shape}")
        if not np.isfinite(x).all():
            raise Stop("NaN or infinity among the features: broken weights, or a network that diverged", status=1)
        n, shift = self.n + len(x), x.mean(0) - self.mean
        # The batch's own scatter, and as one more row how far apart the two means are.
        rows = np.vstack([x - x.mean(0), shift * math.sqrt(self.n * len(x) / n)])        # (B + 1, dim)
        self.n, self.mean = n, self.mean + shift * (len(x) / n)
        self.scatter += rows.T @ rows

    @property
    def cov(self):
        return self.scatter / (self.n - 1) if self.n > 1 else np.full_like(self.scatter, np.nan)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Heusel et al. 2017 (1706.08500), eq. 6: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of mu (D,), sigma (D, D).
    The last trace sums the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: those of S1 S2 itself
    stray by rounding. May be barely negative. Raises ValueError on shapes that differ, NaN or infinity."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == 2 * mu1.shape:
        raise ValueError(f"mu {mu1.shape}, {mu2.shape} and sigma {sigma1.shape}, {sigma2.shape} do not fit")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("NaN or infinity in mu or sigma")
    values, vectors = np.linalg.eigh(sigma1)
    half = vectors * np.sqrt(values.clip(0))      # S1 = half half^T, so half^T S2 half has the same eigenvalues
    product = half.T @ sigma2 @ half
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def inception_score(logits, splits=10):
    """Salimans et al. 2016 (1606.03498): mean and population std over splits of exp(mean KL(p(y|x) || p(y))), from
    logits (N, classes). Shuffled by torch-fidelity's seed: a split of class-ordered samples would miss most classes
    and score 30% lower. Raises ValueError on NaN, infinity or N < splits."""
    logits, n, scores = torch.as_tensor(logits), len(logits), []
    if n < splits or not logits.isfinite().all():
        raise ValueError(f"needs finite logits of at least {splits} images, got {n}")
    logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(n))]
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(1)    # (N / splits, classes)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))      # log of the mean p, also where every p underflows
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------- images and reference files
def open_images(path, workers):
    """Folder or npz -> the number of images, and a generator of uint8 (H, W, 3) arrays in order."""
    if path.is_dir():
        names = list_images(path)
        n, images = len(names), decode(path, names, workers)
    else:
        with readable(path, "npz of images"):
            archive = zipfile.ZipFile(path)
            file = archive.open("arr_0.npy")                   # streamed: 50,000 images of 256x256 are 9.8 GB
            major, _ = np.lib.format.read_magic(file)
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
            if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,), (4,)):
                raise Stop(f"{path}: arr_0 is {dtype} {shape}{' in Fortran order' * fortran}, not uint8 (N, H, W, 3)")
            if archive.getinfo("arr_0.npy").file_size != file.tell() + math.prod(shape):
                raise Stop(f"{path}: arr_0 is cut short")
        n, images = shape[0], stream(path, file, shape)
    if n < 10:
        raise Stop(f"{path}: {n} images; a score needs 10 at the least, and thousands to mean anything")
    return n, images


def stream(path, file, shape):
    for i in range(shape[0]):
        with readable(f"{path}, image {i}", "part of an npz"):
            image = np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(*shape[1:3], -1)
        yield image[..., :3] if image.shape[2] > 1 else image.repeat(3, axis=2)          # alpha is dropped


def decode(folder, names, workers):
    def load(name):
        with readable(folder / name, "image; a score must not leave it out"):
            return np.array(open_rgb(folder / name))

    with ThreadPoolExecutor(workers) as pool:
        ahead = []
        for start in range(0, len(names) + 64, 64):            # hands out 64 while the next 64 are decoded
            now, ahead = ahead, pool.map(load, names[start:start + 64])
            yield from now


def extract(net, path, n, images, batch, scored):
    """n images through the network -> their Statistics, and logits (n, 1008) if they are scored."""
    statistics, logits = Statistics(), []
    with tqdm(total=n, unit="img", desc=path.name) as bar:
        for _, same in groupby(images, np.shape):              # consecutive images of one size
            while group := list(islice(same, batch)):
                x = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)                # (B, 3, H, W)
                features, logit = net(x.to(net.fc.weight.device))                        # (B, 2048), (B, 1008)
                statistics.update(features)
                logits += [logit.cpu()] * scored
                bar.update(len(group))
    return statistics, torch.cat(logits) if scored else None


def read_statistics(path):
    """mu (2048,), sigma (2048, 2048) and n (None: unknown) of a reference npz; None where path holds images."""
    if path.is_dir():
        return None
    with readable(path, "npz"), np.load(path, allow_pickle=False) as file:
        mu, sigma = ("ref_mu", "ref_sigma") if "ref_mu" in file else ("mu", "sigma")
        if mu not in file and "arr_0" in file:
            return None
        mu, sigma = file[mu].astype(np.float64), file[sigma].astype(np.float64)
        if (mu.shape, sigma.shape) != ((2048,), (2048, 2048)) or not np.isfinite([mu.sum(), sigma.sum()]).all():
            raise Stop(f"{path}: mu {mu.shape} and sigma {sigma.shape} are not (2048,) and (2048, 2048), or not finite")
        return mu, sigma, int(file["n"]) if "n" in file else None


# ---------------------------------------------------------------- the command line
def main():
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or npz with arr_0")
    add("reference", type=Path, nargs="?", help="the same, or npz with mu and sigma (or ref_mu and ref_sigma)")
    add("--save", type=Path, metavar="FILE", help="write the samples' mu, sigma and n, to serve as a reference")
    add("--weights", type=Path, metavar="FILE", help="the Inception weights (downloaded once, 96 MB)")
    add("--batch", type=int, default=64, help="images per forward pass; no effect on the result (64)")
    add("--workers", type=int, default=min(16, os.cpu_count()), help="threads that decode images (all cores)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    parser.print_usage = lambda file: None                     # a mistake gets one line
    args = parser.parse_args()

    # Whatever can be refused is refused before the first image is decoded.
    if min(args.batch, args.workers) < 1:
        raise Stop(f"--batch {args.batch} --workers {args.workers}: both need a positive number")
    for path in filter(None, (args.samples, args.reference, args.weights)):
        if not path.exists():
            raise Stop(f"{path}: no such file or folder")
    if args.save and (args.save.exists() or not os.access(args.save.parent, os.W_OK)):
        raise Stop(f"--save {args.save}: {'exists already' if args.save.exists() else 'cannot write there'}")
    device, scored = pick_device(args.device), bool(args.reference or not args.save)
    samples = open_images(args.samples, args.workers)
    reference = args.reference and read_statistics(args.reference)
    references = args.reference and not reference and open_images(args.reference, args.workers)
    net, name = load_inception(args.weights, device)

    if references:
        got, _ = extract(net, args.reference, *references, args.batch, scored=False)
        reference = got.mean, got.cov, got.n
    got, logits = extract(net, args.samples, *samples, args.batch, scored)
    line = [f"n = {got.n:,} ({args.samples.name})", f"{name}, TF1 resize"]
    if args.save:
        with atomic(args.save) as tmp, open(tmp, "wb") as file:      # the float types that JiT's evaluation reads
            np.savez(file, mu=got.mean.astype(np.float32), sigma=got.cov, n=got.n,
                     source=f"fid.py {args.samples}, {name}, TF1 resize")
        line.append(f"saved to {args.save}")
    if scored:
        line.insert(0, "Inception Score %.2f +- %.2f" % inception_score(logits))
    if got.n < 50_000:
        print(f"fid.py: n = {got.n:,}: FID and IS are biased below 50,000, compare at equal n only"
              f"{'; the covariance is singular below 2,048' if got.n < 2048 else ''}", file=sys.stderr)
    if reference:
        mu, sigma, n = reference
        line.insert(0, f"FID {frechet_distance(got.mean, got.cov, mu, sigma):.3f}")
        ...


if __name__ == "__main__":
    run(main)
