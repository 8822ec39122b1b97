"""The built-in data, drawn on the spot, the same every time: shapes, one to a cell of 32 pixels, and moving shapes.

    python -m data.shapes                                            # data/shapes, which train.py makes if it is absent
    python -m data.shapes data/shapes32 --size 32 --count 20000
    python -m data.shapes data/moving --moving                       # clips: as `train.py --config video` makes them

OUT-pictures receives the drawings as PNGs, or OUT-clips as moving WebPs, OUT the tokens that `data.prepare` makes of
them.
"""

import io
import math
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from codec import JPEG
from data.prepare import cores, prepare
from h264 import H264
from plumbing.command import Flags, UserError, run
from plumbing.draw import moving
from plumbing.files import write_whole
from plumbing.run import claim

COLOURS = {
    "red": (216, 50, 44),
    "orange": (240, 140, 20),
    "yellow": (250, 210, 50),
    "green": (50, 160, 80),
    "blue": (40, 100, 210),
    "violet": (130, 60, 170),
}
GROUNDS = [(244, 238, 224), (206, 228, 244), (214, 236, 208), (70, 78, 104)]
FINE = 4  # drawn this much larger, then averaged down: soft edges


def polygon(corners: int, depth: float = 1.0, turn: float = 0.0) -> list[tuple[float, float]]:
    """A regular polygon in the unit circle; with `depth` below 1 a star, its inner corners at that radius."""
    angles = [turn + math.pi * i / corners for i in range(2 * corners)]
    if depth == 1.0:
        angles = angles[::2]
    return [
        ((depth if i % 2 else 1) * math.sin(a), -(depth if i % 2 else 1) * math.cos(a)) for i, a in enumerate(angles)
    ]


def cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    turned = [quarter, [(-y, x) for x, y in quarter], [(-x, -y) for x, y in quarter], [(y, -x) for x, y in quarter]]
    return [corner for part in turned for corner in part]


def heart() -> list[tuple[float, float]]:
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles)) / 16
    return list(zip(np.sin(angles) ** 3, y, strict=True))


OUTLINES = {
    "circle": polygon(60),
    "ring": polygon(60),  # its hole is cut out below
    "square": polygon(4, turn=math.pi / 4),
    "diamond": polygon(4),
    "triangle": polygon(3),
    "star": polygon(5, depth=0.42),
    "cross": cross(0.36),
    "heart": heart(),
}
CELL = 32  # pixels: one shape each, so that shapes and MCUs share their edges
RADII = (10, 14)  # pixels


def fill(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, value: int) -> None:
    """Draw the shape of a kind around a point."""
    pen.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[kind]], fill=value)
    if kind == "ring":
        pen.polygon([(x + radius * u / 2, y + radius * v / 2) for u, v in OUTLINES[kind]], fill=0)


def draw(index: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """Picture number `index`, (size, size, 3) uint8: a function of its arguments alone."""
    rng = np.random.default_rng([seed, index])
    side, cells = size * FINE, size // CELL
    picture = Image.new("RGB", (side, side), GROUNDS[rng.integers(len(GROUNDS))])
    colours = list(COLOURS.values())
    for cell in rng.permutation(cells**2)[: rng.integers(1, cells**2 + 1)]:
        x, y = (cell % cells + 0.5) * CELL * FINE, (cell // cells + 0.5) * CELL * FINE
        radius = RADII[rng.integers(len(RADII))] * FINE
        kind = list(OUTLINES)[rng.integers(len(OUTLINES))]
        mask = Image.new("1", (side, side))
        fill(ImageDraw.Draw(mask), kind, x, y, radius, 1)
        picture.paste(colours[rng.integers(len(colours))], (0, 0), mask)
    return np.asarray(picture.reduce(FINE))


LIGHT, DARK = GROUNDS[:3], [COLOURS[name] for name in COLOURS if name != "yellow"]  # motion is found by brightness
SMALL = 8  # pixels: radius of shapes that move, which begin where a macroblock lies
STEP = 2  # pixels a frame: one of the halved colours


@cache
def paths(size: int) -> list[tuple[int, int, int, int]]:
    """Axis and direction in which a shape may move, and the macroblock where it begins, not against an edge."""
    cells = range(size // (2 * SMALL))
    ways = product((0, 1), (-1, 1), cells, cells)
    return [(axis, step, *cell) for axis, step, *cell in ways if cell[axis] + step in cells]


def movable(size: int) -> int:
    """How many clips there are, all different."""
    return len(OUTLINES) * len(LIGHT) * len(DARK) * len(paths(size))


@cache
def order(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(movable(size))


def move(index: int, size: int = 64, frames: int = 15, seed: int = 0) -> np.ndarray:
    """Clip number `index`, (frames, size, size, 3) uint8: a shape that goes on by the same whole pixels a frame, and
    back from the edges.  A function of its arguments alone; no two below `movable(size)` are alike."""
    counts = len(OUTLINES), len(LIGHT), len(DARK), len(paths(size))
    kind, ground, colour, path = np.unravel_index(order(size, seed)[index], counts)
    axis, direction, *begin = paths(size)[path]
    clip = np.full((frames, size, size, 3), LIGHT[ground], np.float32)
    cover, span = alpha(list(OUTLINES)[kind], SMALL), size - 2 * SMALL
    for time, frame in enumerate(clip):
        at = 2 * SMALL * np.array(begin)
        at[axis] += time * STEP * direction
        y, x = span - abs(at % (2 * span) - span)
        part = frame[y : y + 2 * SMALL, x : x + 2 * SMALL]
        part += cover * (np.float32(DARK[colour]) - part)
    return clip.round().astype(np.uint8)


def alpha(kind: str, radius: int) -> np.ndarray:
    """How much of each pixel a shape covers, (2 * radius, 2 * radius, 1), from 0 to 1."""
    mask = Image.new("L", (2 * radius * FINE,) * 2)
    fill(ImageDraw.Draw(mask), kind, radius * FINE, radius * FINE, radius * FINE, 255)
    return np.asarray(mask.reduce(FINE), np.float32)[..., None] / 255


def encoded(drawing: np.ndarray, fps: float) -> bytes:
    """A picture (H, W, 3) as the bytes of a PNG, a clip (T, H, W, 3) as those of a moving WebP, both without loss."""
    if drawing.ndim == 4:
        return moving(list(map(Image.fromarray, drawing)), fps, lossless=True, quality=0, method=0)
    data = io.BytesIO()
    Image.fromarray(drawing).save(data, "PNG", compress_level=1)
    return data.getvalue()


def make(out: Path, count: int | None = None, size: int = 64, clips: bool = False) -> None:
    """Draw `count` pictures, or clips, and prepare them, unless that is done.  A repeated call continues; of two at
    once, the second waits.  Errors: UserError."""
    if size % CELL or not CELL <= size <= 1024:
        raise UserError(f"--size is {size}: choose a multiple of {CELL} pixels to 1024, one shape to a cell of them")
    if clips:
        codec, what, suffix, kind, most = H264(width=size, height=size, fps=10), "clips", ".webp", move, movable(size)
    else:
        codec, what, suffix, kind, most = JPEG(size=size), "pictures", ".png", draw, 10**9
    count = min(5000 if clips else 8000, most) if count is None else count
    if not 20 <= count <= most:
        raise UserError(f"--count is {count}: choose 20, of which one validates, to {most}")
    folder = out.with_name(out.name + "-" + what)
    with claim(out, wait=True):
        folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), "draw", unit=f" {what}", disable=None):
            path, data = folder / f"{index:05d}{suffix}", encoded(kind(index, size), codec.fps)
            if not path.exists() or path.read_bytes() != data:  # else it keeps its time, and its part
                write_whole(path, data)
        prepare(folder, out, codec, vocab=None, validation=0.05, workers=cores())


BUILT_IN = {"data/shapes": make, "data/moving": partial(make, clips=True)}  # what train.py makes if absent


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("data/shapes"), help="data folder (default: data/shapes)"
    )
    parser.add_argument("--count", type=int, help="how many pictures (default: 8000), or clips (default: 5000)")
    parser.add_argument("--size", type=int, default=64, help="pixels, both ways (default: 64)")
    parser.add_argument("--moving", action="store_true", help="clips of 15 frames, 10 a second, as H.264")
    flags = parser.parse(arguments)
    make(flags.out, flags.count, flags.size, flags.moving)


if __name__ == "__main__":
    run(main)
