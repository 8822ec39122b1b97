"""What a training takes of a machine: operations, memory and days, planned before it begins and measured while it runs.

`config` is train.py's: the shape of the model, and besides it batch, micro, steps, muon, recompute and sync_each_pass.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from model import Llama, ModelConfig
from plumbing.processes import add_up, rank, world
from plumbing.run import line_of

try:
    import resource
except ImportError:  # Windows
    resource = None

PAPER_TOKENS = 228e9  # of the training of JPEG-LM (Han et al. 2024)
ASSUMED_UTILISATION = 0.4  # share of the chips' peak that a plan counts on: torchtitan reaches 39% for 8B at 8k context
PEAKS = {  # dense bf16, FLOP/s, from NVIDIA's data sheets, by a part of the device's name: the first that fits counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def flops_of(config: ModelConfig, parameters: int) -> int:
    """Floating-point operations of training on one token, as torchtitan counts them."""
    return 6 * parameters + 12 * config.layers * config.dim * config.context


def computing_parameters(config: ModelConfig) -> int:
    """Parameters without embeddings, which are only looked up."""
    return count(config)[0] - config.dim * (config.vocab + sum(config.positions))


def peak_flops(device: torch.device) -> float | None:
    """The chip's dense bf16 peak in FLOP/s; None where it is not known, as of a CPU, whose share tells nobody much."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for chip, peak in PEAKS.items() if chip in name), None)


def memory(device: torch.device) -> float | None:
    """The most that this process has held, in GB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def plan(config: ModelConfig) -> str:
    """What a run takes, without allocating any of it: parameters, FLOPs, bytes a GPU, days."""
    parameters, _ = count(config)
    flops, step = flops_of(config, parameters), config.batch * config.context
    total = config.steps * step
    lines = [
        f"{parameters:,} parameters; {flops / 1e9:.3g} GFLOP a token (6 N + 12 layers dim context)",
        f"a step: {config.batch} rows of {config.context:,}, {step:,} tokens",
        f"{config.steps:,} steps: {total / 1e9:.3g} billion tokens; the paper's {PAPER_TOKENS / 1e9:.0f} billion: "
        f"{PAPER_TOKENS / step:,.0f} steps",
        f"GB a GPU, at most {config.micro} rows a pass; days of both at {ASSUMED_UTILISATION:.0%} of an H100's peak",
        "".join(f"{name:>12}" for name in ("GPUs", *memory_plan(config, 1), "days", "the paper's")),
    ]
    for gpus in (gpus for gpus in (1, 8, 64, 256) if config.batch % gpus == 0):
        gb = [size / 1e9 for size in memory_plan(config, gpus).values()]
        speed = ASSUMED_UTILISATION * PEAKS["H100"] * gpus / flops  # tokens/s
        days = [tokens / speed / 86_400 for tokens in (total, PAPER_TOKENS)]
        lines.append(f"{gpus:>12}" + "".join(f"{value:>12,.2f}" for value in (*gb, *days)))
    return "\n".join(lines)


def count(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the model and of one of its blocks."""
    with torch.device("meta"):
        model = Llama(config)
    return tuple(sum(weight.numel() for weight in part.parameters()) for part in (model, model.layers[0]))


def memory_plan(config: ModelConfig, gpus: int) -> dict[str, float]:
    """Bytes a GPU, by what they hold, and in all.

    Kept in float32 and split over the GPUs: weights, two moments (one, of what Muon trains), and the gradients; those
    lie whole on each GPU while more than one pass is added up, unless `sync_each_pass`.  Whole in bf16: the tables of
    tokens, and two blocks, one at work and one on its way with its buffer; the gradients of one, which leave in float32
    while those before are still under way.  Activations in bf16: see `activations`.
    """
    config = replace(config, micro=min(config.micro, max(1, config.batch // gpus)))
    parameters, block = count(config)
    kept, added_up = 4 * parameters / gpus, config.batch > gpus * config.micro and not config.sync_each_pass
    gathered = 2 * (parameters - config.layers * block) + (3 * 2 + 2 + 2 * 4) * block
    parts = {"weights": kept, "gradients": 4 * parameters if added_up else kept, "moments": 2 * kept}
    parts["moments"] -= config.muon * 4 * config.layers * block / gpus
    parts |= {"activations": activations(config, 2), "gathered": gathered}
    return parts | {"in all": sum(parts.values())}


def activations(config: ModelConfig, size: int) -> int:
    """Bytes that a forward pass of `micro` rows keeps for the backward pass, in numbers of `size` bytes.

    Of a block: its input, both norms' outputs, queries, keys and values as attention takes them, what it gives, the
    middle of the residual stream, and four of the feed-forward's width (gate, its SiLU, up, their product).  With
    `recompute` every block keeps its input, and one at a time the rest.  The logits are there in `size`, in float32
    and as a gradient.
    """
    tokens, kv = config.micro * config.context, config.kv_heads * (config.dim // config.heads)
    inside = tokens * size * (6 * config.dim + 2 * kv + 4 * config.hidden)
    blocks = tokens * size * config.layers * config.dim + inside * (1 if config.recompute else config.layers)
    return blocks + tokens * (size * config.dim + (size + 8) * config.vocab)


class Meter:
    """The progress bar of a training, and a line of its log now and then.  `run` is train.py's, `tokens` are those of
    a step."""

    def __init__(self, run: object, tokens: int):
        parameters = sum(weight.numel() for weight in run.model.parameters())
        peak = peak_flops(run.device)
        self.tokens, self.first, self.started, self.losses = tokens, run.step, time.perf_counter(), []
        self.share = flops_of(run.config, parameters) / (peak * world()) if peak else None  # of the peak, a token/s
        hidden = True if rank() else None  # None: unless a terminal shows it
        self.bar = tqdm(total=run.config.steps, initial=run.step, unit=" steps", disable=hidden, smoothing=0.05)

    def count(self, run: object, loss: Tensor, norm: Tensor, log: bool) -> None:
        """Another step is done; `log` the mean loss since the line before."""
        self.losses.append(loss)
        self.bar.update()
        if not log:
            return
        mean = (add_up(torch.stack(self.losses).mean()) / world()).item()
        pace = (time.perf_counter() - self.started) / (run.step - self.first)
        record = {
            "step": run.step,
            "loss": mean,
            "bits_per_byte": mean / math.log(2) / (run.train.symbols / run.train.bounds[-1]),
            "norm": norm.item(),
            "lr": run.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": self.tokens / pace,
            "peak_share": self.share and self.tokens / pace * self.share,
            "memory_gb": memory(run.device),
            "seconds_left": pace * (run.config.steps - run.step),
        }
        self.losses = []
        run.log.write(record)
        run.say(line_of(record))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not training's."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before
