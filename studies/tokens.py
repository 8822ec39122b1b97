"""What a token is worth, and what it costs.

    python -m studies.tokens accuracy out/plain out/pairs               # how often the likeliest token is the next one
    python -m studies.tokens costs --data photos --sizes 32 64 128 256  # what a picture costs each codec, counted

A model of byte pairs guesses fewer tokens, each of them harder, so only bytes can be compared between vocabularies.  A
byte is guessed right if the likeliest token at the place where the true one begins has it at its place.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from codec import JPEG, Tokenizer, load_tokenizer
from data.prepare import usable
from data.sources import find_items
from data.stream import Stream
from model import Llama
from plumbing.checkpoint import read_run
from plumbing.command import Flags, UserError, run
from plumbing.files import read_json
from plumbing.plan import PEAKS, computing_parameters, flops_of
from plumbing.processes import best_device
from studies.steps import table_of
from train import CONFIGS, Config, validation_batch, validation_batches

# --- accuracy -------------------------------------------------------------------------------------------------------


def right_symbols(found: np.ndarray, truth: np.ndarray, expansions: list[np.ndarray]) -> tuple[int, int]:
    """How many symbols of the true tokens (n,) the tokens found in their places have at theirs, and of how many; start
    and end, which stand for none, are left out."""
    right, whole = 0, 0
    for a, b in zip(found.tolist(), truth.tolist(), strict=True):
        if b < len(expansions):
            theirs, length = expansions[a] if a < len(expansions) else expansions[b][:0], len(expansions[b])
            shared = min(length, len(theirs))
            right, whole = right + int((theirs[:shared] == expansions[b][:shared]).sum()), whole + length
    return right, whole


@torch.no_grad()
def accuracy(model: Llama, tokenizer: Tokenizer, val: Stream) -> dict[str, float]:
    """Shares of the tokens and of the symbols of the validation set that are the likeliest, by the model alone."""
    config = Config(**{name: getattr(model.config, name) for name in ("context", "vocab")})
    device, hits, tokens, right, symbols = model.lm_head.weight.device, 0, 0, 0, 0
    for batch in tqdm(validation_batches(val, config), "accuracy", disable=None):
        x, syntax, y, _ = validation_batch(val, tokenizer.grammar, batch, config.vocab)
        found, there = model(x.to(device), syntax.to(device)).argmax(-1).cpu(), y >= 0
        hits, tokens = hits + int((found == y)[there].sum()), tokens + int(there.sum())
        more = right_symbols(found[there].numpy(), y[there].numpy(), tokenizer.expansions)
        right, symbols = right + more[0], symbols + more[1]
    return {"tokens": tokens, "right_tokens": hits / tokens, "symbols": symbols, "right_symbols": right / symbols}


def accuracies(runs: list[Path], data: Path | None) -> None:
    for out in runs:
        model, tokenizer, _ = read_run(out, best_device())
        folder = data or Path(str(read_json(out / "config.json").get("data")))
        if load_tokenizer(folder).hash != tokenizer.hash:
            raise UserError(f"{folder} holds other tokens than {out} was trained on: name its data with --data")
        val = Stream(folder, "val", len(model.config.positions))
        print(json.dumps({"run": str(out), "vocab": tokenizer.vocab, **accuracy(model, tokenizer, val)}), flush=True)


# --- costs ----------------------------------------------------------------------------------------------------------

HEAD = ["pixels", "codec", "tokens", "GFLOP of training", "of writing", "training, ms on an H100 at 40%"]


def lengths(size: int, folder: Path, most: int) -> dict[str, tuple[float, int]]:
    """Tokens of a picture of size x size pixels by codec, start and end included, and the vocabulary."""
    jpeg = JPEG(size=size, restart=0)
    items = [*find_items(folder)]
    pictures = [*usable(items[:: max(1, len(items) // most)], jpeg)]  # spread evenly
    if not pictures:
        raise UserError(f"{folder} has no usable picture of {size} pixels: name larger ones, or give smaller --sizes")
    found = {
        f"JPEG, quality 25 ({len(pictures)} pictures)": (
            np.mean([len(jpeg.encode(each)) for each in pictures]) + 2,
            258,
        )
    }
    found |= {
        f"VQ, {side}x{side} pixels a code": ((size / side) ** 2 + 2, codes + 2)
        for side, codes in ((8, 4096), (4, 1024))
    }
    return found | {"pixels, 512 colours": (size**2 + 2, 514)}


def costs(folder: Path, sizes: list[int], preset: str, most: int) -> str:
    """FLOPs of a picture if it has a row to itself: 6 N + 12 layers dim length a token for training, a third for
    writing; N without embeddings."""
    rows = []
    for size in sizes:
        for name, (length, vocab) in lengths(size, folder, most).items():
            config = replace(CONFIGS[preset], vocab=vocab, context=math.ceil(length))
            flops = flops_of(config, computing_parameters(config)) * length
            cells = [str(size), name, f"{length - 2:,.0f}", f"{flops / 1e9:,.3g}", f"{flops / 3e9:,.3g}"]
            rows.append([*cells, f"{1000 * flops / (0.4 * PEAKS['H100']):,.3g}"])
    return "\n".join(table_of(HEAD, rows))


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("study", choices=("accuracy", "costs"))
    parser.add_argument("runs", type=Path, nargs="*", help="run folders, for accuracy")
    parser.add_argument("--data", type=Path, help="pictures, for costs; data folder, for accuracy (default: the run's)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64, 128, 256], help="pixels (default: 32 64 128 256)"
    )
    parser.add_argument(
        "--config", choices=CONFIGS, default="base", help="model whose FLOPs are counted (default: base)"
    )
    parser.add_argument("--count", type=int, default=200, help="pictures to measure JPEG on (default: 200)")
    flags = parser.parse(arguments)
    if (flags.study == "costs") == bool(flags.runs) or flags.study == "costs" and not flags.data:
        raise UserError("accuracy needs run folders, and costs --data and a folder of pictures")
    if flags.count < 1:
        raise UserError(f"--count is {flags.count}: choose 1 or more")
    if flags.study == "accuracy":
        accuracies(flags.runs, flags.data)
    else:
        print(costs(flags.data, flags.sizes, flags.config, flags.count))


if __name__ == "__main__":
    run(main)
