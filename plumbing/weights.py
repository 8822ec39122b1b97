"""Weights on disk: safetensors files, which can run no code, the rows that each of them holds, and the Llama they make.

A file is a length (8 bytes), a JSON of names, formats, shapes and places, then the numbers (huggingface/safetensors).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from model import Llama, ModelConfig
from plumbing.command import UserError

# --- files ----------------------------------------------------------------------------------------------------------

FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
FORMATS["BOOL"] = torch.bool


def write_safetensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Tensors by name, from any device, and notes about them."""
    header, at = {"__metadata__": {"format": "pt", **(about or {})}}, 0
    names = {kind: name for name, kind in FORMATS.items()}
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, mapped, not read, and the notes about them.  Errors: UserError if it is no such file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < begin <= size:
                raise ValueError(f"a header of {begin - 8} bytes in a file of {size}")
            header = json.loads(file.read(begin - 8))
        about, places = check_header(header, size - begin)
        data, found = torch.from_file(str(path), size=size, dtype=torch.uint8), {}
        for name, (start, end, kind, shape) in places.items():
            piece = data[begin + start : begin + end]
            piece = piece.clone() if (begin + start) % kind.itemsize else piece  # numbers must not lie askew
            found[name] = piece.view(kind).reshape(shape)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}): restore it, or do not use it") from None
    return found, about


def check_header(header: dict, size: int) -> tuple[dict[str, str], dict[str, tuple]]:
    """Notes, and of each tensor first byte, end, format and shape, if these fill `size` bytes without a gap or overlap.

    Errors: ValueError, LookupError, TypeError, AttributeError.
    """
    about = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in about.values()):
        raise ValueError("its notes are no texts")
    places, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape = entry["data_offsets"], entry["shape"]
        if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
            raise ValueError(f"{name!r}: shape {shape} at bytes {start} to {end}")
        kind = FORMATS[entry["dtype"]]
        if start != at or end != at + math.prod(shape) * kind.itemsize or end > size:
            free = f"where {at} to {size} are free"
            raise ValueError(f"{name!r}: {shape} of {entry['dtype']} at bytes {start} to {end}, {free}")
        places[name], at = (start, end, kind, shape), end
    if at != size:
        raise ValueError(f"{size - at} bytes too many")
    return about, places


# --- rows of sharded tensors ----------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> tuple[int, Tensor]:
    """The rows that this process holds of a tensor, and the number of the first; a scalar is one row."""
    if not isinstance(tensor, DTensor):
        return 0, torch.atleast_1d(tensor)
    mesh = tensor.device_mesh
    assert mesh.ndim == 1 and tensor.placements == (Shard(0),), tensor.placements
    share = -(-len(tensor) // mesh.size())  # as fully_shard cuts: the last processes may have fewer, or none
    return min(len(tensor), share * mesh.get_local_rank()), tensor.to_local()


class Rows(NamedTuple):
    """Some rows of a tensor: the number of the first, the shape of the whole, and the numbers."""

    first: int
    shape: list[int]
    numbers: Tensor


def read_rows(checkpoint: Path, config: ModelConfig) -> dict[str, list[Rows]]:
    """All tensors of a checkpoint, in the pieces in which they were written, mapped.

    Errors: UserError unless these are all rows of all weights of such a model, each once.
    """
    found = {}
    for path in sorted(checkpoint.glob("rank_*.safetensors")):
        tensors, about = read_safetensors(path)
        for name, numbers in tensors.items():
            try:
                note = json.loads(about[name])
                rows = Rows(note["first_row"], [*note["shape"]], torch.atleast_1d(numbers))
                if not all(type(number) is int for number in (rows.first, *rows.shape)):
                    raise ValueError(note)
            except (LookupError, ValueError, TypeError, RecursionError):
                raise UserError(f"{path} does not say which rows of {name} it holds: do not use it") from None
            found.setdefault(name, []).append(rows)
    if [rows.shape for rows in found.get("step", [])] != [[]]:
        raise UserError(f"{checkpoint} is no checkpoint of this version: take another, or delete it")
    for name, pieces in found.items():
        pieces.sort(key=lambda rows: rows.first)
        whole = pieces[0].shape or [1]  # a scalar is one row
        firsts = [0, *accumulate(len(rows.numbers) for rows in pieces)]
        fit = all(rows.shape == pieces[0].shape and [*rows.numbers.shape[1:]] == whole[1:] for rows in pieces)
        if not fit or firsts != [*(rows.first for rows in pieces), whole[0]]:
            raise UserError(f"{checkpoint} does not hold each row of {name} once: do not use it")
    shapes = {name[6:]: pieces[0].shape for name, pieces in found.items() if name.startswith("model.")}
    check_shapes(config, shapes, checkpoint)
    return found


@torch.no_grad()
def fill_rows(tensor: Tensor, pieces: list[Rows]) -> Tensor:
    """Write the rows that this process holds of a tensor."""
    begin, mine = rows_of(tensor)
    for first, _, numbers in pieces:
        low, high = max(begin, first), min(begin + len(mine), first + len(numbers))
        if low < high:
            mine[low - begin : high - begin] = numbers[low - first : high - first]
    return tensor


# --- the model they make --------------------------------------------------------------------------------------------

LARGEST = 1 << 24  # of a Llama's sizes: more is damage, and could not be allocated
RULES = {  # what a field of each type may hold in a JSON file
    int: lambda value: type(value) is int and 0 < value < LARGEST,
    float: lambda value: type(value) in (int, float) and 0 < value < 1e18,
    bool: lambda value: type(value) is bool,
    tuple[int, ...]: lambda value: isinstance(value, list | tuple) and all(map(RULES[int], value)),
}


def model_config(values: dict, path: Path, theirs: dict[str, str] | None = None) -> ModelConfig:
    """A model's shape from the values of a JSON file, whose names for them may be others.  Errors: UserError."""
    found = {}
    for field in fields(ModelConfig):
        name, value = (theirs or {}).get(field.name, field.name), values.get(field.name)
        if not RULES[field.type](value):
            what = f"{name} is {value!r}" if field.name in values else f"{name} is missing"
            raise UserError(f"{path} describes no Llama ({what}): restore it, or take another folder")
        found[field.name] = tuple(value) if isinstance(value, list) else field.type(value)
    config = ModelConfig(**found)
    if config.dim % config.heads or config.heads % config.kv_heads or config.dim // config.heads % 2:
        shape = f"width {config.dim}, {config.heads} heads, {config.kv_heads} of keys"
        raise UserError(f"{path} describes no Llama ({shape}: each must divide the one before, their ratio be even)")
    return config


def check_shapes(config: ModelConfig, shapes: dict[str, Sequence[int]], folder: Path) -> None:
    """Errors: UserError, naming a tensor, unless these are the names and shapes of such a model's weights."""
    odd = [f"layers.{config.layers - 1}"]
    if config.layers <= len(shapes):  # else some are missing, and a list of all could take for ever
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in Llama(config).state_dict().items()}
        given = {name: tuple(shape) for name, shape in shapes.items()}
        odd = [name for name in sorted({**wanted, **given}) if wanted.get(name) != given.get(name)]
    if odd:
        what = f"{odd[0]} and {len(odd) - 1} more" if odd[1:] else odd[0]
        raise UserError(f"{folder} does not hold the weights of its config.json ({what}): restore it, or take another")
