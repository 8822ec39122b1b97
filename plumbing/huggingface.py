"""Hugging Face's Llama folders, out and in: config.json, weights in .safetensors or .bin, tokenizer.model.

    python train.py --out out/small --export folder           # LlamaForCausalLM.from_pretrained("folder")
    python sample.py folder --length 8192 --batch 4       # such a folder, or one published for JPEG-LM

A sentencepiece tokenizer numbers its tokens otherwise than `codec.Tokenizer` does.  Its rows of the embedding and of
the head are put into our order once, when they are read, and nothing else has to know.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor

from codec import JPEG, Tokenizer, load_tokenizer, save_tokenizer
from model import Llama, ModelConfig, empty, fill
from plumbing.command import UserError
from plumbing.files import read_json, write_json
from plumbing.weights import check_shapes, model_config, read_safetensors, write_safetensors

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
OURS = {  # what else changes the logits, and what it must be where it is given
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "tie_word_embeddings": (False, True),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
}
ROPE = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row of each token
BYTE = 0x2800  # the character of byte 0: Braille patterns, one for each byte


# --- weights --------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """In either format, without the network that a VQ's codec leaves beside them."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "vq.safetensors"]
    return found or sorted(folder.glob("pytorch_model*.bin"))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or many, mapped where they can be.  Nothing in them is run."""
    state = {}
    for path in weight_files(folder):
        found = read_bin(path) if path.suffix == ".bin" else read_safetensors(path)[0]
        for name, tensor in found.items():
            if not tensor.is_floating_point():
                raise UserError(f"{path} holds {name} as {tensor.dtype}: only weights of floating point are read")
            if name in state:
                raise UserError(f"{folder} holds {name} twice, the second in {path.name}: keep one set of weights")
        state |= found
    if not state:
        raise UserError(f"{folder} holds no weights (*.safetensors or pytorch_model*.bin): download them as well")
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if "rotary_emb" not in name}


def read_bin(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # a damaged pickle may raise whatever there is
        what = f"{type(error).__name__}, or parts that no tensor has"
        raise UserError(f"{path} cannot be read ({what}): download it anew") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path} holds other things than tensors: download it anew")
    return found


# --- the tokenizer --------------------------------------------------------------------------------------------------


def messages(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffer, number and value: integers as such, all else as bytes.

    Errors: IndexError where it ends too early, KeyError for a kind that there is not.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError("an integer without an end")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        if at + length > len(data):
            raise IndexError("a field without an end")
        yield key >> 3, data[at : at + length]
        at += length


def read_pieces(path: Path) -> list[tuple[str, int]]:
    """Text and kind of each piece of a sentencepiece model.  Errors: UserError for a file that is cut or no such model.

    A piece is a message of text (field 1), score (2) and kind (3: unknown 2, control 3; plain, 1, where it is absent).
    How the model was trained comes behind the last piece (field 2 of the file).
    """
    try:
        fields = list(messages(path.read_bytes()))
        pieces = [dict(messages(value)) for number, value in fields if number == 1]
        found = [(piece[1].decode(), piece.get(3, 1)) for piece in pieces]
        if not found or not any(number == 2 for number, _ in fields):
            raise ValueError("it ends too early")
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no whole sentencepiece model ({error}): download it anew") from None
    return found


def read_tokenizer(path: Path, codec: JPEG) -> tuple[Tokenizer, list[int]]:
    """A sentencepiece model of bytes as tokens of ours, and the row of the model that each of them has there.

    Pieces are merged in the order of their numbers.  A byte that has no piece of its own is read as unknown.
    """
    pieces = read_pieces(path)
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
    return Tokenizer(codec, tuple(merges), made_by=("another encoder", "unknown")), order


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
    write_json(folder / "config.json", theirs)
    inside = {name: "" if name.startswith("lm_head") else "model." for name in model.state_dict()}
    write_safetensors(folder / "model.safetensors", {inside[n] + n: tensor for n, tensor in model.state_dict().items()})
    save_tokenizer(folder, tokens)


def read(folder: Path, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model of a Llama folder, in float32, and its tokens.  Errors: those of `read_parts`."""
    config, tokens, state = read_parts(folder)
    model = empty(config, device)
    for name, weight in model.named_parameters():
        fill(weight, state[name])
    return model.eval(), tokens


def begin_from(model: Llama, tokenizer: Tokenizer, folder: Path) -> str:
    """Give a model the weights of a Llama folder, and say so; tokens that both know, by what they stand for, keep their
    rows.  Errors: UserError if it has another shape."""
    theirs, known, state = read_parts(folder)
    same = ("dim", "layers", "heads", "kv_heads", "hidden", "rope_theta", "norm_eps", "qk_norm")
    if any(getattr(theirs, name) != getattr(model.config, name) for name in same):
        shape = " ".join(f"--{name.replace('_', '-')} {getattr(theirs, name)}" for name in same[:-1])
        raise UserError(f"{folder} is a Llama of another shape: give {shape} --no-qk-norm")
    rows = {piece.tobytes(): row for row, piece in enumerate(known.expansions)}
    order = [rows.get(piece.tobytes(), -1) for piece in tokenizer.expansions] + [known.start, known.end]
    shared = torch.tensor([row >= 0 for row in order])
    for name in TABLES:
        fresh = torch.randn(len(order), model.config.dim, generator=torch.Generator().manual_seed(0)) * 0.02
        state[name] = torch.where(shared[:, None], state[name][torch.tensor(order)], fresh)
    for name, weight in model.named_parameters():
        if name in state:
            fill(weight, state[name])
    return f"begins with {folder}; {int(shared.sum())} of {len(order)} tokens are known there"


def read_parts(folder: Path) -> tuple[ModelConfig, Tokenizer, dict[str, Tensor]]:
    """Shape, tokens and weights of a Llama folder, the weights as they lie in its files, which are mapped, not read.

    The tokens come from codec.json, or from tokenizer.model and JPEGs of the paper.  Errors: UserError for what is no
    Llama, or has parts that ours has not.
    """
    path = folder / "config.json"
    theirs = read_json(path)
    config = read_config(path, theirs)
    state = read_weights(folder)
    embedding, head = (state.get(name) for name in TABLES)
    if theirs.get("tie_word_embeddings") and embedding is not None:
        if head is not None and not (head.shape == embedding.shape and torch.equal(head.float(), embedding.float())):
            raise UserError(f"{folder} holds an {TABLES[1]} of its own, but {path} ties it: correct one of them")
        state[TABLES[1]] = embedding
    elif head is None:
        raise UserError(f"{folder} holds no {TABLES[1]}, and {path} ties none to the embedding: download all weights")
    check_shapes(config, {name: tensor.shape for name, tensor in state.items()}, folder)
    if (folder / "codec.json").exists():
        tokens, order = load_tokenizer(folder), list(range(config.vocab))
    elif (folder / "tokenizer.model").exists():
        tokens, order = read_tokenizer(folder / "tokenizer.model", JPEG(size=256, header=True))
    else:
        raise UserError(f"{folder} holds neither codec.json nor tokenizer.model: download the tokenizer as well")
    if len(order) != tokens.vocab or max(order) >= config.vocab:
        count = f"{tokens.vocab} tokens, the model {config.vocab}"
        raise UserError(f"{folder} holds a tokenizer of {count}: take the tokenizer that belongs to it")
    for name in TABLES:
        state[name] = state[name][torch.tensor(order)]
    return replace(config, vocab=tokens.vocab), tokens, state


def read_config(path: Path, theirs: dict) -> ModelConfig:
    """The shape that a config.json of transformers describes.  Errors: UserError for all that ours would compute
    otherwise: better no model than another one."""
    if theirs.get("model_type") != "llama":
        raise UserError(f"{path} is of a {theirs.get('model_type')}: only a Llama is read")
    ropes = [theirs.get("rope_scaling") or {}, theirs.get("rope_parameters") or {}]  # the old and the new name
    if not all(isinstance(rope, dict) for rope in ropes):
        raise UserError(f"{path} has {ropes} for rotary positions: restore it, or take another folder")
    for name, value, fit in [
        *((name, theirs.get(name), fit) for name, fit in OURS.items()),
        *((name, rope.get(name), fit) for rope in ropes for name, fit in ROPE.items()),
    ]:
        if value is not None and value not in fit:
            raise UserError(f"{path} has {name} {value!r}: only a Llama with {fit[0]!r} there is read")
    values = {ours: theirs.get(name) for name, ours in NAMES.items() if name in theirs}
    if values.get("kv_heads") is None:
        values["kv_heads"] = values.get("heads")
    theta = next((place["rope_theta"] for place in (*ropes, theirs) if place.get("rope_theta") is not None), 10_000.0)
    values |= {"positions": [], "qk_norm": False, "rope_theta": theta}
    config = model_config(values, path, {ours: name for name, ours in NAMES.items()})
    if (wide := theirs.get("head_dim")) is not None and wide != config.dim // config.heads:
        what = f"hidden_size / num_attention_heads, {config.dim // config.heads},"
        raise UserError(f"{path} has head_dim {wide!r}: only a Llama with {what} there is read")
    return config
