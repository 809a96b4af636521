"""FID and Inception Score of pictures, as torch-fidelity 0.4 computes them.

FID, the Frechet Inception Distance, says how far a set of pictures is from a set of real ones; 0 is
best. A network that was trained to tell 1,000 classes apart, Inception, makes 2,048 features of
each picture. Each set then has a mean and a covariance of features, and the distance is that of
the two Gaussians. The JLT paper (arXiv 2605.27102) reports FID of 50,000 samples against the
training set of ImageNet, whose statistics ADM (Dhariwal & Nichol 2021) has published.

    python fid.py samples/ VIRTUAL_imagenet256_labeled.npz     # ADM's reference statistics
    python fid.py samples.npz photos/                          # images against images
    python fid.py imagenet/train --size 256 --save in256.npz   # a reference of your own, then
    python fid.py samples/ in256.npz

Images are a folder, searched recursively, or an npz whose arr_0 is uint8 (N, H, W, 3). They are
scored as they are; --size crops those of folders, as encode.py does. Memory is constant but for
4 kB an image; some 130 images wait in it as they are, so crop large ones.
"""

import contextlib
import itertools
import math
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh, eigvalsh
from scipy.special import log_softmax, logsumexp
from torch import nn
from tqdm import tqdm

from encode import (
    center_crop,
    cores,
    explaining,
    list_images,
    make_parser,
    open_rgb,
    pick_device,
    processes,
    replacing,
    require,
    require_new,
    run_command,
)

# torch.hub compares the digits at the end of the name with the file's sha256.
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
FEATURES = 2048
CLASSES = 1008  # ImageNet's 1,000 and eight that were never used


# =============================================================== scores
def to_float64(x):
    """Tensor of any device, or array -> float64 array."""
    return torch.as_tensor(x).detach().cpu().double().numpy()


class Statistics:
    """Mean and covariance, in float64, of features that come in batches: `n`, `mean` (dim,) and
    `cov` (dim, dim), over n - 1."""

    def __init__(self, dim=FEATURES):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T

    @property
    def cov(self):
        return self.scatter / (self.n - 1)

    def update(self, features):
        """features (B, dim), torch or numpy. Raises Stop if they are of another shape or not
        finite."""
        x = to_float64(features)
        fits = x.shape[1:] == self.mean.shape and len(x) > 0
        wanted = f"should be (B, {len(self.mean)}), free of NaN and infinity"
        require(fits and np.isfinite(x).all(), f"features {x.shape} {wanted}", status=1)

        # Chan, Golub, LeVeque 1979: scatter = scatter_old + scatter_new
        #     + (n_old * n_new / n) * outer(shift, shift), the last term here as one more row.
        # Plain sums of squares would lose digits where the mean is large.
        n = self.n + len(x)
        shift = x.mean(0) - self.mean
        between = shift * math.sqrt(self.n * len(x) / n)
        rows = np.vstack([x - x.mean(0), between])
        self.scatter += rows.T @ rows
        self.mean = self.mean + shift * (len(x) / n)
        self.n = n


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, mu (D,) and sigma (D, D): Heusel et al. 2017
    (1706.08500), formula (6), |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    Rounding may leave it barely below 0. Raises Stop on NaN, infinity and other shapes."""
    given = [np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given
    dim = mu1.shape[:1]
    shapes = [x.shape for x in given]
    fits = shapes == [dim, dim + dim, dim, dim + dim]
    finite = all(np.isfinite(x).all() for x in given)
    require(
        fits and finite, f"expected finite mu (D,) and sigma (D, D) twice, got {shapes}", status=1
    )

    # The trace of a matrix's root is the sum of the roots of its eigenvalues. With S1 = R R^T,
    # S1 S2 has the eigenvalues of R^T S2 R, which is symmetric: its solver is stable and quick,
    # where solvers for S1 S2 itself stray if it is singular. Rounding may leave an eigenvalue
    # barely below 0.
    values, vectors = eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    values = eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(values.clip(0)).sum()

    means = ((mu1 - mu2) ** 2).sum()
    return float(means + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def inception_score(logits, splits=10):
    """Salimans et al. 2016 (1606.03498): exp(mean KL(p(y|x), p(y))) of each split of the logits
    (N, classes) -> mean and population standard deviation over the splits.

    Raises Stop on NaN, infinity or N < splits."""
    logits = torch.as_tensor(logits)
    n = len(logits)
    enough = n >= splits and logits.isfinite().all()
    require(enough, f"expected finite logits of at least {splits} images, got {n}", status=1)

    # Shuffled, by torch-fidelity's seed: a split of samples in the order of their classes would
    # hold few of them, and score 30% lower.
    order = np.random.RandomState(2020).permutation(n)
    bounds = [i * n // splits for i in range(splits + 1)]
    scores = []
    for start, end in itertools.pairwise(bounds):
        part = to_float64(logits[order[start:end]])  # (N / splits, classes)
        # In logarithms: a probability may be too small for a float.
        log_p = log_softmax(part, axis=1)
        log_mean_p = logsumexp(log_p, axis=0) - math.log(len(part))
        divergence = (np.exp(log_p) * (log_p - log_mean_p)).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


# =============================================================== the network
# Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it on 2015-12-05. Modules
# have the names of pytorch-fid's state dict. Where this graph is not the Inception v3 of other
# libraries, a comment says so: published scores rest on its oddities.


def resize_rows(x):
    """Every row of x (..., W) to 299 pixels, float32: pixel i is read at i * W / 299."""
    width = x.shape[-1]
    # In float32 as there; in float64 other pixels would be read.
    scale = torch.tensor(width / 299, dtype=torch.float32)
    position = torch.arange(299, device=x.device).float() * scale
    left = position.long()
    right = (left + 1).clamp(max=width - 1)
    a = x[..., left].float()
    b = x[..., right].float()
    return a + (b - a) * (position - left)


def tf_resize(images):
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [-1, 1), bit for bit as TensorFlow 1:
    bilinear, pixel i read at i * W / 299 (other libraries: at (i + 1/2) * W / 299 - 1/2), without
    antialiasing or rounding. Raises Stop for other input."""
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    got = f"{images.dtype} {tuple(images.shape)}"
    require(fits, f"expected images uint8 (B, 3, H, W), got {got}")
    x = resize_rows(images)  # (B, 3, H, 299)
    x = resize_rows(x.mT).mT  # (B, 3, 299, 299)
    return (x - 128) / 128


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. A kernel (1, 7) is one row, seven columns."""

    def __init__(self, channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
        # TensorFlow's epsilon; torch's is 1e-5.
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def mean_pool(x):
    """3x3 mean that keeps the size. TensorFlow divides by the pixels inside the picture, torch by
    nine unless it is told otherwise."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """3x3 maximum that keeps the size."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """3x3 maximum of every second pixel."""
    return F.max_pool2d(x, 3, stride=2)


def chain(x, *layers):
    for layer in layers:
        x = layer(x)
    return x


# A Mixed block is branches side by side, whose outputs are stacked as channels.
class MixedA(nn.Module):
    """35x35 pixels: Mixed_5b, 5c and 5d."""

    def __init__(self, channels, pool_channels):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(channels, pool_channels, 1)

    def forward(self, x):
        branches = [
            self.branch1x1(x),
            chain(x, self.branch5x5_1, self.branch5x5_2),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            chain(x, mean_pool, self.branch_pool),
        ]
        return torch.cat(branches, 1)


class MixedB(nn.Module):
    """35x35 to 17x17: Mixed_6a."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding="valid")

    def forward(self, x):
        branches = [
            self.branch3x3(x),
            chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            halve(x),
        ]
        return torch.cat(branches, 1)


class MixedC(nn.Module):
    """17x17: Mixed_6b to 6e. A 7x7 kernel is split into a row and a column of `width` channels."""

    def __init__(self, channels, width):
        super().__init__()
        row = (1, 7)
        column = (7, 1)
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2 = Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, column)
        self.branch7x7dbl_3 = Conv(width, width, row)
        self.branch7x7dbl_4 = Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        double = chain(x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3)
        branches = [
            self.branch1x1(x),
            chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            chain(double, self.branch7x7dbl_4, self.branch7x7dbl_5),
            chain(x, mean_pool, self.branch_pool),
        ]
        return torch.cat(branches, 1)


class MixedD(nn.Module):
    """17x17 to 8x8: Mixed_7a."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding="valid")

    def forward(self, x):
        square = chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3)
        branches = [
            chain(x, self.branch3x3_1, self.branch3x3_2),
            self.branch7x7x3_4(square),
            halve(x),
        ]
        return torch.cat(branches, 1)


class MixedE(nn.Module):
    """8x8: Mixed_7b and 7c. Here the row and the column of a 3x3 stand side by side."""

    def __init__(self, channels, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            chain(x, self.pool, self.branch_pool),
        ]
        return torch.cat(branches, 1)


def load_weights(path):
    """-> the state dict in a file; for None, of the file downloaded once (96 MB)."""
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    # The hub says on stdout what it fetches; there, the score stands alone.
    with contextlib.redirect_stdout(sys.stderr):
        return torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", check_hash=True, weights_only=True
        )


class Inception(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008), float32.

    `weights`: the state dict of 566 tensors that pytorch-fid and torch-fidelity use, a file that
    holds it, or None to download it. Raises Stop for others. Turns TF32 off in this process: it
    would move the features."""

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = MixedA(192, pool_channels=32)
        self.Mixed_5c = MixedA(256, pool_channels=64)
        self.Mixed_5d = MixedA(288, pool_channels=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, width=128)
        self.Mixed_6c = MixedC(768, width=160)
        self.Mixed_6d = MixedC(768, width=160)
        self.Mixed_6e = MixedC(768, width=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, mean_pool)
        # Only here: a maximum. An oddity of the released graph, which its scores rest on.
        self.Mixed_7c = MixedE(2048, max_pool)
        self.fc = nn.Linear(FEATURES, CLASSES)

        is_state = isinstance(weights, dict)
        name = WEIGHTS if weights is None or is_state else weights
        advice = f"no Inception weights; fetch {URL} and name the file with --weights"
        with explaining(name, advice, status=1 if weights is None else 2):
            self.load_state_dict(weights if is_state else load_weights(weights))
        self.eval()
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.cuda.matmul.fp32_precision = "ieee"

    @torch.inference_mode()
    def forward(self, images):
        x = tf_resize(images)  # (B, 3, 299, 299)
        x = chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = halve(x)  # (B, 64, 73, 73)
        x = chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = halve(x)  # (B, 192, 35, 35)
        x = chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d)  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = chain(x, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        x = chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)  # (B, 2048, 8, 8)
        features = x.mean((2, 3))  # (B, 2048)
        # Without fc.bias, as in the first published Inception Score and in all since.
        logits = features @ self.fc.weight.T  # (B, 1008)
        return features, logits


# =============================================================== images and statistics in files
WANTED = (
    "give a folder of images or an npz whose arr_0 is uint8 (N, H, W, 3); "
    "the reference may also be an npz with mu and sigma"
)
NO_NPZ = f"no npz, or a damaged one; {WANTED}"


def array_names(path):
    """-> names of the arrays in an npz; [] for a folder. Raises Stop where `path` is neither."""
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir():
        return []
    with explaining(path, NO_NPZ), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def holds_statistics(path):
    names = array_names(path)
    return "mu" in names or "ref_mu" in names


class FolderImages:
    """The images in a folder and below it, uint8 (H, W, 3), in the order of their names."""

    def __init__(self, path, size):
        self.path = path
        self.size = size  # of a square crop; None: the images as they are
        self.names = list_images(path)

    def __len__(self):
        return len(self.names)

    def read(self, name):
        advice = "not a readable image, and a score must not leave it out"
        with explaining(self.path / name, advice):
            image = open_rgb(self.path / name)
            if self.size:
                image = center_crop(image, self.size)
            return np.array(image)

    def __iter__(self):
        """Gives out 64 images while threads decode the next 64."""
        with ThreadPoolExecutor(cores()) as pool:
            ahead = pool.map(self.read, self.names[:64])
            for start in range(64, len(self) + 64, 64):
                now = ahead
                ahead = pool.map(self.read, self.names[start : start + 64])
                yield from now


class NpzImages:
    """The images of an npz's arr_0, uint8 (H, W, 3). They are read one by one from the zip: 50,000
    of 256x256 are 9.8 GB."""

    def __init__(self, path):
        self.path = path
        with self.open_array() as (_, shape):
            self.shape = shape

    def __len__(self):
        return self.shape[0]

    @contextlib.contextmanager
    def open_array(self):
        """Yields arr_0 as a stream of bytes, and its shape."""
        with (
            explaining(self.path, NO_NPZ),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as file,
        ):
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            # Grey, grey, RGB, RGB and alpha.
            channels_last = len(shape) >= 3 and shape[3:] in [(), (1,), (3,), (4,)]
            fits = dtype == np.uint8 and channels_last and not fortran_order
            order = ", in Fortran order" if fortran_order else ""
            require(fits, f"{self.path}: arr_0 is {dtype} {shape}{order}; {WANTED}")
            yield file, shape

    def __iter__(self):
        """At the last image, zipfile compares the checksum of all."""
        n, height, width = self.shape[:3]
        size = math.prod(self.shape[1:])
        with self.open_array() as (file, _):
            for _ in range(n):
                image = np.frombuffer(file.read(size), np.uint8).reshape(height, width, -1)
                if image.shape[2] == 1:
                    image = image.repeat(3, axis=2)
                yield image[:, :, :3]


def open_images(path, size=None):
    """-> FolderImages or NpzImages. Raises Stop if there are no images, or fewer than 10."""
    if path.is_dir():
        images = FolderImages(path, size)
    else:
        has_images = "arr_0" in array_names(path)
        swapped = holds_statistics(path) and not has_images
        require(not swapped, f"{path}: these are statistics; they go second: fid.py SAMPLES {path}")
        require(has_images, f"{path}: has no arr_0; {WANTED}")
        images = NpzImages(path)
    few = f"{path}: {len(images)} images; scores need 10, and thousands to mean something"
    require(len(images) >= 10, few)
    return images


class SavedStatistics(NamedTuple):
    """Of a file; named as those of Statistics are."""

    mean: np.ndarray  # (2048,)
    cov: np.ndarray  # (2048, 2048)
    n: int | None  # None: the file does not say


def read_statistics(path):
    """An npz with mu and sigma, or ref_mu and ref_sigma -> SavedStatistics. ADM's file also holds
    some of the images; they are not read, since mu and sigma are of all of them."""
    with explaining(path, NO_NPZ), np.load(path, allow_pickle=False) as file:
        prefix = "ref_" if "ref_mu" in file else ""
        mu = file[prefix + "mu"].astype(np.float64)
        sigma = file[prefix + "sigma"].astype(np.float64)
        n = int(file["n"]) if "n" in file else None
    fits = mu.shape == (FEATURES,) and sigma.shape == (FEATURES, FEATURES)
    fits = fits and np.isfinite(mu).all() and np.isfinite(sigma).all() and np.trace(sigma) >= 0
    wanted = f"should be finite, ({FEATURES},) and a covariance ({FEATURES}, {FEATURES})"
    require(fits, f"{path}: mu {mu.shape} and sigma {sigma.shape} {wanted}")
    return SavedStatistics(mu, sigma, n)


def save_statistics(path, statistics, source):
    """Writes what read_statistics reads."""
    # A file, since np.savez would add .npz to a name.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            # JiT's evaluation code expects mu as float32 and sigma as float64.
            mu=statistics.mean.astype(np.float32),
            sigma=statistics.cov,
            n=statistics.n,
            source=source,
        )


# =============================================================== the command
def warn(line):
    # tqdm's, since a progress bar may stand there.
    tqdm.write(f"fid.py: {line}", file=sys.stderr)


def batches(images, most=64):
    """Lists of consecutive images of one size, at most so many."""
    batch = []
    for image in images:
        if batch and (len(batch) == most or image.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(image)
    yield batch


def note_size(size, path, sizes):
    """Warns when images of a second size turn up, of the same set or of the other. `sizes` holds
    where each size was first seen."""
    if size in sizes:
        return
    sizes[size] = path
    if len(sizes) == 2:
        seen = " and ".join(f"{size} pixels ({path})" for size, path in sizes.items())
        warn(f"images of more than one size are scored: {seen}; --size crops those of folders")


def measure(net, images, sizes):
    """Takes all images through the network -> Statistics, logits (N, 1008)."""
    statistics = Statistics()
    logits = torch.empty(len(images), CLASSES)
    device = net.fc.weight.device
    with tqdm(total=len(images), desc=images.path.name, unit="image") as bar:
        for batch in batches(images):
            height, width, _ = batch[0].shape
            note_size(f"{width}x{height}", images.path, sizes)
            x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)  # (B, 3, H, W)
            features, batch_logits = net(x.to(device))
            done = statistics.n
            statistics.update(features)
            logits[done : statistics.n] = batch_logits
            bar.update(len(batch))
    return statistics, logits


def warn_if_few(path, n):
    if n is None or n >= 50_000:
        return
    line = f"{path}: {n:,} images; below 50,000 scores are biased: compare at equal n only"
    if n <= FEATURES:
        line += f". Up to {FEATURES:,} the covariance is singular"
    warn(line)


def same_images(a, b):
    """Whether two Statistics are of the same images. Files hold the mean as float32."""

    def close(x, y):
        return np.abs(x - y).max() <= 1e-5 * np.abs(y).max()

    return close(a.mean, b.mean) and close(a.cov, b.cov)


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or npz with arr_0")
    add("reference", type=Path, nargs="?", help="the same, or npz with mu and sigma")
    add("--size", type=int, metavar="S", help="crop the images of folders to S x S pixels")
    add("--save", type=Path, metavar="FILE", help="write the samples' mu, sigma and n there")
    add("--weights", type=Path, metavar="FILE", help=f"{WEIGHTS} (else downloaded once, 96 MB)")
    args = parser.parse_args()
    _, world = processes()
    require(world == 1, "fid.py is for one process: start it with python, not torchrun")
    if args.size is not None:
        require(args.size > 0, f"--size {args.size}: must be positive")
        first = f"to crop a reference: fid.py FOLDER --size {args.size} --save FILE"
        require(not args.samples.is_file(), f"--size: {args.samples} is no folder; {first}")
    if args.save:
        require_new(args.save)
    return args


def main():
    # Everything is opened, and refused if need be, before the network runs.
    args = parse_arguments()
    samples = open_images(args.samples, args.size)
    reference = None
    reference_images = None
    if args.reference and holds_statistics(args.reference):
        reference = read_statistics(args.reference)
    elif args.reference:
        reference_images = open_images(args.reference, args.size)
    net = Inception(args.weights).to(pick_device())

    sizes = {}
    statistics, logits = measure(net, samples, sizes)
    if args.save:
        source = f"fid.py {args.samples}"
        if args.size:
            source += f" --size {args.size}"
        save_statistics(args.save, statistics, source)
    if reference_images is not None:
        reference, _ = measure(net, reference_images, sizes)

    mean, deviation = inception_score(logits)
    line = f"Inception Score {mean:.2f} +- {deviation:.2f} | n = {statistics.n} ({args.samples})"
    warn_if_few(args.samples, statistics.n)
    if reference is not None:
        distance = frechet_distance(statistics.mean, statistics.cov, reference.mean, reference.cov)
        # Adding 0 makes a 0 of the -0 that rounding may leave.
        distance = round(distance, 3) + 0
        against = f"against n = {reference.n or 'unknown'} ({args.reference})"
        line = f"FID {distance:.3f} | {line} {against}"
        warn_if_few(args.reference, reference.n)
        if same_images(statistics, reference):
            warn(f"{args.samples} and {args.reference}: both sides are the same images")

    line += f" | {args.weights or WEIGHTS}, TF1 resize"
    if args.save:
        line += f" | saved to {args.save}"
    print(line)


if __name__ == "__main__":
    run_command(main)
