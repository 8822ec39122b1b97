"""A file as a picture: its bytes, and under each a strip of what its eight bits are."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from codec import Codec, Outline

COLOURS = {  # of what bits are, for all codecs
    "header": (150, 150, 150), "marker": (40, 40, 40), "DC": (215, 60, 40), "AC": (50, 110, 200),
    "end of block": (40, 150, 80), "padding": (205, 205, 205),
    "start code": (40, 40, 40), "macroblock type": (40, 150, 80), "prediction": (215, 60, 40),
    "places of coefficients": (50, 110, 200), "values of coefficients": (120, 180, 245),
    "symbol": (50, 110, 200),
}  # fmt: skip
UNREAD = (255, 255, 255)
HEAT = np.array([(255, 255, 255), (255, 214, 102), (240, 110, 40), (150, 20, 40)], float)  # from cheap to dear
CELL, COLUMNS = (30, 28), 16  # pixels of a byte; bytes in a line
INK, FAINT = (30, 30, 30), (120, 120, 120)


def font(size: int = 14) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def heat(values: np.ndarray, most: float) -> np.ndarray:
    """Numbers from 0 to `most` (...) as colours (..., 3) float."""
    place = np.clip(values / (most or 1), 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    return HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (place - low)[..., None]


def hexdump(
    codec: Codec, symbols: np.ndarray, outline: Outline, backs: np.ndarray, lines: int, columns: int = COLUMNS
) -> Image.Image:
    """The first symbols of a file, so many lines of them, each on a colour of its own (n, 3)."""
    shown, (width, height), digits = symbols[: lines * columns], CELL, 2 if codec.symbols <= 256 else 4
    width += 8 * (digits > 2)
    image = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    pen, backs = ImageDraw.Draw(image), np.asarray(backs).astype(int).tolist()
    for i, symbol in enumerate(shown.tolist()):
        left, top = i % columns * width, i // columns * height
        pen.rectangle((left, top, left + width - 2, top + height - 2), tuple(backs[i]))
        pen.text((left + width // 2 - 1, top + 9), f"{symbol:0{digits}x}", INK, font(), anchor="mm")
        ends = np.linspace(left, left + width - 1, outline.kinds.shape[1] + 1).round().astype(int)
        for kind, begin, end in zip(outline.kinds[i].tolist(), ends[:-1], ends[1:], strict=True):
            colour = COLOURS[codec.kinds[kind]] if kind >= 0 else UNREAD
            pen.rectangle((begin, top + height - 8, end - 1, top + height - 4), colour)
    return image


def counted(symbols: np.ndarray, codec: Codec) -> str:
    return f"{len(symbols):,} {'bytes' if codec.symbols == 256 else 'symbols'}"


def legend(codec: Codec, kinds: np.ndarray, width: int) -> Image.Image:
    """What the colours of some bits mean, in as many lines as it takes."""
    names = [name for number, name in enumerate(codec.kinds) if (kinds == number).any()]
    image, left, top = Image.new("RGB", (width, 22 * len(names)), "white"), 0, 0
    pen = ImageDraw.Draw(image)
    for name in names:
        needed = 20 + round(font().getlength(name)) + 18
        if left and left + needed > width:
            left, top = 0, top + 22
        pen.rectangle((left, top + 6, left + 12, top + 12), COLOURS[name])
        pen.text((left + 18, top + 9), name, INK, font(), anchor="lm")
        left += needed
    return image.crop((0, 0, width, top + 22))
