"""The built-in data: pictures of shapes, one to a cell of 32 pixels, drawn on the spot, the same every time.

    python -m data.shapes                                            # data/shapes, which train.py makes if it is absent
    python -m data.shapes data/shapes32 --size 32 --count 20000

OUT-pictures receives the drawings as PNGs, OUT the tokens that `data.prepare` makes of them.
"""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from codec import JPEG
from data.prepare import cores, prepare
from plumbing.command import Flags, UserError, run
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
        pen = ImageDraw.Draw(mask)
        pen.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[kind]], fill=1)
        if kind == "ring":
            pen.polygon([(x + radius * u / 2, y + radius * v / 2) for u, v in OUTLINES[kind]], fill=0)
        picture.paste(colours[rng.integers(len(colours))], (0, 0), mask)
    return np.asarray(picture.reduce(FINE))


def make(out: Path, count: int = 8000, size: int = 64) -> None:
    """Draw `count` pictures and prepare them, unless that is done.  A repeated call continues; of two at once, the
    second waits.  Errors: UserError."""
    if size % CELL or not CELL <= size <= 1024:
        raise UserError(f"--size is {size}: choose a multiple of {CELL} pixels to 1024, one shape to a cell of them")
    if count < 20:
        raise UserError(f"--count is {count}: choose 20 or more, of which one validates")
    folder = out.with_name(out.name + "-pictures")
    with claim(out, wait=True):
        folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), "draw", unit=" pictures", disable=None):
            path, data = folder / f"{index:05d}.png", io.BytesIO()
            Image.fromarray(draw(index, size)).save(data, "PNG", compress_level=1)
            if not path.exists() or path.read_bytes() != data.getvalue():  # else it keeps its time, and its part
                write_whole(path, data.getvalue())
        prepare(folder, out, JPEG(size=size), vocab=None, validation=0.05, workers=cores())


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path("data/shapes"), help="data folder (default: data/shapes)"
    )
    parser.add_argument("--count", type=int, default=8000, help="how many pictures (default: 8000)")
    parser.add_argument("--size", type=int, default=64, help="pixels, both ways (default: 64)")
    flags = parser.parse(arguments)
    make(flags.out, flags.count, flags.size)


if __name__ == "__main__":
    run(main)
