"""FID and Inception Score as torch-fidelity 0.4 computes them, which is what the paper reports.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz   # ADM's reference (of it, only mu and sigma)
    python fid.py samples/ photos/                              # two folders of images
    python fid.py photos/ --save stats.npz                      # a reference of my own, for any later SAMPLES

Images are a folder, searched recursively, or an npz whose arr_0 is uint8 (N, H, W, 3), scored as they are: crop
photographs to the samples' size first. Memory is constant but for 4 kB an image.
"""
import argparse, math, os, re, sys, zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch, torch.nn as nn
from PIL import Image
from tqdm import tqdm

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"      # its sha256 begins with 6726825d
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".mpo")
RANK, WORLD, LOCAL = (int(os.environ.get(k, n)) for k, n in dict(RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1).items())   # torchrun's
PARSER = dict(usage=argparse.SUPPRESS, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
FAULTS = {"DataLoader worker": "lower --workers", "gloo|NCCL|TCPStore": "lost the other processes; the same command continues",
          "out of memory|allocate": "out of memory; lower --batch (encode.py) or --micro-batch (jlt.py)"}      # torch's words

# ---------------------------------------------------------------- faults and files, for all three programs
class Stop(ValueError):
    """Stop(line, status=2): a fault that one line explains; exit status 2 for bad usage, 1 for a fault on the way."""

def need(condition, line, status=2):
    if not condition:
        raise Stop(line, status)

@contextmanager
def reading(what, advice, status=2, faults=Exception):
    """Makes a Stop of whatever goes wrong within: Pillow, zip, pickle, safetensors, the hub all have their own errors."""
    try:
        yield
    except (Stop, MemoryError):
        raise
    except faults as e:
        reason = getattr(e, "strerror", None) or str(e).split(". ")[0][:200] or type(e).__name__
        raise Stop(f"{what}: {advice} ({reason})", status) from None

def run(main):
    """Calls main(); a foreseeable fault becomes one line on stderr and an exit status, not a traceback."""
    try:
        return main()
    except Stop as e:
        line, status = (*e.args, 2)[:2]
    except KeyboardInterrupt:
        line, status = "interrupted; what was finished is kept", 130
    except OSError as e:                              # disk full, no permission, a network drive gone
        line, status = f"{e.filename or 'a file'}: {e.strerror or e}; what was finished is kept", 1
    except (MemoryError, RuntimeError) as e:          # torch's, gloo's and NCCL's are RuntimeErrors
        fault = str(e) or "out of memory"
        if not (advice := [FAULTS[words] for words in FAULTS if re.search(words, fault)]):
            raise
        line, status = f"{advice[0]} ({fault[:200].split('. ')[0]})", 1
    print(f"{Path(sys.argv[0]).name}: {f'[rank {RANK}] ' * (RANK > 0)}{' '.join(line.split())}", file=sys.stderr)
    sys.exit(status)

@contextmanager
def atomic(path):
    """Yields a temporary name, renamed to `path` on success: readers find the old file or all of the new one."""
    path, tmp = Path(path), Path(path).with_name(f".tmp.{os.getpid()}.{Path(path).name}")
    try:
        with reading(path, "cannot be written; disk full? another process? What was there is intact", 1, (OSError, RuntimeError)):
            [left.unlink(True) for left in path.parent.glob(f".tmp.[0-9]*.{path.name}")]    # of a process that was killed
            yield tmp
            with open(tmp, "rb+") as file:
                os.fsync(file)                        # after a power cut, too
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

# ---------------------------------------------------------------- images
def list_images(folder):
    """Sorted paths, relative to `folder`, of the image files in it and below it (known by extension)."""
    return sorted(os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(folder)
                  for file in files if file.lower().endswith(EXTENSIONS) and file[0] != ".")

def open_rgb(path):
    """Any image file as RGB: its first frame, alpha dropped, not rotated by EXIF (ImageNet's convention). 16-bit
    grayscale is scaled to 8 bits; Pillow's convert alone would make it white."""
    need(os.path.isfile(path), f"{path}: no file")    # but a pipe, say, on which open would wait for ever
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        image.info.pop("transparency", None)          # of a palette: Pillow would warn, and refuse to save the result
        return image.convert("RGB")

def read_images(path):
    """Folder or npz -> a generator of first the number of images, then each, uint8 (H, W, 3), in order."""
    if path.is_dir():
        def load(name):
            with reading(path / name, "not a readable image, and a score must not leave it out"):
                return np.array(open_rgb(path / name))
        yield len(names := list_images(path))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ahead = []
            for start in range(0, len(names) + 64, 64):                   # hands out 64 while the next 64 are decoded
                now, ahead = ahead, pool.map(load, names[start:start + 64])
                yield from now
        return
    with reading(path, "not a readable npz of images"), zipfile.ZipFile(path) as archive:
        file = archive.open("arr_0.npy")              # streamed: 50,000 images of 256x256 are 9.8 GB
        major, _ = np.lib.format.read_magic(file)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
        need(dtype == np.uint8 and not fortran and len(shape) > 2 and shape[3:] in ((), (1,), (3,), (4,)),
             f"{path}: arr_0 is {dtype} {shape}{', Fortran' * fortran}, not uint8 (N, H, W, 3)")
        yield shape[0]
        for _ in range(shape[0]):
            image = np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(*shape[1:3], -1)
            yield image[..., :3] if image.shape[2] > 1 else image.repeat(3, axis=2)     # alpha is dropped

# ---------------------------------------------------------------- the network
def tf_resize(x):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [-1, 1), bilinear as in TensorFlow 1: pixel i comes from
    i * in/299 (no half-pixel shift), without antialiasing or rounding, all in float32. Raises Stop for other input."""
    need(x.dtype == torch.uint8 and x.shape[1:-2] == (3,), f"expected uint8 (B, 3, H, W), got {x.dtype} {tuple(x.shape)}")
    for size in (x.shape[3], x.shape[2]):             # along x, then, transposed, along y
        at = torch.arange(299, device=x.device).float() * torch.tensor(size / 299, dtype=torch.float32)
        low = at.long()
        a, b = x[..., low].float(), x[..., (low + 1).clamp(max=size - 1)].float()
        x = (a + (b - a) * (at - low)).transpose(2, 3)
    return (x - 128) / 128

def conv(c_in, c_out, kernel):
    """Convolution, batch norm, ReLU. "1x7" is rows x columns, padded; "3x3/2" has stride 2 and no padding."""
    size, _, stride = kernel.partition("/")
    layer = nn.Conv2d(c_in, c_out, [*map(int, size.split("x"))], int(stride or 1), "valid" if stride else "same", bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(True)))

# Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it on 2015-12-05, with the names of pytorch-fid's
# state dict. A Mixed block is branches side by side: "48 64@5x5" is a 1x1 to 48 channels and a 5x5 to 64; N is the block's
# own width; 384@1x3@3x1 are two kernels on one input; _pool pools first.
A = {"1x1": "64", "5x5": "48 64@5x5", "3x3dbl": "64 96@3x3 96@3x3", "_pool": "N"}
B = {"3x3": "384@3x3/2", "3x3dbl": "64 96@3x3 96@3x3/2", "_pool": ""}
C = {"1x1": "192", "7x7": "N N@1x7 192@7x1", "7x7dbl": "N N@7x1 N@1x7 N@7x1 192@1x7", "_pool": "192"}
D = {"3x3": "192 320@3x3/2", "7x7x3": "192 192@1x7 192@7x1 192@3x3/2", "_pool": ""}
E = {"1x1": "320", "3x3": "384 384@1x3@3x1", "3x3dbl": "448 384@3x3 384@1x3@3x1", "_pool": "192"}
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False) # TensorFlow's mean leaves the padding out
MAX, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)                    # MAX in 7c is an oddity of this graph: keep it
LAYERS = dict(
    Conv2d_1a_3x3=(3, 32, "3x3/2"), Conv2d_2a_3x3=(32, 32, "3x3/1"), Conv2d_2b_3x3=(32, 64, "3x3"),
    Conv2d_3b_1x1=(64, 80, "1x1"), Conv2d_4a_3x3=(80, 192, "3x3/1"),
    Mixed_5b=(192, A, 32, MEAN), Mixed_5c=(256, A, 64, MEAN), Mixed_5d=(288, A, 64, MEAN),
    Mixed_6a=(288, B, 0, HALVE), Mixed_6b=(768, C, 128, MEAN), Mixed_6c=(768, C, 160, MEAN), Mixed_6d=(768, C, 160, MEAN),
    Mixed_6e=(768, C, 192, MEAN), Mixed_7a=(768, D, 0, HALVE), Mixed_7b=(1280, E, 0, MEAN), Mixed_7c=(2048, E, 0, MAX))

class Mixed(nn.Module):
    def __init__(self, c_in, branches, width, pool):
        super().__init__()
        self.pool, self.chains = pool, {branch: [] for branch in branches}
        for branch, chain in branches.items():
            c, steps = c_in, [step.split("@") for step in chain.replace("N", str(width)).split()]
            for i, (c_out, *kernels) in enumerate(steps, 1):
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
    """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008). `weights`: pytorch-fid's state dict of 566 tensors, its file,
    or None: downloaded once (96 MB, hash checked). Raises Stop for others. Turns TF32 off, which moves the features."""
    def __init__(self, weights=None):
        super().__init__()
        for name, spec in LAYERS.items():
            self.add_module(name, (conv if name.startswith("Conv") else Mixed)(*spec))
        self.fc = nn.Linear(2048, 1008)
        with redirect_stdout(sys.stderr), reading("Inception" if isinstance(weights, dict) else weights or "download",
                f"no Inception weights; fetch {URL} and name the file with --weights", 1 if weights is None else 2):
            if weights is None:
                weights = torch.hub.load_state_dict_from_url(URL, map_location="cpu", check_hash=True, weights_only=True)
            self.load_state_dict(weights if isinstance(weights, dict) else torch.load(weights, "cpu", weights_only=True))
        self.eval()
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"

    @torch.inference_mode()
    def forward(self, images):
        x = tf_resize(images)                                             # (B, 3, 299, 299)
        for name in LAYERS:
            x = self.get_submodule(name)(x)           # 35x35 in 5, 17x17 from 6a, 8x8 from 7a
            x = HALVE(x) if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3") else x
        features = x.mean((2, 3))                                         # (B, 2048)
        return features, features @ self.fc.weight.T  # no bias, as in the first published score

# ---------------------------------------------------------------- statistics and scores
class Statistics:
    """`n`, `mean` (dim,) and covariance `cov` (dim, dim) of features that come in batches, in float64. Merged as by
    Chan, Golub & LeVeque (1979): plain sums of squares cancel where the mean is large."""
    cov = property(lambda self: self.scatter / (self.n - 1))
    def __init__(self, dim=2048):
        self.n, self.mean, self.scatter = 0, np.zeros(dim), np.zeros((dim, dim))

    def update(self, features):
        """features (B, dim), torch or numpy. Raises Stop where they are not finite or of another shape."""
        x = torch.as_tensor(features).detach().cpu().double().numpy()
        need(x.shape[1:] == self.mean.shape and len(x) and np.isfinite(x).all(),
             f"features {x.shape} should be (B, {len(self.mean)}), free of NaN and infinity", 1)
        n, shift = self.n + len(x), x.mean(0) - self.mean
        rows = np.vstack([x - x.mean(0), shift * math.sqrt(self.n * len(x) / n)])       # the last: how far apart the means are
        self.n, self.mean, self.scatter = n, self.mean + shift * (len(x) / n), self.scatter + rows.T @ rows

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Heusel et al. 2017 (1706.08500), (6): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); mu (D,), S (D, D).
    The last trace sums the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric; solvers for
    S1 S2 itself stray. May be barely negative. Raises Stop on NaN, infinity and other shapes."""
    mu1, sigma1, mu2, sigma2 = given = [np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2)]
    d = mu1.shape[:1]
    need([x.shape for x in given] == [d, 2 * d, d, 2 * d] and all(np.isfinite(x).all() for x in given),
         f"expected finite mu (D,) and sigma (D, D) twice, got {[x.shape for x in given]}", 1)
    values, vectors = np.linalg.eigh(sigma1)
    half = vectors * np.sqrt(values.clip(0))          # S1 = half half^T: half^T S2 half has the same eigenvalues
    roots = np.sqrt(np.linalg.eigvalsh(half.T @ sigma2 @ half).clip(0))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())

def inception_score(logits, splits=10):
    """Salimans et al. 2016 (1606.03498): mean, population std over splits of exp(mean KL(p(y|x), p(y))), of logits
    (N, classes). Shuffled by torch-fidelity's seed: a split of class-ordered samples would miss most classes and score
    30% lower. Raises Stop on NaN, infinity or N < splits."""
    logits, n, scores = torch.as_tensor(logits), len(logits), []
    need(n >= splits and logits.isfinite().all(), f"expected finite logits of at least {splits} images, got {n}", 1)
    logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(n))]
    for i in range(splits):
        log_p = logits[i * n // splits:(i + 1) * n // splits].double().log_softmax(1)   # (N / splits, classes)
        log_q = log_p.logsumexp(0) - math.log(len(log_p))                 # log of mean p, also where every p underflows
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))

# ---------------------------------------------------------------- the command line
def read_statistics(path):
    """npz -> mu (2048,), sigma (2048, 2048), n (None: unknown); or None where it holds images instead."""
    with reading(path, "not a readable npz"), np.load(path, allow_pickle=False) as file:
        ref = "ref_" * ("ref_mu" in file)
        if "arr_0" in file and ref + "mu" not in file:
            return None
        mu, sigma = (file[ref + key].astype(np.float64) for key in ("mu", "sigma"))
        need([mu.shape, sigma.shape] == [(2048,), (2048, 2048)] and np.isfinite(mu.sum() + sigma.sum()) and sigma.trace() >= 0,
             f"{path}: mu {mu.shape}, sigma {sigma.shape} should be finite (2048,), and a covariance (2048, 2048)")
        return mu, sigma, int(file["n"]) if "n" in file else None

def extract(net, path, images, n):
    """n images through the network, 64 at a time -> mean, covariance, n, logits (n, 1008)."""
    statistics, logits = Statistics(), []
    for _, same in groupby(tqdm(images, path.name, n, unit="image"), np.shape):         # consecutive images of one size
        while group := list(islice(same, 64)):
            x = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)     # (B, 3, H, W)
            features, logit = net(x.to(net.fc.weight.device))             # (B, 2048), (B, 1008)
            statistics.update(features)
            logits.append(logit.cpu())
    return statistics.mean, statistics.cov, n, torch.cat(logits)

def main():
    parser = argparse.ArgumentParser(description=__doc__, **PARSER)
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or npz with arr_0")
    add("reference", type=Path, nargs="?", help="the same, or npz with mu and sigma (ref_mu and ref_sigma)")
    add("--save", type=Path, metavar="FILE", help="write the samples' mu, sigma and n: a reference for later")
    add("--weights", type=Path, metavar="FILE", help=f"a copy of {WEIGHTS} (else downloaded once, 96 MB)")
    args = parser.parse_args()                        # now open everything, and refuse it if need be, before the network runs
    need(not (save := args.save) or os.access(save.parent, os.W_OK) and not save.exists(), f"--save {save}: exists, or no such folder")
    need(WORLD == 1, "fid.py is for one process")
    reference = read_statistics(args.reference) if args.reference and not args.reference.is_dir() else None
    paths = [args.samples] if reference or not args.reference else [args.samples, args.reference]
    sets = [(path, images, next(images)) for path in paths for images in [read_images(path)]]
    for path, _, n in sets:
        need(n >= 10, f"{path}: {n} images; scores need 10 at the least, and thousands to mean something")
    net = Inception(args.weights).to(torch.accelerator.current_accelerator(True) or "cpu")
    (mu, sigma, n, logits), *other = [extract(net, *images) for images in sets]
    if args.save:
        with atomic(args.save) as tmp, open(tmp, "wb") as file:           # dtypes as JiT's evaluation wants them
            np.savez(file, mu=mu.astype(np.float32), sigma=sigma, n=n, source=f"fid.py {args.samples}")
    line = "Inception Score {:.2f} +- {:.2f} | n = {} ({})".format(*inception_score(logits), n, args.samples)
    if args.reference:
        mu2, sigma2, n2, *_ = reference or other[0]
        line = f"FID {frechet_distance(mu, sigma, mu2, sigma2):.3f} | {line} against n = {n2 or 'unknown'} ({args.reference})"
    for path, count in (args.samples, n), (args.reference, args.reference and n2):
        if count and count < 50_000:
            print(f"fid.py: {path}: {count:,} images; below 50,000 scores are biased: compare at equal n only"
                  f"{'. Up to 2,048 the covariance is singular' * (count <= 2048)}", file=sys.stderr)
    print(f"{line} | {args.weights or WEIGHTS}, TF1 resize" + f" | saved to {args.save}" * bool(args.save))

if __name__ == "__main__":
    run(main)
