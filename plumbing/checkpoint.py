"""Checkpoints: OUT/step_N, one safetensors file of each process, config.json, the tokenizer, and sha256 of them all.

Each process writes the rows that it holds of every weight and of what the optimizer remembers of it, and notes beside
each tensor which row of the whole is its first, and the whole's shape: any number of processes can read that.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from codec import Tokenizer, load_tokenizer, save_tokenizer
from model import Llama, ModelConfig, empty
from plumbing import huggingface
from plumbing.command import UserError
from plumbing.files import digest, read_json, write_json
from plumbing.processes import PATIENCE, gather, rank, world
from plumbing.weights import Rows, fill_rows, model_config, read_rows, read_safetensors, rows_of, write_safetensors

Optimizers = Sequence[Optimizer]  # each of some weights

# --- writing --------------------------------------------------------------------------------------------------------


class Saver:
    """Writes OUT/step_N while training goes on: the state is copied to the CPU's memory, and a thread takes it from
    there.  It is written elsewhere, then synced, then renamed: under its name a checkpoint is whole or not there."""

    def __init__(self, out: Path):
        self.out, self.thread, self.pending = out, ThreadPoolExecutor(1), None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None  # the thread's

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, model: Llama, optimizers: Optimizers, step: int, config: ModelConfig, tokens: Tokenizer) -> None:
        """Begin to write, when the checkpoint before is there; `config.keep` of them stay."""
        self.wait()  # the copy before this one is let go of
        tensors, about = {}, {}
        for name, tensor in state_of(model, optimizers, step).items():
            if isinstance(tensor, DTensor) or rank() == 0:  # what is not sharded is the same everywhere
                first, rows = rows_of(tensor)
                tensors[name] = rows.detach().to("cpu", copy=True)
                about[name] = json.dumps({"first_row": first, "shape": list(tensor.shape)})
        part = self.out / f"step_{step:08d}.part"
        self.pending = self.thread.submit(self.write, part, tensors, about, config, tokens)

    def write(self, part: Path, tensors: dict, about: dict, config: ModelConfig, tokens: Tokenizer) -> None:
        """What the thread does: all write and hash their rows, then the first adds the rest and renames the folder."""
        manifests = self.together(part, lambda: write_rows(part, tensors, about))
        manifest = {name: sha for each in manifests for name, sha in each.items()}
        self.together(part, lambda: commit(part, manifest, config, tokens) if rank() == 0 else None)

    def together(self, part: Path, act: Callable[[], object]) -> list:
        """What an act gives on each process.  Errors: UserError on all of them, for an OSError or UserError on one."""
        value, failure = None, None
        try:
            value = act()
        except (OSError, UserError) as error:
            failure = str(error)
        values, failures = zip(*gather((value, failure), self.group), strict=True)
        if failure := next(filter(None, failures), None):
            shutil.rmtree(part, ignore_errors=True)
            advice = "make room and continue from the one before, which is whole"
            raise UserError(f"could not save {part.with_suffix('')} ({failure}): {advice}")
        return list(values)

    def look(self) -> None:
        """Whether the thread is done, or has failed: better now than at the next save.  Errors: UserError."""
        if self.pending and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is there.  Errors: UserError where it could not be written."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def state_of(model: Llama, optimizers: Optimizers, step: int) -> dict[str, Tensor]:
    """All that a run continues from: weights, whatever tensors the optimizer has for each of them, and the step."""
    state = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    names = {weight: name for name, weight in model.named_parameters()}
    for each in optimizers:
        for weight, memory in each.state.items():
            known = {key: value for key, value in memory.items() if torch.is_tensor(value)}
            state |= {f"optimizer.{names[weight]}.{key}": value for key, value in known.items()}
    return state | {"step": torch.tensor(step)}


def write_rows(part: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> dict[str, str]:
    """This process's file, read back once, and its sha256.  Errors: OSError, UserError."""
    part.mkdir(exist_ok=True)
    path = part / f"rank_{rank():05d}.safetensors"
    write_safetensors(path, tensors, about)
    sync(path)
    back, notes = read_safetensors(path)
    same = back.keys() == tensors.keys() and about.items() <= notes.items()
    for name, tensor in tensors.items() if same else ():
        numbers = [(each.dtype, each.shape, each.contiguous().view(torch.uint8)) for each in (tensor, back[name])]
        same = same and numbers[0][:2] == numbers[1][:2] and torch.equal(numbers[0][2], numbers[1][2])
    if not same:
        raise OSError(f"{path} does not hold what was written")
    return {path.name: digest(path)}


def commit(part: Path, manifest: dict[str, str], config: ModelConfig, tokens: Tokenizer) -> None:
    """Add the rest, give the folder its name, and remove old ones.  Errors: OSError."""
    for left in part.iterdir():  # by a save that was killed
        if left.name not in manifest:
            left.unlink()
    write_json(part / "config.json", asdict(config))
    save_tokenizer(part, tokens)
    manifest |= {file.name: digest(file) for file in part.iterdir() if file.name not in manifest}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*part.iterdir(), part):
        sync(path)
    shutil.rmtree(part.with_suffix(""), ignore_errors=True)
    os.replace(part, part.with_suffix(""))
    sync(part.parent)
    for old in checkpoints(part.parent)[config.keep :]:
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed now is tried again with the next


def sync(path: Path) -> None:
    """Until a file, or the list of a folder's files, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():  # not every system opens folders, nor needs it
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading --------------------------------------------------------------------------------------------------------


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest first."""
    return sorted((path for path in out.glob("step_*") if path.suffix != ".part"), reverse=True)


def damage(checkpoint: Path, share: slice = slice(None)) -> str | None:
    """None if every file, or every one of a share, is as it was written, else the name of the first that is not."""
    try:
        manifest = read_json(checkpoint / "manifest.json")
    except UserError:
        return "manifest.json"
    for name, sha in sorted(manifest.items())[share]:
        try:
            if name != Path(name).name or digest(checkpoint / name) != sha:
                return name
        except (OSError, ValueError):  # it is not there, or a training that goes on removes it just now
            return name
    return None


def newest(found: list[Path], say=print, judge=damage) -> Path | None:
    """The first undamaged one of some checkpoints, the newest first; what is passed over is named."""
    for checkpoint in found:
        if not (name := judge(checkpoint)):
            return checkpoint
        say(f"{checkpoint} is damaged ({name} is not as it was written): using the one before")


def load(out: Path, model: Llama, optimizers: Optimizers, say: Callable[[str], object]) -> int:
    """Continue from the newest undamaged checkpoint, on any number of processes: its step, 0 if there is none.

    Errors: UserError if all are damaged, or one is of another model.
    """

    def damage_anywhere(checkpoint: Path) -> str | None:  # each process reads its share of the files
        return next(filter(None, gather(damage(checkpoint, slice(rank(), None, world())))), None)

    there = gather(checkpoints(out))[0]
    path = newest(there, say, damage_anywhere)
    if path is None and there:
        raise UserError(f"{out} holds damaged checkpoints alone: restore one, or delete them to begin anew")
    if path is None:
        return 0
    found = read_rows(path, model.config)
    for name, weight in model.state_dict().items():
        fill_rows(weight, found[f"model.{name}"])
    names = {weight: name for name, weight in model.named_parameters()}
    for each in optimizers:
        state = each.state_dict()
        for number, weight in enumerate(weight for group in each.param_groups for weight in group["params"]):
            before = f"optimizer.{names[weight]}."
            memory = {name[len(before) :]: pieces for name, pieces in found.items() if name.startswith(before)}
            state["state"][number] = {key: fill_rows(room(pieces, weight), pieces) for key, pieces in memory.items()}
        each.load_state_dict(state)
    return int(found["step"][0].numbers)


def room(pieces: list[Rows], weight: Tensor) -> Tensor:
    """An empty tensor for what an optimizer remembers of a weight, sharded as that is if it has the same shape."""
    shape, kind = pieces[0].shape, pieces[0].numbers.dtype
    return torch.empty_like(weight, dtype=kind) if shape == list(weight.shape) else torch.empty(shape, dtype=kind)


def read_model(checkpoint: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model of a checkpoint, whole, on one device, whatever number of processes wrote it, and its tokens."""
    path = checkpoint / "config.json"
    config, tokens = model_config(read_json(path), path), load_tokenizer(checkpoint)
    if config.vocab != tokens.vocab or config.positions and config.positions != tokens.grammar.sizes:
        raise UserError(f"{path} describes a model of other tokens than codec.json: take another checkpoint")
    found, model = read_rows(checkpoint, config), empty(config, device).eval()
    for name, weight in model.state_dict().items():
        fill_rows(weight, found[f"model.{name}"])
    return model, tokens


def read_run(out: Path, device: torch.device) -> tuple[Llama, Tokenizer, Path]:
    """Model and tokens of a run's newest checkpoint, or of a Llama folder of Hugging Face; and where they were."""
    if not any(out.glob("step_*")) and huggingface.weight_files(out):
        return *huggingface.read(out, device), out
    found = checkpoints(out)
    checkpoint = newest(found)
    if checkpoint is None and found:
        raise UserError(f"{out} holds damaged checkpoints alone: restore one, or train anew")
    if checkpoint is None:
        raise UserError(f"{out} holds no checkpoint: run `python train.py --out {out}` first")
    return *read_model(checkpoint, device), checkpoint
