"""FID and Inception Score of pictures, as torch-fidelity 0.4 computes them.

FID, the Frechet Inception Distance, says how far a set of pictures is from a set of real ones; 0 is
best. Inception, a classifier of ImageNet, turns each picture into 2,048 features. Each set becomes
a Gaussian, the mean and the covariance of its features, and FID is the distance between the two
Gaussians. The Inception Score needs no real pictures: it is high where the classifier is sure of
each picture and finds many classes in all of them.

The JLT paper (arXiv 2605.27102) reports FID of 50,000 samples against the training set of ImageNet,
whose statistics ADM (Dhariwal & Nichol 2021) has published.

    python fid.py samples/ VIRTUAL_imagenet256_labeled.npz     # ADM's reference statistics
    python fid.py samples/ photos/ --size 256                  # pictures against pictures
    python fid.py imagenet/train --size 256 --save in256.npz   # a reference of your own, then
    python fid.py samples/ in256.npz

Pictures are a folder, searched recursively, or an npz whose arr_0 is uint8 (N, H, W, 3), which is
loaded whole. They are scored as they are stored; --size turns and crops those of folders, as
encode.py does.
"""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh, eigvalsh
from scipy.special import log_softmax, logsumexp
from torch import nn
from tqdm import tqdm

from encode import (
    Stop,
    center_crop,
    cores,
    is_picture,
    list_files,
    make_parser,
    open_rgb,
    pick_device,
    positive,
    replacing,
    require,
    run_command,
    stop_on_error,
)

# torch.hub compares the digits at the end of the name with the file's sha256.
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"
FEATURES = 2048
CLASSES = 1008  # ImageNet's 1,000 and eight that were never used
BATCH = 64  # pictures that go through the network together


# =============================================================== scores
class Statistics:
    """Mean and covariance, in float64, of features that come in batches: `n`, how many there were,
    `mean` (dim,) and `cov` (dim, dim), divided by n - 1."""

    def __init__(self, dim=FEATURES):
        self.n = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))  # sum of (x - mean)(x - mean)^T

    @property
    def cov(self):
        return self.scatter / (self.n - 1)

    def update(self, features):
        """features (B, dim), numpy or torch on the CPU. Raises Stop if they are not finite."""
        x = np.asarray(features, np.float64)
        require(np.isfinite(x).all(), "the features hold NaN or infinity")

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

    Rounding may leave it barely below 0."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))

    # The trace of a matrix's root is the sum of the roots of its eigenvalues. With S1 = R R^T,
    # S1 S2 has the eigenvalues of R^T S2 R, which is symmetric: its solver is stable and quick,
    # where solvers for S1 S2 itself fail if it is singular. Rounding may leave an eigenvalue
    # barely below 0.
    values, vectors = eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0))
    values = eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(values.clip(0)).sum()

    means = ((mu1 - mu2) ** 2).sum()
    return float(means + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def inception_score(logits, splits=10):
    """Salimans et al. 2016 (1606.03498): how much the classes p(y|x) that a picture is given differ
    from those of all pictures, p(y), as exp(mean KL(p(y|x), p(y))). Logits (N, classes) are split
    into parts of N / splits -> mean and population standard deviation over the parts."""
    # Shuffled, by torch-fidelity's seed: of samples in the order of their classes a part would hold
    # few classes, and score 30% lower.
    n = len(logits)
    order = np.random.RandomState(2020).permutation(n)
    scores = []
    for i in range(splits):
        numbers = order[i * n // splits : (i + 1) * n // splits]
        part = np.asarray(logits[numbers], np.float64)  # (N / splits, classes)
        # In logarithms: a probability may be too small for a float.
        log_p = log_softmax(part, axis=1)
        log_mean_p = logsumexp(log_p, axis=0) - math.log(len(part))
        divergence = (np.exp(log_p) * (log_p - log_mean_p)).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


# =============================================================== the network
# Inception v3 (Szegedy et al. 2015, 1512.00567) as TensorFlow released it on 2015-12-05. Modules
# have the names of pytorch-fid's state dict. Where this network is not the Inception v3 of other
# libraries, a comment says so: all published scores are of this one.


def resize_rows(x):
    """Every row of x (..., W) to 299 pixels, float32: pixel i is read at i * W / 299."""
    width = x.shape[-1]
    # In float32, as TensorFlow does; float64 would weigh the pixels differently.
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
    antialiasing or rounding. Raises Stop for images of another type."""
    require(images.dtype == torch.uint8, f"expected uint8 (B, 3, H, W), got {images.dtype}")
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
    """3x3 mean that keeps the size. At the edge TensorFlow divides by the number of pixels inside
    the picture, other libraries by nine."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """3x3 maximum that keeps the size."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """3x3 maximum of every second pixel."""
    return F.max_pool2d(x, 3, stride=2)


def chain(x, *layers):
    """x through the layers, one after the other."""
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


class Inception(nn.Module):
    """uint8 (B, 3, H, W) -> features (B, 2048), logits (B, 1008), float32.

    `weights`: a file with the state dict of 566 tensors that pytorch-fid and torch-fidelity use,
    or None to download it once (96 MB). Raises Stop for other files."""

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
        # A maximum here and nowhere else: an oddity of the released network.
        self.Mixed_7c = MixedE(2048, max_pool)
        self.fc = nn.Linear(FEATURES, CLASSES)

        advice = f"no Inception weights; fetch {URL} and name the file with --weights"
        with stop_on_error(weights or WEIGHTS, advice):
            if weights:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            else:
                state = torch.hub.load_state_dict_from_url(
                    URL, map_location="cpu", check_hash=True, weights_only=True
                )
            self.load_state_dict(state)
        self.eval()

    # CUDA's convolutions, unlike its matrix products, are in TF32 by default, which would move the
    # features. What the process had is put back. (`enabled` is cuDNN itself.)
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
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


# =============================================================== pictures and statistics in files
WANTED = (
    "give a folder of images, or an npz whose arr_0 is uint8 (N, H, W, 3), which --size does not "
    "crop; the reference may also be an npz with mu and sigma"
)


class FolderImages:
    """The images in a folder and below it, in the order of their names, read when they are asked
    for. `size` is that of a square crop, or None."""

    def __init__(self, folder, size):
        self.folder = folder
        self.size = size
        self.names = [name for name in list_files(folder) if is_picture(name)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        path = self.folder / self.names[i]
        try:
            # Where encode.py's crop is asked for, pictures are turned as it turns them, too.
            image = open_rgb(path, upright=bool(self.size))
            if self.size:
                image = center_crop(image, self.size)
        except Exception as error:
            # Pillow raises whatever the file's bytes lead it to.
            raise Stop(f"{path}: unreadable, and a score must not leave it out ({error})") from None
        return np.array(image)


def open_images(path, size):
    """-> the images of a folder or an npz; len() is their number, [i] is uint8 (H, W, 3). Raises
    Stop for other files and fewer than 10 images."""
    if path.is_dir():
        images = FolderImages(path, size)
    else:
        with stop_on_error(path, WANTED), np.load(path, allow_pickle=False) as file:
            require("arr_0" in file, f"{path}: has no arr_0; a file of statistics goes second")
            images = file["arr_0"]
        fits = images.dtype == np.uint8 and images.shape[3:] == (3,)
        fits = fits and size in (None, images.shape[1])
        require(fits, f"{path}: arr_0 is {images.dtype} {images.shape}; {WANTED}")
    few = f"{path}: {len(images)} images; scores need 10, and thousands to mean something"
    require(len(images) >= 10, few)
    return images


def read_statistics(path):
    """An npz with mu and sigma, or ref_mu and ref_sigma -> mean (2048,), cov (2048, 2048) and n, as
    in Statistics; n is None where the file does not say. Where there are none -> None. ADM's file
    also holds some of its images, which are not read: mu and sigma are of all of them."""
    if path.is_dir():
        return None
    with stop_on_error(path, WANTED), np.load(path, allow_pickle=False) as file:
        prefix = "ref_" if "ref_mu" in file else ""
        if prefix + "mu" not in file:
            return None
        mean = file[prefix + "mu"]
        cov = file[prefix + "sigma"]
        n = int(file["n"]) if "n" in file else None
    fits = mean.shape == (FEATURES,) and cov.shape == (FEATURES, FEATURES)
    require(fits, f"{path}: mu {mean.shape} and sigma {cov.shape} are not of {FEATURES} features")
    require(np.isfinite(mean.sum() + cov.sum()), f"{path}: mu or sigma hold NaN or infinity")
    return SimpleNamespace(mean=mean, cov=cov, n=n)


def save_statistics(path, statistics):
    """Writes what read_statistics reads, and the command line."""
    # A file, since np.savez would add .npz to a name.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            # JiT's evaluation code expects mu as float32 and sigma as float64.
            mu=statistics.mean.astype(np.float32),
            sigma=statistics.cov,
            n=statistics.n,
            source=" ".join(sys.argv),
        )


# =============================================================== the command
def batches(images):
    """Yields lists of images. While one is at work, threads decode the next one, and no more: a
    whole set might not fit into memory."""
    numbers = range(len(images))
    with ThreadPoolExecutor(cores()) as pool:
        ahead = pool.map(images.__getitem__, numbers[:BATCH])
        for start in numbers[::BATCH]:
            batch = list(ahead)
            ahead = pool.map(images.__getitem__, numbers[start + BATCH : start + 2 * BATCH])
            yield batch


def measure(net, images, path):
    """Takes all images through the network -> Statistics, logits (N, 1008). Raises Stop if they are
    not of one size."""
    statistics = Statistics()
    logits = torch.empty(len(images), CLASSES)
    device = net.fc.weight.device
    shape = images[0].shape
    with tqdm(total=len(images), desc=path.name, unit="image") as bar:
        for batch in batches(images):
            alike = all(image.shape == shape for image in batch)
            require(alike, f"{path}: holds images of several sizes; crop them with --size S")
            x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)  # (B, 3, H, W)
            features, batch_logits = net(x.to(device))
            done = statistics.n
            statistics.update(features.cpu())
            logits[done : statistics.n] = batch_logits
            bar.update(len(batch))
    return statistics, logits


def warn(line):
    print(f"fid.py: {line}", file=sys.stderr)


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("samples", type=Path, help="folder of images, or npz with arr_0")
    add("reference", type=Path, nargs="?", help="the same, or npz with mu and sigma")
    add("--size", type=positive, metavar="S", help="crop the images of folders to S x S pixels")
    add("--save", type=Path, metavar="FILE", help="write the samples' mu, sigma and n there")
    add("--weights", type=Path, metavar="FILE", help=f"{WEIGHTS} (else downloaded once, 96 MB)")
    args = parser.parse_args()
    if args.save:
        # What is there is kept: a reference takes an hour.
        require(not args.save.exists(), f"--save {args.save}: exists already")
        require(args.save.parent.is_dir(), f"--save {args.save}: there is no such folder")
    return args


def main():
    # Everything is opened, and refused if need be, before the network runs.
    args = parse_arguments()
    samples = open_images(args.samples, args.size)
    reference = read_statistics(args.reference) if args.reference else None
    photos = None
    if args.reference and reference is None:
        photos = open_images(args.reference, args.size)
        ours = (len(samples), samples[0].shape)
        theirs = (len(photos), photos[0].shape)
        if ours != theirs:
            warn(f"the sets differ in number or size of images: {ours} and {theirs}")
    net = Inception(args.weights).to(pick_device())

    if photos is not None:
        # First: photographs, more often than samples, are of several sizes and thus refused.
        reference, _ = measure(net, photos, args.reference)
    statistics, logits = measure(net, samples, args.samples)
    score, deviation = inception_score(logits)
    line = f"Inception Score {score:.2f} +- {deviation:.2f} | n = {statistics.n} ({args.samples})"
    smaller = statistics.n
    if reference is not None:
        distance = frechet_distance(statistics.mean, statistics.cov, reference.mean, reference.cov)
        against = f"against n = {reference.n or 'unknown'} ({args.reference})"
        line = f"FID {distance:.3f} | {line} {against}"
        smaller = min(smaller, reference.n or smaller)
    if smaller < 50_000:
        warn(
            f"{smaller:,} images: scores of fewer than 50,000 are biased, compare at equal n only; "
            "up to 2,048 the covariance is singular"
        )
    print(line)
    # Last: a disk that is full costs no score.
    if args.save:
        save_statistics(args.save, statistics)


if __name__ == "__main__":
    run_command(main)
