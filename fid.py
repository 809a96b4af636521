"""FID and Inception Score as torch-fidelity 0.4 computes them, which is what the paper reports.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # ADM's reference (of it, only mu and sigma)
    python fid.py samples/ photos/                              # two folders of images
    python fid.py photos/ --save stats.npz                      # a reference of my own, for any later SAMPLES

Images are a folder, searched recursively, or an npz whose arr_0 is uint8 (N, H, W, 3). They are scored as
they are: crop photographs to the samples' size first. Memory is constant but for 4 kB per image scored.
"""
import math, os, sys, zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from encode import Stop, atomic, list_images, make_parser, open_rgb, pick_device, positive, run

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"               # its sha256 begins with 6726825d
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"

@contextmanager
def reading(path, failure, status=2):
    """Whatever goes wrong within (zlib, pickle, Pillow ... all have errors of their own) becomes a Stop."""
    try:
        yield
    except (Stop, MemoryError):
        raise
    except Exception as e:
        raise Stop(f"{path}: {failure} ({str(e).split('. ')[0][:200] or type(e).__name__})", status) from None

# ---------------------------------------------------------------- the network
def tf_resize(images):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [-1, 1), bilinear as in TensorFlow 1: pixel i comes
    from i * in/299 (no half-pixel shift), without antialiasing or rounding, all in float32."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    x = images
    for _ in "xy":                                             # along x, then, transposed, along y
        size = x.shape[3]
        at = torch.arange(299, device=x.device).float() * torch.tensor(size / 299, dtype=torch.float32)
        low = at.long()
        a, b = x[..., low].float(), x[..., (low + 1).clamp(max=size - 1)].float()
        x = (a + (b - a) * (at - low)).transpose(2, 3)
    return (x - 128) / 128

def conv(c_in, c_out, kernel):
    """Convolution, batch norm, ReLU. "1x7" is rows x columns, padded; "3x3/2" has stride 2 and no padding."""
    size, _, stride = kernel.partition("/")
    layer = nn.Conv2d(c_in, c_out, [int(k) for k in size.split("x")], int(stride or 1),
                      "valid" if stride else "same", bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(True)))

# Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it on 2015-12-05, with the names of
# pytorch-fid's state dict. A Mixed block is branches side by side: "48 64@5x5" is a 1x1 to 48 channels and a
# 5x5 to 64; N is the block's own width; 384@1x3@3x1 are two kernels on one input; _pool pools first.
A = {"1x1": "64", "5x5": "48 64@5x5", "3x3dbl": "64 96@3x3 96@3x3", "_pool": "N"}
B = {"3x3": "384@3x3/2", "3x3dbl": "64 96@3x3 96@3x3/2", "_pool": ""}
C = {"1x1": "192", "7x7": "N N@1x7 192@7x1", "7x7dbl": "N N@7x1 N@1x7 N@7x1 192@1x7", "_pool": "192"}
D = {"3x3": "192 320@3x3/2", "7x7x3": "192 192@1x7 192@7x1 192@3x3/2", "_pool": ""}
E = {"1x1": "320", "3x3": "384 384@1x3@3x1", "3x3dbl": "448 384@3x3 384@1x3@3x1", "_pool": "192"}
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)          # TensorFlow's mean leaves the padding out
MAX, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)         # MAX in 7c is an oddity of this graph: keep it
LAYERS = dict(
    Conv2d_1a_3x3=(3, 32, "3x3/2"), Conv2d_2a_3x3=(32, 32, "3x3/1"), Conv2d_2b_3x3=(32, 64, "3x3"),
    Conv2d_3b_1x1=(64, 80, "1x1"), Conv2d_4a_3x3=(80, 192, "3x3/1"),
    Mixed_5b=(192, A, 32, MEAN), Mixed_5c=(256, A, 64, MEAN), Mixed_5d=(288, A, 64, MEAN),
    Mixed_6a=(288, B, 0, HALVE), Mixed_6b=(768, C, 128, MEAN), Mixed_6c=(768, C, 160, MEAN),
    Mixed_6d=(768, C, 160, MEAN), Mixed_6e=(768, C, 192, MEAN),
    Mixed_7a=(768, D, 0, HALVE), Mixed_7b=(1280, E, 0, MEAN), Mixed_7c=(2048, E, 0, MAX))

class Mixed(nn.Module):
    def __init__(self, c_in, branches, width, pool):
        super().__init__()
        self.pool, self.chains = pool, {branch: [] for branch in branches}
        for branch, chain in branches.items():
            steps, c = chain.replace("N", str(width)).split(), c_in
            for i, step in enumerate(steps, 1):
                c_out, *kernels = step.split("@")
                units = [conv(c, int(c_out), kernel) for kernel in kernels or ["1x1"]]
                for unit, letter in zip(units, "ab" if len(units) > 1 else [""]):
                    self.add_module(f"branch{branch}" + f"_{i}" * (len(steps) > 1) + letter, unit)
                self.chains[branch].append(units)
                c = int(c_out)

    def forward(self, x):
        out = []
        for branch, chain in self.chains.items():
            h = [self.pool(x) if branch == "_pool" else x]
            for units in chain:
                h = [unit(h[0]) for unit in units]
            out += h
        return torch.cat(out, 1)

class Inception(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008). `weights`: pytorch-fid's state dict of 566
    tensors, the path of its file, or None to download it (96 MB, once, hash checked); raises Stop if it is
    another. Turns TF32 off for the whole process: its 10-bit mantissa would move the features."""
    def __init__(self, weights=None):
        super().__init__()
        for name, spec in LAYERS.items():
            self.add_module(name, (conv if name.startswith("Conv") else Mixed)(*spec))
        self.fc = nn.Linear(2048, 1008)
        where = "weights" if isinstance(weights, dict) else weights or "download"
        with reading(where, f"no Inception weights there; fetch {URL} and name the file with --weights",
                     status=1 if weights is None else 2), redirect_stdout(sys.stderr):
            if weights is None:
                weights = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True,
                                                             weights_only=True)
            elif where is weights:
                weights = torch.load(where, map_location="cpu", weights_only=True)
            self.load_state_dict(weights)
        self.eval()
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"

    @torch.inference_mode()
    def forward(self, images):
        x = tf_resize(images)                                                           # (B, 3, 299, 299)
        for name in LAYERS:
            x = self.get_submodule(name)(x)                    # 35x35 in 5, 17x17 from 6a, 8x8 from 7a
            x = HALVE(x) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else x
        features = x.mean((2, 3))                                                       # (B, 2048)
        return features, features @ self.fc.weight.T           # no bias, as in the first published score

# ---------------------------------------------------------------- statistics and scores
class Statistics:
    """`n`, `mean` (dim,) and covariance `cov` (dim, dim) of features that come in batches, in float64. Merged
    as by Chan, Golub & LeVeque (1979): plain sums of squares cancel where the mean is large."""
    cov = property(lambda self: self.scatter / (self.n - 1))

    def __init__(self, dim=2048):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, features):
        """features (B, dim), torch or numpy. Raises Stop where they are not finite or of another shape."""
        x = torch.as_tensor(features).detach().cpu().double().numpy()
        if x.shape[1:] != self.mean.shape or not len(x) or not np.isfinite(x).all():
            raise Stop(f"features {x.shape} should be (B, {len(self.mean)}), free of NaN and infinity", 1)
        n, shift = self.n + len(x), x.mean(0) - self.mean
        # The batch's own scatter and, as one more row, how far apart the two means are.
        rows = np.vstack([x - x.mean(0), shift * math.sqrt(self.n * len(x) / n)])       # (B + 1, dim)
        self.n, self.mean, self.scatter = n, self.mean + shift * (len(x) / n), self.scatter + rows.T @ rows

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Heusel et al. 2017 (1706.08500), (6): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); mu (D,), S (D, D).
    The last trace sums the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric; solvers for
    S1 S2 itself stray. May be barely negative. Raises ValueError on NaN, infinity and other shapes."""
    mu1, sigma1, mu2, sigma2 = given = [np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2)]
    d = mu1.shape[:1]
    if [x.shape for x in given] != [d, 2 * d, d, 2 * d] or not all(np.isfinite(x).all() for x in given):
        raise ValueError(f"expected finite (D,) and (D, D) twice, got {[x.shape for x in given]}")
    values, vectors = np.linalg.eigh(sigma1)
    half = vectors * np.sqrt(values.clip(0))      # S1 = half half^T: half^T S2 half has the same eigenvalues
    product = half.T @ sigma2 @ half
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(0))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())

def inception_score(logits, splits=10):
    """Salimans et al. 2016 (1606.03498): mean, population std over splits of exp(mean KL(p(y|x), p(y))), of
    logits (N, classes). Shuffled by torch-fidelity's seed: a split of class-ordered samples would miss most
    classes and score 30% lower. Raises ValueError on NaN, infinity or N < splits."""
    logits, n, scores = torch.as_tensor(logits), len(logits), []
    if n < splits or not logits.isfinite().all():
        raise ValueError(f"expected finite logits of at least {splits} images, got {n}")
    logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(n))]
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(1)  # (N / splits, classes)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))      # log of mean p, also where every p underflows
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

class DigitNet(nn.Module):
    """The demo's Inception: uint8 (B, 3, 32, 32) -> features (B, 64), logits (B, 10). Trained on the digits it is
    given, which takes seconds."""
    def __init__(self, images, labels, steps=250):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features = nn.Sequential(conv(3, 16, "3x3/2"), conv(16, 32, "3x3/2"), conv(32, 64, "3x3/2"), nn.Flatten(),
                                          nn.Linear(64 * 9, 64), nn.ReLU())
            self.head, order = nn.Linear(64, 10), torch.randint(len(images), (steps, 128))
        opt = torch.optim.Adam(self.parameters(), 2e-3)
        for batch in order:
            logits = self.head(self.features(images[batch] / 127.5 - 1))
            nn.functional.cross_entropy(logits, labels[batch]).backward()
            opt.step()
            opt.zero_grad()
        self.eval()

    @torch.inference_mode()
    def forward(self, images):
        features = self.features(images / 127.5 - 1)
        return features, self.head(features)

    def accuracy(self, images, labels):
        return (self(images)[1].argmax(1) == labels).float().mean().item()

# ---------------------------------------------------------------- images and reference files
def read_images(path, workers):
    """Folder or npz -> a generator of first the number of images, then each, uint8 (H, W, 3), in order."""
    if path.is_dir():
        def load(name):
            with reading(path / name, "not a readable image, and a score must not leave it out"):
                return np.array(open_rgb(path / name))
        names = list_images(path)
        yield len(names)
        with ThreadPoolExecutor(workers) as pool:
            ahead = []
            for start in range(0, len(names) + 64, 64):        # hands out 64 while the next 64 are decoded
                now, ahead = ahead, pool.map(load, names[start:start + 64])
                yield from now
        return
    with reading(path, "not a readable npz of images"), zipfile.ZipFile(path) as archive:
        file = archive.open("arr_0.npy")                       # streamed: 50,000 images of 256x256 are 9.8 GB
        major, _ = np.lib.format.read_magic(file)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
        if dtype != np.uint8 or fortran or len(shape) < 3 or shape[3:] not in ((), (1,), (3,), (4,)):
            raise Stop(f"{path}: arr_0 is {dtype} {shape}{', Fortran' * fortran}, not uint8 (N, H, W, 3)")
        yield shape[0]
        for _ in range(shape[0]):
            image = np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(*shape[1:3], -1)
            yield image[..., :3] if image.shape[2] > 1 else image.repeat(3, axis=2)     # alpha is dropped

def read_statistics(path):
    """npz -> mu (2048,), sigma (2048, 2048), n (None: unknown); or None where it holds images instead."""
    with reading(path, "not a readable npz"), np.load(path, allow_pickle=False) as file:
        ref = "ref_" * ("ref_mu" in file)
        if "arr_0" in file and ref + "mu" not in file:
            return None
        mu, sigma = (file[ref + key].astype(np.float64) for key in ("mu", "sigma"))
        if [mu.shape, sigma.shape] != [(2048,), (2048, 2048)] or not np.isfinite(mu.sum() + sigma.sum()):
            raise Stop(f"{path}: mu {mu.shape}, sigma {sigma.shape} should be finite (2048,), (2048, 2048)")
        return mu, sigma, int(file["n"]) if "n" in file else None

def extract(net, path, images, n, batch, scored):
    """n images through the network -> (mu, sigma, n), and their logits (n, 1008) if they are to be scored."""
    statistics, logits = Statistics(), []
    with tqdm(total=n, unit="image", desc=path.name) as bar:
        for _, same in groupby(images, np.shape):              # consecutive images of one size
            while group := list(islice(same, batch)):
                x = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)               # (B, 3, H, W)
                features, logit = net(x.to(net.fc.weight.device))                       # (B, 2048), (B, 1008)
                statistics.update(features)
                logits += [logit.cpu()] * scored
                bar.update(len(group))
    return (statistics.mean, statistics.cov, n), torch.cat(logits) if scored else None

# ---------------------------------------------------------------- the command line
def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or npz with arr_0")
    add("reference", type=Path, nargs="?", help="the same, or npz with mu and sigma (ref_mu and ref_sigma)")
    add("--save", type=Path, metavar="FILE", help="write the samples' mu, sigma and n: a reference for later")
    add("--weights", type=Path, metavar="FILE", help=f"a copy of {WEIGHTS} (else downloaded once, 96 MB)")
    add("--batch", type=positive, default=64, help="images per forward pass, as memory allows (%(default)s)")
    add("--workers", type=positive, default=os.cpu_count(), help="threads that decode images (%(default)s)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    args = parser.parse_args()

    # Everything is opened, and refused if need be, before the first image goes through the network.
    if args.save and (args.save.exists() or not os.access(args.save.parent, os.W_OK)):
        raise Stop(f"--save {args.save}: {'exists already' if args.save.exists() else 'cannot write there'}")
    device, scored = pick_device(args.device), bool(args.reference or not args.save)
    reference = read_statistics(args.reference) if args.reference and not args.reference.is_dir() else None
    paths = [args.samples] if reference or not args.reference else [args.samples, args.reference]
    sets = [(path, images, next(images)) for path in paths for images in [read_images(path, args.workers)]]
    for path, _, n in sets:
        if n < 10:
            raise Stop(f"{path}: {n} images; scores need 10 at the least, and thousands to mean something")
    net, how = Inception(args.weights).to(device), f"{args.weights or WEIGHTS}, TF1 resize"

    if sets[1:]:
        reference, _ = extract(net, *sets[1], args.batch, scored=False)
    (mu, sigma, n), logits = extract(net, *sets[0], args.batch, scored)
    if args.save:
        with atomic(args.save) as tmp, open(tmp, "wb") as file:        # dtypes as JiT's evaluation wants them
            np.savez(file, mu=mu.astype(np.float32), sigma=sigma, n=n, source=f"fid.py {args.samples}, {how}")
    line = f"n = {n:,} ({args.samples})"
    if scored:
        line = "Inception Score {:.2f} +- {:.2f} | {}".format(*inception_score(logits), line)
    if reference:
        mu2, sigma2, n2 = reference
        line = (f"FID {frechet_distance(mu, sigma, mu2, sigma2):.3f} | {line} against "
                f"{f'n = {n2:,}' if n2 else 'n unknown'} ({args.reference})")
    for path, count in ((args.samples, n), (args.reference, reference and reference[2])):
        if count and count < 50_000:
            print(f"fid.py: {path}: {count:,} images; below 50,000 scores are biased: compare at equal n only"
                  f"{'. Below 2,048 the covariance is singular' * (count < 2048)}", file=sys.stderr)
    print(f"{line} | {how}" + f" | saved to {args.save}" * bool(args.save))

if __name__ == "__main__":
    run(main)
