"""Let a trained model write files.

    python sample.py out/small                                        # 64 pictures into out/small/samples, and a grid
    python sample.py out/small --prompt cat.png --keep 0.5            # complete the lower half of a picture
    python sample.py out/small --prompt photos --keep 0.25 0.5 0.75 --to completed

Each picture has a seed of its own, (--seed, its number), so it does not depend on the batch it is drawn in.  The
files hold the very bytes that the model wrote, with the tables put back; the last line counts how many are whole
valid files.
"""

import io
import json
import math
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from codec import Grammar, Tokenizer, foreign_encoder, load_tokenizer
from data.pictures import read_square
from data.prepare import chunks
from data.sources import Item, Unusable, read_file, walk
from model import Cache, Llama, ModelConfig, empty
from plumbing import huggingface
from plumbing.command import Flags, UserError, differences, run
from plumbing.files import digest, write_whole

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that one process saves or reads alone is meant

# --- generation -----------------------------------------------------------------------------------------------------

# All kernels of attention but cuDNN's, which is built anew for each length: that pays in training alone.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw a next token for each row of logits (B, V) with its number `uniform` (B,) in [0, 1): (B,).

    Of the `top_k` likeliest (0: all), those that make up `top_p` of the probability; temperature 0 takes the likeliest.
    The tokens stand in the order of their probability, and the number says how far down the row to go.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    probability = (values / temperature).softmax(-1)
    probability[probability.cumsum(-1) - probability >= top_p] = 0
    below = probability.cumsum(-1)
    place = torch.searchsorted(below, (uniform * below[:, -1])[:, None], right=True)
    return tokens.gather(-1, place.clamp(max=(probability > 0).sum(-1, keepdim=True) - 1))[:, 0]


@lru_cache(2)
def on(device: torch.device, grammar: Grammar) -> Grammar:
    """The grammar with its tables on a device."""
    tables = {name: getattr(grammar, name) for name in ("table", "away", "syntax", "places")}
    return replace(grammar, **{name: torch.from_numpy(table).to(device) for name, table in tables.items()})


def begin(grammar: Grammar, prompts: list[np.ndarray], length: int) -> None:
    """Refuse prompts that begin no valid file, or none that can end within `length` tokens."""
    size = len(grammar.table)
    for number, prompt in enumerate(prompts):
        states, allowed = grammar.walk(prompt[None].astype(np.int64))
        if not allowed.all():
            where = f"token {int(allowed[0].argmin())} of {len(prompt)}"
            advice = "encode it as the model's data, or pass --free"
            raise UserError(f"prompt {number} does not begin a valid file ({where}): {advice}")
        rest = int(grammar.rest(states[0, -1] // size, states[0, -1] % size))
        if rest > length - len(prompt):
            room = f"{max(0, length - len(prompt))} are left after a prompt of {len(prompt)}"
            needs = f"the rest of the file takes {rest} tokens or more, and {room}"
            raise UserError(f"{needs}: pass --free, or take a model of more context")


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def generate(
    model: Llama,
    tokens: Tokenizer,
    prompts: list[np.ndarray],
    seeds: list[tuple[int, int]],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    length: int | None = None,
    free: bool = False,
    over: Callable[[Tensor], Tensor] = torch.all,
) -> list[np.ndarray]:
    """Continue each prompt, tokens (n,), to the end of a whole valid file of `length` tokens (the context) at most.

    Only tokens that the grammar allows are drawn; if `free`, all are, and the length may cut the file.  The prompts
    may differ in length: where one is longer than the others, its tokens take the place of those drawn.  `over` says
    whether all files (B,) have ended; processes that share a model must agree.
    """
    device = model.lm_head.weight.device
    length = min(length or model.config.context, model.config.context)
    if not free:
        begin(tokens.grammar, prompts, length)
    grammar = on(device, tokens.grammar)
    numbers = [np.random.Generator(np.random.Philox(key=list(seed))).random(length, np.float32) for seed in seeds]
    uniform = torch.from_numpy(np.stack(numbers)).to(device)
    written = torch.full((len(prompts), length), -1, dtype=torch.long)
    for row, prompt in zip(written, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(prompt[:length].astype(np.int64))
    written, given = written.to(device), min(map(len, prompts))
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    states = torch.from_numpy(tokens.grammar.walk(written[:, :given].cpu().numpy())[0]).to(device)
    cache, state = Cache(model.config, len(prompts), length), states[:, -1]
    logits = model(written[:, :given], grammar.position(states), cache)[:, -1]
    for at in range(given, length):
        legal = grammar.legal(state, length - 1 - at) | free
        drawn = choose(logits.masked_fill(~legal, -math.inf), uniform[:, at], temperature, top_k, top_p)
        written[:, at] = torch.where(written[:, at] >= 0, written[:, at], drawn.masked_fill(done, tokens.end))
        done |= written[:, at] == tokens.end
        if at % 16 == 0 and over(done):  # asking every step would make a GPU wait
            break
        if at < length - 1:
            state, _ = grammar.advance(state, written[:, at])
            logits = model(written[:, at : at + 1], grammar.position(state)[:, None], cache)[:, -1]
    return [row[row >= 0] for row in written.cpu().numpy()]


def at_once(model: Llama, length: int) -> int:
    """How many files of so many tokens: their keys and values fill no more than a quarter of a GPU, or 4 GB."""
    config, device = model.config, model.lm_head.weight.device
    budget = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 4 << 30
    numbers = 2 * config.layers * config.kv_heads * (config.dim // config.heads) * length
    return max(1, min(64, budget // (numbers * precision(device).itemsize)))


def grid(pictures: list[np.ndarray]) -> Image.Image:
    """Pictures (H, W, 3) side by side, a thin line between them, enlarged if they are small."""
    columns = math.ceil(len(pictures) ** 0.5)
    height, width, _ = pictures[0].shape
    sheet = np.full((-(-len(pictures) // columns) * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[top : top + height, left : left + width] = picture
    image, scale = Image.fromarray(sheet), max(1, 512 // sheet.shape[1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


# --- the machine ----------------------------------------------------------------------------------------------------


def best_device() -> torch.device:
    """This process's GPU where there is one, else a Mac's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device: torch.device) -> torch.dtype:
    """What to compute in: bf16 where a GPU has it, else float32, which most CPUs are faster in."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


# --- a run folder ---------------------------------------------------------------------------------------------------


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest first."""
    return sorted((path for path in out.glob("step_*") if path.suffix != ".part"), reverse=True)


def damage(checkpoint: Path, share: slice = slice(None)) -> str | None:
    """None if every file, or every one of a share, is as it was written, else the name of the first that is not."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json"
    for name, sha in sorted(manifest.items())[share]:
        try:
            if digest(checkpoint / name) != sha:
                return name
        except OSError:  # it is not there, or a training that goes on removes it just now
            return name
    return None


def newest(found: list[Path], say=print, judge=damage) -> Path | None:
    """The first undamaged one of some checkpoints, the newest first; what is passed over is named."""
    for checkpoint in found:
        if not (name := judge(checkpoint)):
            return checkpoint
        say(f"{checkpoint} is damaged ({name} is not as it was written): using the one before")


PARTS = {  # what torch pickles into the .metadata of a checkpoint; besides, names of number formats
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
}


class Metadata(pickle.Unpickler):
    """Refuses whatever is no part of a checkpoint, before it runs: a pickle can name any function."""

    def find_class(self, module: str, name: str) -> object:
        if name in PARTS.get(module, ()) or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class Planner(DefaultLoadPlanner):
    """Reads what is no tensor without running code from the file."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_state(state: dict, checkpoint: Path) -> None:
    """Fill a nested dictionary of tensors, whole or sharded, from a checkpoint.  Errors: UserError for foreign code."""
    try:
        with open(checkpoint / ".metadata", "rb") as file:
            Metadata(file).load()
        dcp.load(state, checkpoint_id=checkpoint, planner=Planner())
    except (pickle.UnpicklingError, CheckpointException) as error:
        raise UserError(f"{checkpoint} holds what no checkpoint of ours does ({cause(error)}): do not use it") from None


def cause(error: BaseException) -> BaseException:
    """What distributed checkpoints wrap, once for each stage."""
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return error


def load_checkpoint(checkpoint: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model of a checkpoint, whole, on one device, whatever number of processes wrote it, and its tokens."""
    saved = json.loads((checkpoint / "config.json").read_text())
    config = ModelConfig(**{field.name: saved[field.name] for field in fields(ModelConfig) if field.name in saved})
    model = empty(config, device).eval()
    read_state({"model": model.state_dict()}, checkpoint)
    return model, load_tokenizer(checkpoint)


def read_run(out: Path, device: torch.device) -> tuple[Llama, Tokenizer, Path]:
    """Model and tokens of a run's newest checkpoint, or of a Llama folder of Hugging Face; and where they were."""
    if not any(out.glob("step_*")) and (any(out.glob("*.safetensors")) or any(out.glob("pytorch_model*.bin"))):
        return *huggingface.read(out, device), out
    checkpoint = newest(checkpoints(out))
    if checkpoint is None:
        raise UserError(f"{out} holds no checkpoint: run `python train.py --out {out}` first")
    return *load_checkpoint(checkpoint, device), checkpoint


# --- the command ----------------------------------------------------------------------------------------------------


def read_prompts(source: Path, tokens: Tokenizer, to: Path) -> list[np.ndarray]:
    """The symbols of a picture, or of every picture below a folder, encoded anew with the settings of the model.

    Beside the completions go what to compare them with: TO/originals, as cut out and resized, and TO/roundtrip, as the
    codec gives them back.
    """
    found = []
    for item in walk(source) if source.is_dir() else [Item(str(source), 0, -1, source.name)]:
        try:
            pixels = read_square(read_file(item), tokens.codec.size)
        except Unusable as reason:
            print(f"skipped {item.name}: {reason}")
            continue
        found.append(tokens.codec.encode(pixels))
        for name in ("originals", "roundtrip"):
            (to / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(to / "originals" / f"{len(found) - 1:05d}.png")
        (to / "roundtrip" / f"{len(found) - 1:05d}{tokens.codec.suffix}").write_bytes(tokens.codec.file(found[-1]))
    if not found:
        raise UserError(f"--prompt {source} holds no usable picture: name an image file, or a folder of them")
    return found


def write(folder: Path, model: Llama, tokens: Tokenizer, prompts: list[np.ndarray], settings: dict, batch: int) -> int:
    """Complete the prompts (symbols), write the files that are not there yet, and count the valid ones."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "samples.json"
    if note.exists() and (changed := differences(json.loads(note.read_text()), settings)):
        raise UserError(f"{folder} holds other samples ({changed}): choose another with --to, or delete this one")
    note.write_text(json.dumps(settings, indent=1) + "\n")
    paths = [folder / f"{i:05d}{tokens.codec.suffix}" for i in range(len(prompts))]
    waiting = [i for i, path in enumerate(paths) if not path.exists()]
    limits = {name: settings[name] for name in ("temperature", "top_k", "top_p", "length", "free")}
    with tqdm(total=len(paths), initial=len(paths) - len(waiting), unit=" files", desc=str(folder)) as bar:
        for numbers in chunks(waiting, batch):
            begun = [tokens.encode([prompts[i]])[0][:-1] for i in numbers]  # all but the end
            rows = generate(model, tokens, begun, [(settings["seed"], i) for i in numbers], **limits)
            for i, row in zip(numbers, rows, strict=True):
                symbols = tokens.decode(row)
                if wrong := tokens.codec.check(symbols):
                    with open(folder / "invalid.txt", "a") as file:
                        file.write(f"{paths[i].name}\t{wrong}\n")
                write_whole(paths[i], tokens.codec.file(symbols))
                bar.update()
    grid([np.asarray(Image.open(path)) for path in paths[:64]]).save(folder / "grid.png")
    invalid = (folder / "invalid.txt").read_text().splitlines() if (folder / "invalid.txt").exists() else []
    return len(paths) - len({line.split("\t")[0] for line in invalid})


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="run folder of train.py, or a Llama folder of Hugging Face")
    parser.add_argument(
        "--count", type=int, help="how many files (default: 64), or how many of each prompt (default: 1)"
    )
    parser.add_argument("--to", type=Path, help="folder to write (default: RUN/samples or RUN/completions)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that make up p (default: 1)")
    parser.add_argument("--length", type=int, help="tokens of a file at most (default: the model's context)")
    parser.add_argument("--batch", type=int, help="files at once (default: 64, or what fits the memory)")
    parser.add_argument("--prompt", type=Path, help="a picture to complete, or a folder of them")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5], help="share of the rows given (default: 0.5)")
    parser.add_argument("--free", action="store_true", help="let the model write what the format does not allow")
    flags = parser.parse(arguments)
    counts = [value for value in (flags.batch, flags.count, flags.length) if value is not None]
    if min(flags.temperature, flags.top_k, flags.seed) < 0 or not 0 < flags.top_p <= 1 or min(counts, default=1) < 1:
        bounds = "--temperature, --top-k and --seed are at least 0, --batch, --count and --length at least 1"
        raise UserError(f"{bounds}, --top-p is above 0 and up to 1")

    device = best_device()
    model, tokens, source = read_run(flags.run, device)
    model.to(precision(device))
    if not flags.free and not tokens.grammar.shortest:
        print(f"note: the grammar does not cover {tokens.codec}, so that files may be invalid, as with --free")
    settings = {name: getattr(flags, name) for name in ("seed", "temperature", "top_k", "top_p", "length", "free")}
    settings |= {"checkpoint": str(source), "codec": asdict(tokens.codec)}
    if flags.prompt is None:
        jobs = {flags.to or flags.run / "samples": [np.empty(0, tokens.dtype)] * (flags.count or 64)}
    else:
        if warning := foreign_encoder(source, tokens.codec):
            print(f"warning: {warning}")
        to = flags.to or flags.run / "completions"
        pictures = read_prompts(flags.prompt, tokens, to)
        jobs = {
            to / f"keep_{keep:g}": [tokens.codec.head(p, keep) for p in pictures for _ in range(flags.count or 1)]
            for keep in flags.keep
        }
    batch = flags.batch or at_once(model, flags.length or model.config.context)
    for folder, prompts in jobs.items():
        more = {"count": len(prompts), "prompt": str(flags.prompt)}
        valid = write(folder, model, tokens, prompts, settings | more, batch)
        print(f"{folder}: {valid} of {len(prompts)} are whole valid files")


if __name__ == "__main__":
    run(main)
