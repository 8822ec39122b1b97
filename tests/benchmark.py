"""How fast the parts are: one JSON line per measurement.

    python -m tests.benchmark            everything
    python -m tests.benchmark fid        what is named

What is compared runs in turn, A B A B, after one warm-up each, so that other load on the machine meets both alike.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import fid as fid_py  # the function below has the short name


def interleaved(functions: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median seconds of each function, run in turn after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def hardware() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n") if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **gpu,
    }


def emit(name: str, medians: dict[str, float], unit: str, ratio: float | None = None, **more: object) -> None:
    """Print one measurement; `ratio` is how many times better ours is than what stands beside it."""
    rounded = {key: float(f"{value:.4g}") for key, value in medians.items()}
    ratio = None if ratio is None else round(ratio, 3)
    print(json.dumps({"name": name, "medians": rounded, "ratio": ratio, "unit": unit, **more, "hardware": hardware()}))


# --- FID --------------------------------------------------------------------------------------------------------------

library = None  # where missing operators are defined; they vanish with it


def published_inception(state: dict[str, Tensor], dims: int) -> nn.Module:
    """pytorch_fid's own network, from a full table of weights instead of a download; ImportError where not installed.

    Only the pure Python of torchvision is used, so a build that does not match torch will do once the two operators
    that it names while loading are defined.
    """
    global library
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import pytorch_fid.inception as published

    published.load_state_dict_from_url = lambda *_, **__: state
    return published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights under pytorch_fid's names, drawn so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(count: int, low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for name, conv in fid_py.Inception(2048).named_modules():
        if isinstance(conv, nn.Conv2d):
            weight = torch.randn(conv.weight.shape, generator=generator)
            state[f"{name}.conv.weight"] = weight * (2 / conv.weight[0].numel()) ** 0.5
            state[f"{name}.bn.weight"] = uniform(conv.out_channels, 0.8, 1.2)
            state[f"{name}.bn.bias"] = uniform(conv.out_channels, -0.1, 0.1)
            state[f"{name}.bn.running_mean"] = uniform(conv.out_channels, -0.1, 0.1)
            state[f"{name}.bn.running_var"] = uniform(conv.out_channels, 0.8, 1.2)
    return state


def network_of(state: dict[str, Tensor], dims: int) -> nn.Module:
    """Our network with these weights, laid out as `fid.extract` lays it out."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        return fid_py.load(Path(folder) / "weights.pth", dims).to(memory_format=torch.channels_last)


def fid() -> None:
    """Images/s from files to features at 768 dims, beside pytorch_fid's own; seconds of a distance at 2048 dims."""
    dims, count, state = 768, 50, random_state()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(
                Path(folder) / f"{i:02d}.jpg"
            )
        images, ours = fid_py.Images(Path(folder)), network_of(state, dims)
        functions = {"ours": lambda: fid_py.extract(images, ours)[0]}
        try:
            network = published_inception(state, dims)
            from pytorch_fid.fid_score import get_activations

            device = "cuda" if torch.cuda.is_available() else "cpu"
            network = network.to(device)
            functions["pytorch_fid"] = lambda: get_activations(images.files, network, 50, dims, device, 0)
        except ImportError:
            pass
        seconds, more = interleaved(functions), {}
        if theirs := functions.get("pytorch_fid"):
            wanted = theirs()
            more["feature_error"] = float(
                f"{np.linalg.norm(functions['ours']() - wanted) / np.linalg.norm(wanted):.2g}"
            )
    ratio = seconds["pytorch_fid"] / seconds["ours"] if "pytorch_fid" in seconds else None
    speeds = {name: count / value for name, value in seconds.items()}
    emit(f"fid features at {dims} dims", speeds, "images/s", ratio, images=count, **more)

    rng = np.random.default_rng(0)
    a, b = (fid_py.Statistics.of(rng.standard_normal((n, 2048))) for n in (5000, 4000))
    seconds = interleaved({"ours": lambda: fid_py.frechet_distance(a, b)}, rounds=3)
    emit("fid distance at 2048 dims", seconds, "s")


BENCHMARKS = {"fid": fid}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {unknown[0]}: choose of {', '.join(BENCHMARKS)}")
    for name in names or BENCHMARKS:
        BENCHMARKS[name]()
