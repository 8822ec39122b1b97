"""How far one set of images is from another: Frechet Inception distance, KID, precision and recall.

    python fid.py samples/ photos/                        FID on the usual 2,048 features
    python fid.py samples/ photos/ --dims 768 --kid --pr --infinity --json
    python fid.py photos/ --save photos.npz               statistics, for later and for pytorch_fid
    python fid.py completions/                            what sample.py --prompt wrote, at each ratio that was kept
    torchrun --nproc-per-node 8 fid.py samples/ photos.npz

A trained Inception network turns each image into a vector, its pooled features, and each set into a cloud of vectors.
Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule (arXiv:1706.08500), section 3, fit a normal
distribution to either cloud, and take the distance between the two distributions.

A published number holds for one network and one way to shrink an image.  Ours are those of pytorch_fid: the 2015-12-05
Inception of TensorFlow, and bilinear resizing to 299x299 without antialiasing.  EXIF rotation and alpha are ignored.

Letters in shapes: N images, D features (dims), H rows, W columns.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shlex
import sys
import time
import urllib.request
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from plumbing.command import Flags, UserError, run
from plumbing.files import digest, read_json, write_whole

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
CHECKSUM = "6726825d"  # the first digits of the sha256, as in the name
CACHE = Path("~/.cache/jpeglm")
SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}  # pytorch_fid's
SIZE = 299  # pixels, both ways, of what the network sees
RESIZE = f"bilinear to {SIZE}x{SIZE}, half-pixel centres, no antialias"
FEW = 10_000  # images; with fewer FID is visibly too high (Chong and Forsyth 2020, figure 1)
DRAWN = ("seed", "temperature", "top_k", "top_p")  # settings of sample.py that a row of completions names

# --- The network ------------------------------------------------------------------------------------------------------


class Conv(nn.Conv2d):
    """Convolution and rectifier, keeping the image's size unless it strides; the batch norm is folded in by `load`."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple = 1, stride: int = 1, pad: bool = True):
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad and stride == 1 else 0
        super().__init__(inputs, outputs, (height, width), stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


shrink = nn.MaxPool2d(3, stride=2)


def average(x: Tensor) -> Tensor:
    """Unlike torchvision's network, TensorFlow's does not count the padding in the mean."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    """The last block of the 2015-12-05 network pools by maximum, by mistake as it seems; every published FID has it."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Mixed(nn.Module):
    """An Inception block: chains of convolutions side by side, then a pooling of the input, stacked as channels.

    A chain lists its steps as (outputs, kernel, stride); a list as its last step are convolutions that run in parallel.
    `pooled` channels remain of the pooling; 0 keeps all of them.
    """

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor], pooled: int = 0, **chains: list):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in chains.items():
            self.chains.append([])
            width = inputs
            for number, step in enumerate(chain, start=1):
                parallel = [Conv(width, *shape) for shape in (step if isinstance(step, list) else [step])]
                width = parallel[0].out_channels
                for letter, conv in zip("ab" if len(parallel) == 2 else [""], parallel, strict=True):
                    self.add_module(f"{name}_{number}{letter}" if len(chain) > 1 else name, conv)
                self.chains[-1].append(parallel)
        self.branch_pool = nn.Conv2d(inputs, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *steps, last in self.chains:
            y = x
            for (conv,) in steps:
                y = conv(y)
            outputs += [conv(y) for conv in last]
        if self.pool is average:  # a mean commutes with a 1x1 convolution, and is cheaper after it
            outputs.append(average(self.branch_pool(x)).relu_())
        else:
            outputs.append(self.branch_pool(self.pool(x)).relu_())
        return torch.cat(outputs, dim=1)


def mixed_35(inputs: int, pooled: int) -> Mixed:
    chains = {"branch1x1": [(64,)], "branch5x5": [(48,), (64, 5)], "branch3x3dbl": [(64,), (96, 3), (96, 3)]}
    return Mixed(inputs, average, pooled, **chains)


def mixed_6a() -> Mixed:
    return Mixed(288, shrink, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64,), (96, 3), (96, 3, 2)])


def mixed_17(width: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    seven = [(width,), (width, row), (192, column)]
    double = [(width,), (width, column), (width, row), (width, column), (192, row)]
    return Mixed(768, average, 192, branch1x1=[(192,)], branch7x7=seven, branch7x7dbl=double)


def mixed_7a() -> Mixed:
    seven = [(192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
    return Mixed(768, shrink, branch3x3=[(192,), (320, 3, 2)], branch7x7x3=seven)


def mixed_8(inputs: int, pool: Callable[[Tensor], Tensor]) -> Mixed:
    cross = [(384, (1, 3)), (384, (3, 1))]
    three, double = [(384,), cross], [(448,), (384, 3), cross]
    return Mixed(inputs, pool, 192, branch1x1=[(320,)], branch3x3=three, branch3x3dbl=double)


LAYERS: dict[str, Callable[[], nn.Module]] = {  # the shape after each, for one image
    "Conv2d_1a_3x3": lambda: Conv(3, 32, 3, stride=2),  # 32 x 149 x 149
    "Conv2d_2a_3x3": lambda: Conv(32, 32, 3, pad=False),  # 32 x 147 x 147
    "Conv2d_2b_3x3": lambda: Conv(32, 64, 3),  # 64 x 147 x 147
    "pool_1": lambda: shrink,  # 64 x 73 x 73
    "Conv2d_3b_1x1": lambda: Conv(64, 80),  # 80 x 73 x 73
    "Conv2d_4a_3x3": lambda: Conv(80, 192, 3, pad=False),  # 192 x 71 x 71
    "pool_2": lambda: shrink,  # 192 x 35 x 35
    "Mixed_5b": lambda: mixed_35(192, 32),  # 256 x 35 x 35
    "Mixed_5c": lambda: mixed_35(256, 64),  # 288 x 35 x 35
    "Mixed_5d": lambda: mixed_35(288, 64),  # 288 x 35 x 35
    "Mixed_6a": mixed_6a,  # 768 x 17 x 17
    "Mixed_6b": lambda: mixed_17(128),  # 768 x 17 x 17
    "Mixed_6c": lambda: mixed_17(160),  # 768 x 17 x 17
    "Mixed_6d": lambda: mixed_17(160),  # 768 x 17 x 17
    "Mixed_6e": lambda: mixed_17(192),  # 768 x 17 x 17
    "Mixed_7a": mixed_7a,  # 1280 x 8 x 8
    "Mixed_7b": lambda: mixed_8(1280, average),  # 2048 x 8 x 8
    "Mixed_7c": lambda: mixed_8(2048, largest),  # 2048 x 8 x 8
}
LAYER_OF_DIMS = {64: "pool_1", 192: "pool_2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # the layer that has so many channels


class Inception(nn.Sequential):
    """Images (N, 3, 299, 299) in -1..1 to features (N, dims): the mean over the pixels of the last layer needed."""

    def __init__(self, dims: int):
        names = list(LAYERS)[: list(LAYERS).index(LAYER_OF_DIMS[dims]) + 1]
        super().__init__(OrderedDict((name, LAYERS[name]()) for name in names))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(dim=(2, 3))


def load(path: Path, dims: int) -> Inception:
    """The network with the weights of a file under pytorch_fid's names; layers past `dims` may be absent."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("it is no table of tensors")
    except Exception as error:  # torch raises half a dozen types on a broken file
        what = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
        raise UserError(f"{path} is not a readable weights file ({what}): delete it and download {URL} again") from None
    if "fc.weight" in state and state["fc.weight"].shape[:1] == (1000,):
        what = "torchvision's Inception (1,000 classes), not FID's (1,008 classes)"
        raise UserError(f"{path} holds {what}: download {URL}")
    network = Inception(dims)
    for name, conv in network.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        keys = [f"{name}.{key}" for key in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
        if lacking := [key for key in keys if key not in state]:
            depths = [d for d in LAYER_OF_DIMS if d < dims and f"{LAYER_OF_DIMS[d]}.branch1x1.conv.weight" in state]
            remedy = f"pass --dims {max(depths)}, or download {URL}" if depths else f"download {URL}"
            raise UserError(f"{path} lacks {lacking[0]}, needed for {dims} dims: {remedy}")
        for key, shape in zip(keys, [conv.weight.shape] + 4 * [conv.weight.shape[:1]], strict=True):
            if state[key].shape != shape:
                shapes = f"{list(state[key].shape)}, not {list(shape)}"
                raise UserError(f"{path} has {key} of shape {shapes}: download {URL}")
        weight, scale, bias, mean, variance = (state[key].double() for key in keys)
        scale = scale / (variance + 0.001).sqrt()  # y = (conv(x) - mean) * scale + bias, as one convolution
        conv.weight.data = (weight * scale[:, None, None, None]).float()
        conv.bias.data = (bias - mean * scale).float()
        if not (conv.weight.isfinite().all() and conv.bias.isfinite().all()):
            raise UserError(f"{path} has values in {name} that are not finite: delete it and download {URL}")
    return network.eval().requires_grad_(False)


def weights_file(path: Path | None = None, url: str = URL) -> Path:
    """The file asked for, else the one in the cache, else a download whose sha256 begins with CHECKSUM."""
    if path is not None:
        if not path.is_file():
            raise UserError(f"{path}, asked for by --weights, is no file: download {url}")
        return path
    try:
        path = CACHE.expanduser() / url.rsplit("/", 1)[-1]
    except RuntimeError:  # in a container, a user id may have neither a name nor a home
        raise UserError(f"there is no home folder for the weights: set HOME, or pass --weights with {url}") from None
    advice = f"fetch {url} (sha256 {CHECKSUM}...) elsewhere and put it at {path}, or pass --weights FILE"
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as source:
                total = int(source.headers.get("Content-Length") or 0) or None
                with tqdm.wrapattr(source, "read", total, desc="weights", disable=None) as stream:
                    data = b"".join(iter(lambda: stream.read(1 << 20), b""))
            if not (found := hashlib.sha256(data).hexdigest()).startswith(CHECKSUM):
                raise UserError(f"{url} came with sha256 {found[:8]}, not {CHECKSUM}: {advice}")
            write_whole(path, data)
        except OSError as error:
            raise UserError(f"the weights could not be downloaded ({error}): {advice}") from None
    if not (found := digest(path)).startswith(CHECKSUM):
        raise UserError(f"{path} has sha256 {found[:8]}, not {CHECKSUM}: delete it, then {advice}")
    return path


# --- Images to features -----------------------------------------------------------------------------------------------


class Images:
    """The images of a folder, searched recursively, or an array (N, H, W, 3) uint8 from an .npz, held in memory.

    The grid that sample.py lays beside its numbered samples is left out.
    """

    def __init__(self, path: Path, array: np.ndarray | None = None):
        self.path, self.array = path, array
        if array is not None:
            self.sha256 = digest(path)
            return
        found = sorted(image_files(path))
        sampled = {file.parent for file in found if file.stem.isdecimal() or (file.parent / "samples.json").exists()}
        self.files = [file for file in found if file.stem != "grid" or file.parent not in sampled]
        if not self.files and any(path.rglob("*.mp4")):
            raise UserError(f"{path} holds clips, not images: measure their frames with `python -m studies.video RUN`")
        if not self.files:
            known = ", ".join(sorted(SUFFIXES))
            raise UserError(f"{path} holds no images: give a folder with files of {known} at any depth")
        listing = "".join(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n" for file in self.files)
        self.sha256 = hashlib.sha256(os.fsencode(listing)).hexdigest()

    def __len__(self) -> int:
        return len(self.files if self.array is None else self.array)

    def __getitem__(self, index: int) -> tuple[Tensor | str, str]:
        """Pixels (3, H, W) uint8 and the mode of the file; or, for a file that cannot be read, a sentence on why."""
        if self.array is not None:
            return torch.from_numpy(self.array[index].copy()).permute(2, 0, 1), "RGB"
        try:
            with Image.open(self.files[index]) as image:
                if image.mode[0] in "IF":  # Pillow would clip it to white
                    raise ValueError(f"its mode {image.mode} has more than 8 bits a sample")
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), image.mode
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            return f"{self.files[index]} cannot be read ({type(error).__name__}: {error})", ""

    def warnings(self, modes: Counter) -> list[str]:
        """What is odd about these images, of which so many had each mode."""
        found = []
        if others := {mode: count for mode, count in modes.items() if mode != "RGB"}:
            listed = ", ".join(f"{count} {mode}" for mode, count in sorted(others.items()))
            found.append(f"{self.path}: {sum(others.values())} images are not RGB and were converted ({listed})")
        kinds = Counter() if self.array is not None else Counter(file.suffix.lower() for file in self.files)
        kinds[".jpg"] += kinds.pop(".jpeg", 0)
        if len(+kinds) > 1:
            listed = ", ".join(f"{count} {kind}" for kind, count in sorted((+kinds).items()))
            found.append(f"{self.path}: a mix of file formats ({listed}); FID sees what compression leaves behind")
        return found


def image_files(folder: Path) -> Iterator[Path]:
    """The image files at any depth below a folder; a file or folder whose name begins with a dot is hidden."""
    for path in folder.iterdir():
        hidden = path.name.startswith(".")
        if not hidden and path.suffix.lower() in SUFFIXES and path.is_file():
            yield path
        elif not hidden and path.is_dir() and not path.is_symlink():
            yield from image_files(path)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let every operation of torch run on the thread that calls it.

    Threads that share a small operation wait for one another at its every step, and longest on a machine that is busy
    with something else.  It is faster to give each thread a batch, or a matrix, of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) of each item, in order, on threads and never more than `workers` items ahead: memory stays flat.

    Threads are enough, as Pillow and torch release Python's lock while they work, and they start at once, which the
    processes of a DataLoader do not.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def prepare(images: list[Tensor], device: torch.device) -> Tensor:
    """Pixels (3, H, W) uint8 of any sizes to (N, 3, 299, 299) in -1..1, in pytorch_fid's order of operations."""
    scaled = (image[None].to(device).float() / 255 for image in images)
    resized = [F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False) for x in scaled]
    return (2 * torch.cat(resized) - 1).contiguous(memory_format=torch.channels_last)


def look(images: Images, network: nn.Module, rank: int, world: int) -> list[tuple[int, np.ndarray | str, str]]:
    """Of every world-th image: its index, its features (D,) or why it cannot be read, and the mode of its file.

    A CPU works on batches of 4: larger activations pass the 32 MB above which glibc maps and clears new memory at
    every use.
    """
    device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last)
    size, workers = (4, torch.get_num_threads()) if device.type == "cpu" else (32, min(8, os.cpu_count() or 1))

    def one(batch: range) -> list[tuple[int, np.ndarray | str, str]]:
        read = [(index, *images[index]) for index in batch]
        pixels = [what for _, what, _ in read if isinstance(what, Tensor)]
        with torch.inference_mode():
            features = iter(network(prepare(pixels, device)).cpu().numpy() if pixels else ())
        return [(index, next(features) if isinstance(what, Tensor) else what, mode) for index, what, mode in read]

    mine, seen = range(rank, len(images), world), []
    batches = (mine[start : start + size] for start in range(0, len(mine), size))
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # TF32 would keep 3 digits only
    bar = tqdm(total=len(mine), desc=images.path.name, unit="image", disable=True if rank else None)
    with bar, exact, one_thread_each():
        for batch in in_order(one, batches, workers):
            seen += batch
            bar.update(len(batch))
    return seen


def extract(images: Images, network: nn.Module, skip_broken: bool = False) -> tuple[np.ndarray, Counter]:
    """Features (N, D) float32 in the order of the files, and how many images had which mode.

    Several processes share the images, and rank 0 gathers what they saw; the other ranks get nothing.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = look(images, network, rank, world)
    parts = [mine]
    if world > 1:
        parts = [None] * world if rank == 0 else []
        dist.gather_object(mine, parts or None)  # lengths may differ: nothing is padded, so nothing counts twice
    seen = sorted((item for part in parts for item in part), key=itemgetter(0))
    broken = [what for _, what, _ in seen if isinstance(what, str)]
    if broken and not skip_broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{more}: remove or mend it, or leave such files out with --skip-broken")
    for sentence in broken:
        print(f"warning: left out: {sentence}", file=sys.stderr)
    whole = [(what, mode) for _, what, mode in seen if not isinstance(what, str)]
    features = np.stack([what for what, _ in whole]) if whole else np.zeros((0, 0), np.float32)
    return features, Counter(mode for _, mode in whole)


# --- Statistics and distances, all in float64 -------------------------------------------------------------------------


@dataclass
class Statistics:
    """What a set of images comes down to: the normal distribution of its features and, where known, the features."""

    mu: np.ndarray  # (D,) float64
    sigma: np.ndarray  # (D, D) float64, divided by N - 1
    features: np.ndarray | None = None  # (N, D)
    about: dict = field(default_factory=dict)  # path, count, files_sha256, network, weights_sha256, dims, resize

    @classmethod
    def of(cls, features: np.ndarray, **about: str | int) -> "Statistics":
        x = np.asarray(features, dtype=np.float64)
        return cls(x.mean(axis=0), np.atleast_2d(np.cov(x, rowvar=False)), features, about)

    def factor(self) -> Tensor:
        """F of shape (rank, D) with F^T F = sigma: the centred features themselves where they are few, else by eigh."""
        if self.features is not None and len(self.features) <= len(self.mu):
            return torch.from_numpy((self.features - self.mu) / np.sqrt(len(self.features) - 1))
        values, vectors = torch.linalg.eigh(torch.from_numpy(self.sigma))
        return (vectors * values.clamp(min=0).sqrt()).T

    def save(self, path: Path) -> None:
        """An .npz for pytorch_fid, which reads mu and sigma, and for us, who also read the features and where from."""
        features, file = {} if self.features is None else {"features": self.features}, io.BytesIO()
        np.savez(file, mu=self.mu, sigma=self.sigma, **features, **self.about)
        try:
            write_whole(path, file.getbuffer())
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error}): choose another file for --save") from None


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_A - mu_B|^2 + tr(A + B - 2 (A B)^1/2), A and B the covariances (Heusel et al. 2017, equation 6).

    With A = F^T F and B = G^T G, the eigenvalues of A B are the squared singular values of F G^T, so the last trace is
    their sum.  No square root of a product is formed, whose rounding errors turn complex, and no small eigenvalue
    is squared: this holds for any number of images, also for fewer than features.
    """
    with one_thread_each():
        f, g = in_order(Statistics.factor, (a, b), workers=2)
        overlap = torch.linalg.svdvals(f @ g.T).sum()
    distance = np.square(a.mu - b.mu).sum() + (f.square().sum() + g.square().sum() - 2 * overlap).item()
    return max(float(distance), 0.0)  # rounding may leave -1e-13


def frechet_infinity(a: Statistics, b: Statistics, seed: int = 0, points: int = 12) -> float:
    """FID of infinitely many images: it is linear in 1/N (Chong and Forsyth 2020, arXiv:1911.07023).

    Both sets shrink to N/x, x evenly spaced from 1 to 4, and the line is read at x = 0, which takes out the bias of
    either side; statistics without features stay whole, and so does their bias.  The line holds for N/4 > D;
    where the distance is small it may end below zero.
    """
    rng, inverse = np.random.default_rng(seed), np.linspace(1, 4, points)

    def subset(s: Statistics, x: float) -> Statistics:
        if s.features is None:
            return s
        return Statistics.of(s.features[rng.permutation(len(s.features))[: max(2, round(len(s.features) / x))]])

    return float(np.polyfit(inverse, [frechet_distance(subset(a, x), subset(b, x)) for x in inverse], 1)[1])


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, D) and (M, D) to (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_others(k: np.ndarray) -> float:
    """The mean of a square matrix without its diagonal, where each image stands beside itself."""
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, seed: int = 0, subsets: int = 100, size: int = 1000
) -> tuple[float, float]:
    """KID, mean and standard deviation over subsets: unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, Demystifying MMD GANs (arXiv:1801.01401), section 4.  Unbiased: it may be below zero.
    """
    rng, size, values = np.random.default_rng(seed), min(size, len(a), len(b)), []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), size, replace=False)].astype(np.float64) for s in (a, b))
        within = mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y))
        values.append(within - 2 * kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(samples: np.ndarray, reference: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Precision: the share of samples in the manifold of the reference; recall: the share of the reference in theirs.

    A manifold is a ball about every point, out to its third neighbour (Kynkaanniemi et al. 2019, arXiv:1904.06991).
    """
    a, b = (torch.from_numpy(x - reference.mean(0, dtype=np.float64)) for x in (samples, reference))
    tiny = 1e-12 * max(x.square().sum(1).max().item() for x in (a, b))  # rounding in squares of distances

    def squares(x: Tensor, y: Tensor) -> Iterator[Tensor]:
        for rows in x.split(1024):
            yield rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T

    def share(x: Tensor, y: Tensor) -> float:
        radii = torch.cat([d.kthvalue(neighbours + 1, dim=1).values for d in squares(y, y)])  # the first is itself
        return torch.cat([(d <= radii + tiny).any(1) for d in squares(x, y)]).double().mean().item()

    return share(a, b), share(b, a)


# --- The command ------------------------------------------------------------------------------------------------------


def open_set(path: Path, dims: int) -> Statistics | Images:
    """What a path of the command line names: the images of a folder, or what an .npz holds."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder of images or an .npz")
    if path.is_dir():
        return Images(path)
    if path.suffix.lower() != ".npz":
        raise UserError(f"{path} is neither a folder nor an .npz: give a folder of images or an .npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and NumPy each have their own types
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a readable .npz ({what}): write it again with numpy.savez") from None
    if "mu" in arrays and "sigma" in arrays:
        return statistics_in(path, arrays, dims)
    images = [a for a in arrays.values() if a.dtype == np.uint8 and a.ndim == 4 and a.shape[3] == 3 and a.size]
    if len(images) != 1:
        held = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in arrays.items()) or "nothing"
        expected = "expected statistics (mu, sigma) or images as one array of uint8 (N, H, W, 3)"
        raise UserError(f"{path} holds {held}: {expected}")
    return Images(path, images[0])


def statistics_in(path: Path, arrays: dict[str, np.ndarray], dims: int) -> Statistics:
    """The statistics in the arrays of an .npz of ours or of pytorch_fid."""
    mu, sigma = arrays["mu"], arrays["sigma"]
    numbers = all(np.issubdtype(x.dtype, np.floating) and np.isfinite(x).all() for x in (mu, sigma))
    if not numbers or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not np.allclose(sigma, sigma.T):
        raise UserError(f"{path} holds no finite mean and symmetric covariance of one size: make it again with --save")
    if len(mu) != dims:
        raise UserError(f"{path} holds statistics of {len(mu)} dims, not {dims}: pass --dims {len(mu)}, or save again")
    kinds = {"count": "i", "dims": "i"}  # all else that we save is text
    about = {name: x.item() for name, x in arrays.items() if x.ndim == 0 and x.dtype.kind == kinds.get(name, "U")}
    if about.get("resize", RESIZE) != RESIZE:
        raise UserError(f"{path} was made with resize '{about['resize']}', not '{RESIZE}': save it from the images")
    features = arrays.get("features", np.zeros((2, dims)))
    numbers = np.issubdtype(features.dtype, np.floating) and np.isfinite(features).all()
    if not numbers or features.shape[1:] != (dims,) or len(features) < 2:
        held = f"features {list(features.shape)}, not finite numbers (N, {dims})"
        raise UserError(f"{path} holds {held}: save its statistics again")
    mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    return Statistics(mu, sigma, arrays.get("features"), {**about, "path": str(path)})


def cautions(s: Statistics, dims: int) -> list[str]:
    """What a reader must know before believing a number made from this set."""
    path, count, found = s.about["path"], s.about.get("count"), []
    if count is None:
        return [f"{path}: says neither how many images, nor which network and resize made it"]
    if count < FEW:
        found.append(f"{path}: {count:,} images are fewer than {FEW:,}; FID is biased upwards, so compare equal counts")
    if count <= dims:
        found.append(f"{path}: {count:,} images do not exceed {dims:,} dims: singular covariance; use fewer --dims")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Flags(__doc__)
    add = parser.add_argument
    sets = "a folder of images (recursive), an .npz of images (uint8 N,H,W,3), or an .npz of statistics (mu, sigma)"
    add("a", type=Path, metavar="A", help=f"the samples: {sets}; sample.py's grid.png is not counted")
    likewise = "the reference, likewise; may be left out with --save, or where A holds completions of sample.py"
    add("b", type=Path, metavar="B", nargs="?", help=likewise)
    depths = list(LAYER_OF_DIMS)
    add("--dims", type=int, default=2048, choices=depths, help="features, by depth in the network (default: 2048)")
    add("--weights", type=Path, metavar="FILE", help=f"the network's weights (default: downloaded once into {CACHE})")
    add("--save", type=Path, metavar="FILE", help="keep the statistics of A as an .npz, also loadable by pytorch_fid")
    add("--kid", action="store_true", help="also the kernel distance: mean and deviation over 100 subsets of 1,000")
    add("--pr", action="store_true", help="also precision (of A) and recall (of B), with 3 neighbours")
    add("--infinity", action="store_true", help="also FID at infinitely many images, by a linear fit against 1/N")
    add("--seed", type=int, default=0, help="of the subsets of --kid and --infinity (default: 0)")
    add("--skip-broken", action="store_true", help="leave out files that cannot be read, instead of stopping")
    add("--json", action="store_true", help="print one JSON object with everything needed to repeat the measurement")
    flags = parser.parse(arguments)
    flags.completions = completions(flags.a) if flags.b is None and flags.save is None else []
    if flags.b is None and flags.save is None and not flags.completions:
        raise UserError("B is missing: give a second set, or --save FILE to keep the statistics of A")
    if flags.b is None and (flags.kid or flags.pr or flags.infinity):
        raise UserError("--kid, --pr and --infinity compare A with a second set: give B, or leave them out")
    if not 0 <= flags.seed < 2**63:
        raise UserError(f"--seed is {flags.seed}: choose 0 to 2^63 - 1")
    if flags.save and not (flags.save.name and flags.save.parent.is_dir()):
        raise UserError(f"--save {flags.save} names no file in a folder that is there: give one, as in photos.npz")
    if flags.save and flags.save.suffix != ".npz":
        flags.save = flags.save.with_name(f"{flags.save.name}.npz")
    return flags


def completions(folder: Path) -> list[Path]:
    """The folders that `sample.py --prompt` leaves: originals, their round trip, then a folder for each ratio kept."""
    named = (path for path in folder.glob("keep_*") if re.fullmatch(r"keep_\d+(\.\d+)?(e-\d+)?", path.name))
    kept = sorted(filter(Path.is_dir, named), key=lambda path: float(path.name.removeprefix("keep_")))
    return [folder / "originals", folder / "roundtrip", *kept] if kept else []


def how_drawn(folder: Path) -> dict[str, float]:
    """The settings that sample.py noted beside the files it wrote."""
    settings = read_json(path := folder / "samples.json")
    for name in DRAWN:
        if not isinstance(settings.get(name), int | float):
            raise UserError(f"{path} has no number {name}: restore it, or delete its folder and sample anew")
    return {name: settings[name] for name in DRAWN}


ROW = (
    "keep {keep}: FID-{dims} {fid_originals:.2f} to the originals, {fid_roundtrip:.2f} to their round trip, floor "
    "{fid_floor:.2f}  ({count:,} files, seed {seed}, temperature {temperature:g}, top-k {top_k}, top-p {top_p:g})"
)


def evaluation(sets: list[Statistics], drawn: list[dict]) -> list[dict]:
    """The paper's protocol (section 4): FID of the completions at each ratio, with how they were drawn.

    Against the originals, as in the paper; against the originals as the codec gives them back, which leaves out what no
    model of these files could do better; and between those two, the floor.
    """
    originals, roundtrip, *kept = sets
    floor, rows = frechet_distance(roundtrip, originals), []
    for s, settings in zip(kept, drawn, strict=True):
        fids = {"fid_originals": frechet_distance(s, originals), "fid_roundtrip": frechet_distance(s, roundtrip)}
        keep = Path(s.about["path"]).name.removeprefix("keep_")
        rows.append({"keep": keep, **fids, "fid_floor": floor, "count": s.about["count"], **settings})
    return rows


def comparison(a: Statistics, b: Statistics, flags: argparse.Namespace, notes: list[str]) -> dict[str, float]:
    """The distances asked for between two sets; adds to the notes what to know about them."""
    for s in (a, b):
        path = s.about["path"]
        if s.features is None and (flags.kid or flags.pr):
            flag = "--kid" if flags.kid else "--pr"
            raise UserError(f"{path} holds no features, which {flag} needs: give the images instead")
        if flags.pr and len(s.features) < 4:
            raise UserError(f"{path} has {len(s.features)} images, and --pr needs 4: add images")
    counts = [len(s.features) for s in (a, b) if s.features is not None]
    if flags.infinity and not counts:
        raise UserError("--infinity needs the images of A or B, and both are statistics: give a folder")
    if flags.infinity and (fewest := min(counts)) <= 4 * flags.dims:
        notes.append(f"--infinity fits down to a quarter of the images; {fewest:,} are few for {flags.dims} dims")
    result = {"fid": frechet_distance(a, b)}
    if flags.infinity:
        result["fid_infinity"] = frechet_infinity(a, b, flags.seed)
    if flags.kid:
        result["kid"], result["kid_std"] = kernel_distance(a.features, b.features, flags.seed)
    if flags.pr:
        result["precision"], result["recall"] = precision_recall(a.features, b.features)
    return result


def report(result: dict, sets: list[Statistics], flags: argparse.Namespace) -> None:
    """Say the results in words."""
    for row in result.get("completions", []):
        print(ROW.format(dims=flags.dims, **row))
    if "fid" in result:
        counts = " and ".join(f"{s.about['count']:,}" if "count" in s.about else "unknown" for s in sets)
        print(f"FID-{flags.dims} {result['fid']:.4f}  ({counts} images)")
    if "fid_infinity" in result:
        print(f"FID-{flags.dims} at infinitely many images {result['fid_infinity']:.4f}")
    if "kid" in result:
        print(f"KID {result['kid']:.4g}, standard deviation over subsets {result['kid_std']:.4g}")
    if "precision" in result:
        print(f"precision {result['precision']:.4f}, recall {result['recall']:.4f}")
    if flags.save:
        print(f"statistics of {flags.a} saved to {flags.save}")


def measure(opened: list[Statistics | Images], flags: argparse.Namespace, notes: list[str]) -> list[Statistics]:
    """The statistics of each set, those of images on rank 0 alone; adds to the notes what to know about them."""
    rank, sets = dist.get_rank() if dist.is_initialized() else 0, []
    if any(isinstance(found, Images) for found in opened):
        if rank:
            dist.barrier()  # rank 0 fetches the weights, the others find them in the cache
        weights = weights_file(flags.weights)
        network, sha256 = load(weights, flags.dims), digest(weights)
        if dist.is_initialized() and not rank:
            dist.barrier()
        if not sha256.startswith(CHECKSUM):
            notes.append(f"{weights} is not the published file (sha256 {CHECKSUM}...): compare within it only")
    for found in opened:
        if isinstance(found, Images):
            features, modes = extract(found, network, flags.skip_broken)
            if rank:
                continue
            if len(features) < 2:
                held = f"{len(features)} readable image(s), and a covariance needs two"
                raise UserError(f"{found.path} has {held}: add images")
            notes += found.warnings(modes)
            about = {"path": str(found.path), "count": len(features), "files_sha256": found.sha256}
            made = {"network": "inception-2015-12-05", "weights_sha256": sha256, "dims": flags.dims, "resize": RESIZE}
            found = Statistics.of(features, **about, **made)
        sets.append(found)
        notes += cautions(found, flags.dims)
    return sets


def compare(arguments: list[str] | None) -> None:
    """Open the sets, look at their images, compute what was asked for, and print it."""
    flags, notes = parse(arguments), []
    paths = flags.completions or [path for path in (flags.a, flags.b) if path]
    drawn = [how_drawn(path) for path in flags.completions[2:]]
    if flags.completions:
        others = sorted(set(flags.a.glob("keep_*")) - set(paths))
        notes += [f"{path} is left out, as it is no folder named keep_NUMBER" for path in others]
    sets = measure([open_set(path, flags.dims) for path in paths], flags, notes)
    if dist.is_initialized() and dist.get_rank():
        return
    used = {s.about["weights_sha256"][:8] for s in sets if "weights_sha256" in s.about}
    if len(used) > 1:
        notes.append(f"the two sets were made with different weights ({', '.join(sorted(used))})")
    if flags.save:
        sets[0].save(flags.save)
    result = {"completions": evaluation(sets, drawn)} if drawn else {}
    if flags.b:
        result = comparison(*sets, flags, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if not flags.json:
        report(result, sets, flags)
        return
    names = [path.name for path in flags.completions] or ["a", "b"]
    result |= {name: s.about for name, s in zip(names, sets, strict=False)}
    result |= {"dims": flags.dims, "resize": RESIZE, "seed": flags.seed, "warnings": notes}
    result |= {"command": shlex.join(sys.argv if arguments is None else ["fid.py", *arguments])}
    versions = {module.__name__: module.__version__ for module in (torch, np, PIL)}
    print(json.dumps(result | {"versions": {"python": platform.python_version(), **versions}}))


def main(arguments: list[str] | None = None) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1:
        dist.init_process_group("gloo")  # also with GPUs: only features travel, from the CPU
    try:
        compare(arguments)
    except Exception:
        if world > 1 and dist.get_rank():
            time.sleep(10)  # rank 0 mostly meets the same error and says it, and torchrun then ends this process
        raise
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # on odd metadata in files that read well
    run(main)
