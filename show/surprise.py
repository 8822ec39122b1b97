"""Where a model is surprised by files, and how well it would compress them."""

import math
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from codec import Codec, Outline, Tokenizer
from data.prepare import read
from data.sources import Unusable, items_at
from grammar import FAR
from model import Llama
from plumbing.command import UserError
from plumbing.draw import save_image
from plumbing.files import write_json
from plumbing.processes import ANY_LENGTH
from show.hexdump import CELL, COLUMNS, FAINT, INK, counted, font, heat, hexdump, legend

# --- what a file costs ----------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a model needs for a file, in bits, which are minus the logarithms to base 2 of its probabilities."""

    name: str
    codec: Codec
    pixels: np.ndarray  # as the codec gives them back
    symbols: np.ndarray  # (n,)
    each: np.ndarray  # (n,) bits of each symbol, those of a pair shared between them
    total: float  # bits, those of the end included
    legal: float  # if tokens that the grammar's mask knows to be illegal had no probability

    @cached_property
    def outline(self) -> Outline:
        return self.codec.outline(self.symbols)

    @cached_property
    def units(self) -> np.ndarray:
        """Bits of each part of the picture, in the shape of `Codec.units`."""
        of, bits = self.outline.units, np.repeat(self.each, self.outline.units.shape[1])
        inside = of.flatten() >= 0
        found = np.bincount(of.flatten()[inside], bits[inside] / of.shape[1], int(np.prod(self.codec.units)))
        return found.reshape(self.codec.units)


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def read_through(model: Llama, tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Before each token behind the start: the logits (m - 1, V) of all, which are illegal (m - 1, V), and the syntax
    positions (m - 1, F).

    What is longer than the context is read in pieces of it, which know nothing of those before, as in training.
    """
    device, grammar = model.lm_head.weight.device, tokenizer.grammar
    before = grammar.walk([tokens]).states[0, : len(tokens) - 1]
    syntax = torch.from_numpy(grammar.positions(before).astype(np.int64))
    x = torch.from_numpy(tokens[:-1].astype(np.int64))
    pieces = zip(*(each[None].to(device).split(model.config.context, 1) for each in (x, syntax)), strict=True)
    logits = [model(*piece)[0].float().cpu() for piece in pieces]
    return torch.cat(logits), torch.from_numpy(grammar.mask(before, FAR - 1)), syntax


def bits_of(model: Llama, tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each token behind the start (m - 1,), and of these if illegal tokens had no probability."""
    logits, illegal, _ = read_through(model, tokenizer, tokens)
    y, masked = torch.from_numpy(tokens[1:].astype(np.int64)), logits.masked_fill(illegal, -torch.inf)
    plain, legal = (F.cross_entropy(each, y, reduction="none").double() / math.log(2) for each in (logits, masked))
    return plain.numpy(), legal.numpy()


def over_symbols(tokenizer: Tokenizer, tokens: Sequence[int], bits: Sequence[float]) -> np.ndarray:
    """The bits of tokens shared between the symbols that each stands for."""
    lengths = np.array([len(tokenizer.expansions[token]) for token in tokens], int)
    return np.repeat(np.array(bits) / lengths, lengths)


def cost_of(model: Llama, tokenizer: Tokenizer, name: str, pixels: np.ndarray) -> Cost:
    """What the file that pixels are encoded to costs."""
    symbols = tokenizer.codec.encode(pixels)
    tokens = tokenizer.encode([symbols])[0]
    plain, legal = bits_of(model, tokenizer, tokens)
    each = over_symbols(tokenizer, tokens[1:-1], plain[:-1])
    return Cost(name, tokenizer.codec, tokenizer.codec.decode(symbols), symbols, each, plain.sum(), legal.sum())


def costs(model: Llama, tokenizer: Tokenizer, sources: list[Path]) -> Iterator[Cost]:
    """Of all usable files, and of those below folders.  Errors: UserError if there are none."""
    items, count = [item for source in sources for item in items_at(source)], 0
    for item in tqdm(items, "read", unit=" files", disable=None):
        try:
            for pixels in read(item, tokenizer.codec, Counter()):
                yield cost_of(model, tokenizer, item.name, pixels)
                count += 1
        except Unusable as reason:
            tqdm.write(f"skipped {item.name}: {reason}")
    if not count:
        named = " ".join(map(str, sources))
        raise UserError(f"{named} holds no usable file: name one, or a folder of them")


# --- as a picture ---------------------------------------------------------------------------------------------------

SIDE, GAP, SHOWN = 384, 18, 6  # pixels of a picture, and between parts; frames of a clip that are shown


def save_surprise(to: Path, costs: Iterator[Cost]) -> None:
    """TO/NUMBER.png of each file, and a line that says what it costs."""
    to.mkdir(parents=True, exist_ok=True)
    for number, cost in enumerate(costs):
        path = to / f"{number:05d}.png"
        save_image(path, sheet(cost))
        tqdm.write(f"{path}: {in_words(cost)}")


def in_words(cost: Cost) -> str:
    codec, size = cost.codec, len(cost.symbols) * np.log2(cost.codec.symbols)
    said = f"{cost.name}, {counted(cost.symbols, codec)} ({size:,.0f} bits), {cost.total:,.0f} bits to the model"
    place = np.unravel_index(cost.units.argmax(), codec.units)
    names = ("frame", "row", "column")[-len(place) :]
    where = ", ".join(f"{name} {index}" for name, index in zip(names, place, strict=True))
    return f"{said}, {cost.units.max():,.0f} of them at {where}"


def sheet(cost: Cost) -> Image.Image:
    """The picture, the same under what its parts cost, and its bytes; of a clip some frames."""
    frames = cost.pixels if cost.pixels.ndim == 4 else cost.pixels[None]
    units = cost.units.reshape(-1, *cost.units.shape[-2:])
    chosen = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
    side = SIDE if len(chosen) == 1 else 150
    pairs = [(enlarged(frames[at], side), heated(frames[at], units[at], units.max(), side)) for at in chosen]
    width, height = pairs[0][0].size
    lines, columns = (max(6, height // CELL[1]), COLUMNS) if len(chosen) == 1 else (12, 2 * COLUMNS)
    dump = hexdump(cost.codec, cost.symbols, cost.outline, heat(cost.each, cost.each.max()), lines, columns)
    keys = legend(cost.codec, cost.outline.kinds, dump.width)
    captions = [
        f"frame {at}: {units[at].sum():,.0f} bits" if len(frames) > 1 else f"{units[at].sum():,.0f} bits"
        for at in chosen
    ]
    if len(chosen) == 1:
        places = [(GAP, 50), (2 * GAP + width, 50)]
        corner = 3 * GAP + 2 * width, 50
        size = corner[0] + dump.width + GAP, 50 + max(height + 26, dump.height + keys.height + 8) + GAP
    else:
        places = [(GAP + i * (width + 8), 50 + row * (height + 6)) for row in range(2) for i in range(len(chosen))]
        corner = GAP, 50 + 2 * (height + 6) + 30
        size = 2 * GAP + max(dump.width, len(chosen) * (width + 8)), corner[1] + dump.height + keys.height + 8 + GAP
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    title = f"{cost.name}: {counted(cost.symbols, cost.codec)}, {cost.total:,.0f} bits to the model"
    title += f" (the first {lines} lines)" if dump.height < -(-len(cost.symbols) * CELL[1] // columns) else ""
    pen.text((GAP, 18), title, INK, font(17))
    for place, picture in zip(places, [pair[row] for row in range(2) for pair in pairs], strict=True):
        image.paste(picture, place)
    for (left, top), caption in zip(places[len(chosen) :], captions, strict=True):
        pen.text((left, top + height + 6), caption, FAINT, font())
    image.paste(dump, corner)
    image.paste(keys, (corner[0], corner[1] + dump.height + 8))
    return image


def enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    """A picture (H, W, 3), to about `side` pixels, in whole steps."""
    height, width, _ = pixels.shape
    scale = max(1, side // max(height, width))
    return Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)


def part_side(height: int, rows: int) -> int:
    """Pixels that each of so many rows of parts is high: a power of two, of which the last row may show less."""
    return 1 << (-(-height // rows) - 1).bit_length()


def heated(pixels: np.ndarray, units: np.ndarray, most: float, side: int) -> Image.Image:
    """A picture in grey under the heat of its parts (rows, columns), with their numbers where there is room."""
    image = enlarged(pixels, side)
    rows, columns = units.shape
    step = part_side(len(pixels), rows) * image.height // len(pixels)
    colours = heat(units, most).repeat(step, 0).repeat(step, 1)[: image.height, : image.width]
    grey = np.asarray(image.convert("L").convert("RGB"), float)
    image = Image.fromarray((grey * 0.35 + colours * 0.65).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for row, column in np.ndindex(rows, columns) if step >= 32 else ():
        place = (column + 0.5) * step, (row + 0.5) * step
        ink = "white" if units[row, column] > 0.8 * most else INK
        pen.text(place, f"{units[row, column]:.0f}", ink, font(16 if step > 60 else 11), anchor="mm")
    return image


# --- as a compressor ------------------------------------------------------------------------------------------------

TOOLS = {  # lossless recompressors of JPEG files, where they are installed
    "jpegtran -optimize": "jpegtran -copy none -optimize -outfile {to} {source}",
    "jpegtran -arithmetic": "jpegtran -copy none -arithmetic -outfile {to} {source}",
    "cjxl --lossless_jpeg=1": "cjxl --lossless_jpeg=1 {source} {to}",
}


def recompressed(file: bytes) -> dict[str, list[int]]:
    """Bytes of a JPEG file after each tool that is installed, and of its entropy-coded data alone.  Errors: UserError
    that names a tool which failed."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source.jpg")
        source.write_bytes(file)
        for number, (name, text) in enumerate(TOOLS.items()):
            to = Path(folder, f"{number}.jpg" if "jpegtran" in text else f"{number}.jxl")
            command = [word.format(source=source, to=to) for word in text.split()]
            if shutil.which(command[0]):
                done = subprocess.run(command, capture_output=True, timeout=60)
                if done.returncode:
                    said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
                    raise UserError(f"`{name}` ended with {done.returncode} ({said}): mend or remove it")
                sizes[name] = [to.stat().st_size, coded(to.read_bytes())]
    return sizes


def coded(file: bytes) -> int:
    """Bytes of a JPEG of one scan behind its header, but for EOI (T.81 B.2.3); all of what is no JPEG."""
    if not file.startswith(b"\xff\xd8"):
        return len(file)
    scan = file.index(b"\xff\xda")
    return len(file) - scan - 2 - int.from_bytes(file[scan + 2 : scan + 4]) - 2


def save_bits(to: Path, costs: Iterator[Cost]) -> None:
    """TO/bits.json, the bytes of each file in each form, and the means, which are also said.  Of a model's form nothing
    but the data is counted, for what stands around them is the same in all files."""
    rows = []
    for cost in costs:
        codec, file = cost.codec, cost.codec.file(cost.symbols)
        read, model, legal = len(cost.symbols) * np.log2(codec.symbols) / 8, cost.total / 8, cost.legal / 8
        row = {f"the {codec.suffix[1:]} file": [len(file), read]}
        row |= recompressed(file) if codec.suffix == ".jpg" else {}
        row |= {"the model": [model] * 2, "the model, of legal tokens": [legal] * 2}
        rows.append({"name": cost.name, **row})
    means = {form: np.mean([row[form] for row in rows], 0).tolist() for form in [*rows[0]][1:]}
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / "bits.json", {"means": means, "files": rows})
    (_, read), *_ = means.values()
    print(f"{len(rows):,} files, {8 * means['the model'][1]:,.1f} bits a file to the model")
    print(f"{'bytes a file':28} {'whole':>8} {'data':>8}")
    for form, (whole, data) in means.items():
        print(f"{form:28} {whole:8,.1f} {data:8,.1f} {data / read:7.1%}")
