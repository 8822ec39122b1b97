"""The figures of the README that say how a JPEG becomes tokens, of a file that a model writes.

python -m show.figures assets/eurosat assets --seed 15   # anatomy.png, grammar.png and syntax.png
"""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import jpeg
from codec import JPEG
from plumbing.checkpoint import read_run
from plumbing.command import Flags, UserError, run
from plumbing.draw import save_image
from sample import Sampling, generate
from show.hexdump import CELL, COLOURS, FAINT, INK, font, heat, hexdump, legend
from show.surprise import read_through

EDGE, TINTS, CHOSEN = 18, ((255, 255, 255), (228, 233, 243)), (255, 120, 0)  # of every second MCU; of the one shown

# --- what is inside -------------------------------------------------------------------------------------------------


class Spelled(jpeg.Noted):
    """Bits of which the words are noted: (bits, kind, what they say)."""

    def __init__(self, words: list, *rest: object):
        super().__init__(*rest)
        self.words = words

    def take(self, count: int) -> str:
        taken = super().take(count)
        if count:
            self.words.append((taken, self.kind, f"{jpeg.extend(taken):+}"))
        return taken

    def code(self, table: dict[str, int]) -> int:
        value = super().code(table)
        run, size = divmod(value, 16)
        says = f"DC: {size} bits" if self.kind == jpeg.AVERAGE else "end" if value == 0 else f"skip {run}, {size} bits"
        self.words[-1] = self.words[-1][0], self.kind, says
        return value


def anatomy(codec: JPEG, symbols: np.ndarray, shown: int = 5) -> Image.Image:
    """A picture and its MCUs, its bytes, and one MCU's first words; `shown` is the number of that MCU."""
    outline, side = codec.outline(symbols), 448
    picture = Image.fromarray(codec.decode(symbols)).resize((side, side), Image.Resampling.NEAREST)
    pen, step = ImageDraw.Draw(picture), side // codec.parts
    for i in range(1, codec.parts):
        pen.line((i * step, 0, i * step, side), (255, 255, 255))
        pen.line((0, i * step, side, i * step), (255, 255, 255))
    for number in range(codec.mcus):
        pen.text((number % codec.parts * step + 6, number // codec.parts * step + 4), str(number), "white", font(13))
    left, top = shown % codec.parts * step, shown // codec.parts * step
    pen.rectangle((left, top, left + step, top + step), outline=CHOSEN, width=3)

    mcus = outline.units[:, 0]
    backs = np.array(TINTS)[mcus % 2]
    backs[(outline.units == shown).any(1)] = (255, 222, 184)
    dump = hexdump(codec, symbols, outline, backs, side // CELL[1])
    keys = legend(codec, outline.kinds, dump.width)
    image = Image.new("RGB", (3 * EDGE + side + dump.width, side + 190), "white")
    image.paste(picture, (EDGE, EDGE))
    image.paste(dump, (2 * EDGE + side, EDGE))
    image.paste(keys, (2 * EDGE + side, EDGE + dump.height + 6))
    spell(image, codec, symbols, shown, side + 2 * EDGE)
    return image


def spell(image: Image.Image, codec: JPEG, symbols: np.ndarray, shown: int, top: int) -> None:
    """Write the words of an MCU into a figure, as far as there is room: three lines."""
    words, nothing = [], np.full((len(symbols), 8), -1)
    with suppress(jpeg.Damage):
        before = 0
        for mcu, _ in enumerate(codec.read_mcus(bytes(symbols), partial(Spelled, words, nothing, nothing.copy()))):
            if mcu == shown:
                break
            before = len(words)
    pen, left = ImageDraw.Draw(image), EDGE
    pen.text((left, top), f"MCU {shown}, bit by bit: a code says what comes, its bits follow", INK, font(15))
    top += 28
    for bits, kind, says in words[before:]:
        width = max(9 * len(bits), round(font(11).getlength(says))) + 14
        if left + width > image.width - EDGE:
            left, top = EDGE, top + 42
        if top + 40 > image.height:
            break
        pen.rectangle((left, top, left + width - 4, top + 20), COLOURS[codec.kinds[kind]])
        pen.text((left + width / 2 - 2, top + 10), bits, "white", font(14), anchor="mm")
        pen.text((left + width / 2 - 2, top + 30), says, FAINT, font(11), anchor="mm")
        left += width


# --- what may come next ---------------------------------------------------------------------------------------------


def grammar(symbols: np.ndarray, legal: np.ndarray, chance: np.ndarray) -> Image.Image:
    """How many of 256 bytes are legal at each place of a file, and at four of them which, and how likely they are."""
    count, cell, height = legal.sum(1), 13, 90
    few = int(count[:-1].argmin())
    shown = sorted({0, few, len(symbols) // 2, len(symbols) - 1})
    image = Image.new("RGB", (2 * EDGE + 4 * (16 * cell + 2 * EDGE) - 2 * EDGE, height + 16 * cell + 150), "white")
    pen, across = ImageDraw.Draw(image), (image.width - 2 * EDGE) / len(symbols)
    pen.text((EDGE, 8), "bytes that are legal, of 256, at each place of the file", INK, font(15))
    for i, number in enumerate(count.tolist()):
        box = EDGE + i * across, 34 + height * (1 - number / 256), EDGE + (i + 1) * across - 1, 34 + height
        pen.rectangle(box, CHOSEN if i in shown else (150, 170, 205))
    for panel, at in enumerate(shown):
        left, top = EDGE + panel * (16 * cell + 2 * EDGE), 34 + height + 50
        known = " ".join(f"{byte:02x}" for byte in symbols[max(0, at - 4) : at])
        begin = "the file begins" if at == 0 else f"... {known}" if at > 4 else known
        pen.text((left, top - 42), f"byte {at}: {count[at]} are legal", INK, font(15))
        pen.text((left, top - 22), f"{begin}, then", FAINT, font(13))
        for byte in range(256):
            x, y = left + byte % 16 * cell, top + byte // 16 * cell
            # the square root makes the unlikely ones visible
            colour = heat(np.sqrt(chance[at, byte]), np.sqrt(chance[at].max())) if legal[at, byte] else (226, 226, 230)
            pen.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(np.asarray(colour, int).tolist()))
        byte = int(symbols[at])
        x, y = left + byte % 16 * cell, top + byte // 16 * cell
        pen.rectangle((x - 2, y - 2, x + cell, y + cell), outline=INK, width=2)
        said = f"{byte:02x} came, which had {chance[at, byte]:.1%}"
        pen.text((left, top + 16 * cell + 6), said, FAINT, font(13))
    note = "grey: illegal; white to red: legal, and how likely the model finds it"
    pen.text((EDGE, image.height - 26), note, FAINT, font(13))
    return image


# --- where that is --------------------------------------------------------------------------------------------------

ROWS = ("block of the MCU", "coefficient", "node, or bits left", "row of the MCU", "column of the MCU")
ROWS += tuple(f"{other} minus {of} DC" for of in ("next", "this") for other in ("zero", "left", "above", "above right"))


def difference(level: int, apart: int) -> str:
    """What a level of a difference of DC says."""
    return "-" if level == 0 else "0" if apart == 0 else f"{apart:+}" if abs(apart) < jpeg.STEPS else "far"


def syntax(codec: JPEG, symbols: np.ndarray, positions: np.ndarray, first: int, count: int = 24) -> Image.Image:
    """What the model is told before each of some bytes."""
    outline, label, (width, height) = codec.outline(symbols), 190, CELL
    width += 8
    image = Image.new("RGB", (2 * EDGE + label + count * width, 2 * EDGE + 34 + len(ROWS) * height + 40), "white")
    pen, some = ImageDraw.Draw(image), slice(first, first + count)
    left, top = EDGE + label, EDGE
    for i, symbol in enumerate(symbols[some].tolist()):
        pen.text((left + i * width + width // 2, top + 9), f"{symbol:02x}", INK, font(15), anchor="mm")
        for bit, kind in enumerate(outline.kinds[first + i].tolist()):
            x = left + i * width + 2 + bit * (width - 4) / 8
            pen.rectangle((x, top + 20, x + (width - 4) / 8 - 1, top + 25), COLOURS[codec.kinds[kind]])
    middle = int(jpeg.levels()[4095])  # what a difference of zero is told as
    for row, name in enumerate(ROWS):
        y = top + 34 + row * height + (row > 2) * 6 + (row > 4) * 6 + (row > 8) * 6
        pen.text((left - 12, y + height / 2), name, INK, font(14), anchor="rm")
        values = positions[some, row].astype(int)
        for i, value in enumerate(values.tolist()):
            apart = value - middle
            told = str(value) if row < 5 else difference(value, apart)
            strong = min(1, abs(apart) / 16) if row > 4 and value else 0
            hue = np.array((215, 60, 40) if apart > 0 else (50, 110, 200))
            back = 255 - (255 - hue) * 0.6 * strong if row > 4 else np.array(TINTS[row % 2])
            box = left + i * width, y, left + (i + 1) * width - 2, y + height - 2
            pen.rectangle(box, tuple(back.astype(int).tolist()))
            pen.text((left + (i + 0.5) * width, y + height / 2), told, INK, font(13), anchor="mm")
    image.paste(legend(codec, outline.kinds[some], count * width), (left, image.height - 40))
    return image


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("run", type=Path, help="a run on JPEGs without pairs")
    parser.add_argument("to", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the file that is shown (default: 0)")
    flags = parser.parse(arguments)
    model, tokenizer, _ = read_run(flags.run, torch.device("cpu"))
    if tokenizer.codec.name != "jpeg" or tokenizer.merges or not model.config.positions:
        raise UserError(f"{flags.run} has pairs, another codec, or is told no positions: take another run")
    model, codec = model.float(), tokenizer.codec
    tokens = generate(model, tokenizer, [np.array([tokenizer.start])], [(flags.seed, 0)], Sampling())[0]
    symbols = tokenizer.decode(tokens)
    logits, illegal, told = read_through(model, tokenizer, tokenizer.encode([symbols])[0])
    chance, legal = logits.masked_fill(illegal, -torch.inf).softmax(-1).numpy(), ~illegal.numpy()
    flags.to.mkdir(parents=True, exist_ok=True)
    marked = replace(codec, restart=1)  # as the paper has it
    save_image(flags.to / "anatomy.png", anatomy(marked, marked.encode(codec.decode(symbols))))
    save_image(flags.to / "grammar.png", grammar(symbols, legal[:-1, :256], chance[:-1, :256]))
    save_image(flags.to / "syntax.png", syntax(codec, symbols, told.numpy(), len(symbols) // 3))
    print(f"{flags.to}: anatomy.png, grammar.png and syntax.png")


if __name__ == "__main__":
    run(main)
