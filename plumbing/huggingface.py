"""Hugging Face's Llama folders, out and in: config.json, weights in .safetensors or .bin, tokenizer.model.

    python train.py --out out/small --hf folder           # LlamaForCausalLM.from_pretrained("folder")
    python sample.py folder --length 8192 --batch 4       # such a folder, or one published for JPEG-LM

A sentencepiece tokenizer numbers its tokens otherwise than `codec.Tokenizer` does.  Its rows of the embedding and of
the head are put into our order once, when they are read, and nothing else has to know.
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor

from codec import JPEG, Tokenizer, load_tokenizer, save_tokenizer
from model import Llama, ModelConfig, empty, fill
from plumbing.command import UserError

NAMES = {  # theirs and ours
    "vocab_size": "vocab",
    "max_position_embeddings": "context",
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "hidden",
    "rms_norm_eps": "norm_eps",
}
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTE = 0x2800  # the character of byte 0: Braille patterns, one for each byte


# --- weights --------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A length (8 bytes), a JSON of names, formats, shapes and places, then the numbers (huggingface/safetensors)."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)  # mapped, not read
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    header = json.loads(data[8 : 8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        piece, kind = data[8 + length + begin : 8 + length + end], FORMATS[entry["dtype"]]
        piece = piece.clone() if (8 + length + begin) % kind.itemsize else piece  # numbers must not lie askew
        found[name] = piece.view(kind).reshape(entry["shape"])
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or many, mapped where they can be.  Nothing in them is run."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        try:
            if path.suffix == ".bin":
                state |= torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            else:
                state |= read_safetensors(path)
        except (ValueError, LookupError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}): download it anew") from None
    if not state:
        raise UserError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin: download the weights as well")
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


# --- the tokenizer --------------------------------------------------------------------------------------------------


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer, number and value: integers as such, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + length]
        at += length


def read_tokenizer(path: Path, codec: JPEG) -> tuple[Tokenizer, list[int]]:
    """A sentencepiece model of bytes as tokens of ours, and the row of the model that each of them has there.

    A piece is a message of text (field 1), score (2) and kind (3: unknown 2, control 3); pieces are merged in the
    order of their numbers.  A byte that has no piece of its own is read as unknown.
    """
    pieces = []
    for number, value in fields(path.read_bytes()):
        if number == 1:
            parts = dict(fields(value))
            pieces.append((parts[1].decode(), parts.get(3, 1)))
    known = {chr(BYTE + byte) for byte in range(256)}
    rows = {text: row for row, (text, kind) in enumerate(pieces) if kind == 1 and known.issuperset(text)}
    unknown = next((row for row, (_, kind) in enumerate(pieces) if kind == 2), 0)
    controls = {text: row for row, (text, kind) in enumerate(pieces) if kind == 3}
    order = [rows.get(chr(BYTE + byte), unknown) for byte in range(256)]
    ours, merges = {chr(BYTE + byte): byte for byte in range(256)}, []
    for text, row in rows.items():
        if len(text) == 1:
            continue
        splits = [(ours.get(text[:i]), ours.get(text[i:])) for i in range(1, len(text))]
        splits = [split for split in splits if None not in split]
        if not splits:
            raise UserError(f"{path}: piece {row} is no pair of pieces before it, so this is no byte-pair model")
        ours[text] = 256 + len(merges)
        merges.append(splits[-1])
        order.append(row)
    try:
        order += [controls["<s>"], controls["</s>"]]
    except KeyError as missing:
        raise UserError(f"{path} has no {missing}: only tokenizers with <s> and </s> are read") from None
    return Tokenizer(codec, tuple(merges)), order


# --- folders --------------------------------------------------------------------------------------------------------


def settings(config: ModelConfig) -> dict[str, object]:
    """The shape of a model in the words of transformers' configurations."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    theirs = {name: getattr(config, ours) for name, ours in NAMES.items()}
    return {**theirs, "rope_parameters": rope, "tie_word_embeddings": False}


def write(folder: Path, model: Llama, tokens: Tokenizer) -> None:
    """A folder that transformers loads to the same logits.  Errors: UserError, if the model is no plain Llama."""
    config = model.config
    if config.positions or config.qk_norm:
        raise UserError("transformers' Llama has no syntax positions, no QK-norm: train with --no-syntax --no-qk-norm")
    folder.mkdir(parents=True, exist_ok=True)
    theirs = settings(config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "bos_token_id": tokens.start,
        "eos_token_id": tokens.end,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(theirs, indent=1) + "\n")
    inside = {name: "" if name.startswith("lm_head") else "model." for name in model.state_dict()}
    write_safetensors(folder / "model.safetensors", {inside[n] + n: tensor for n, tensor in model.state_dict().items()})
    save_tokenizer(folder, tokens)


def read(folder: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model of a Llama folder, in float32, and its tokens.  Errors: those of `parts`."""
    config, tokens, state = parts(folder)
    model = empty(config, device)
    for name, weight in model.named_parameters():
        fill(weight, state[name])
    return model.eval(), tokens


def parts(folder: Path) -> tuple[ModelConfig, Tokenizer, dict[str, Tensor]]:
    """Shape, tokens and weights of a Llama folder, the weights as they lie in its files, which are mapped, not read.

    The tokens come from codec.json, or from tokenizer.model and JPEGs of the paper.  Errors: UserError for what is no
    Llama, or has parts that ours has not.
    """
    try:
        theirs = json.loads((folder / "config.json").read_text())
        ours = {name: theirs.get(key) for key, name in NAMES.items()}
        ours["kv_heads"] = ours["kv_heads"] or ours["heads"]
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        theta = theirs.get("rope_theta") or rope.get("rope_theta") or 10_000.0
        kind = rope.get("rope_type", rope.get("type", "default"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error}): name a Llama folder") from None
    if theirs.get("model_type") != "llama" or None in ours.values() or kind != "default":
        what = f"a {theirs.get('model_type')} with {kind} rotary positions"
        raise UserError(f"{folder} is {what}: only a plain Llama is read")
    state = read_weights(folder)
    state = {name: tensor for name, tensor in state.items() if "rotary_emb" not in name}
    if "lm_head.weight" not in state and "embed_tokens.weight" in state:
        state["lm_head.weight"] = state["embed_tokens.weight"]  # tied
    if (folder / "codec.json").exists():
        tokens, order = load_tokenizer(folder), list(range(ours["vocab"]))
    elif (folder / "tokenizer.model").exists():
        tokens, order = read_tokenizer(folder / "tokenizer.model", JPEG(size=256, header=True))
    else:
        raise UserError(f"{folder} holds neither codec.json nor tokenizer.model: download the tokenizer as well")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in state and len(state[name]) > max(order):
            state[name] = state[name][torch.tensor(order)]
    config = ModelConfig(**{**ours, "vocab": tokens.vocab, "rope_theta": float(theta)})
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != wanted:
        odd = sorted(set(state) ^ set(wanted)) or [name for name in wanted if state[name].shape != wanted[name]]
        raise UserError(f"{folder} does not hold the weights of its config.json ({odd[0]} and {len(odd) - 1} more)")
    return config, tokens, state
