"""How many of the drawn shapes are right.

    python -m studies.shapes out/small/samples                        # a folder that sample.py wrote, or several

The built-in pictures are made of cells of 32 pixels, each empty or one of 96 shapes, on one of four grounds: 388
drawings.  A cell is right where its PSNR to one of these, encoded and decoded as the data are, is above 25 dB.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from codec import JPEG
from data.shapes import CELL, COLOURS, FINE, GROUNDS, OUTLINES, RADII, fill
from plumbing.command import Flags, UserError, run
from plumbing.files import read_json

RIGHT = 25.0  # dB


def drawings() -> Iterator[np.ndarray]:
    """Every cell that there can be, (CELL, CELL, 3) uint8."""
    for ground in GROUNDS:
        yield np.full((CELL, CELL, 3), ground, np.uint8)
        for kind, colour, radius in product(OUTLINES, COLOURS.values(), RADII):
            cell, mask = (Image.new(mode, (CELL * FINE,) * 2, value) for mode, value in (("RGB", ground), ("1", 0)))
            fill(ImageDraw.Draw(mask), kind, CELL * FINE / 2, CELL * FINE / 2, radius * FINE, 1)
            cell.paste(colour, (0, 0), mask)
            yield np.asarray(cell.reduce(FINE))


def known(codec: JPEG) -> np.ndarray:
    """All drawings as the codec gives them back, (388, CELL * CELL * 3) float32."""
    tiles = np.array(codec.shape[:2]) // CELL
    found = [codec.decode(codec.encode(np.tile(cell, (*tiles, 1))))[:CELL, :CELL] for cell in drawings()]
    return np.stack(found).reshape(len(found), -1).astype(np.float32)


def nearest(pixels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of each cell of a picture (H, W, 3) the PSNR to the nearest drawing, in dB."""
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    cells = pixels[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, 3).swapaxes(1, 2)
    cells = cells.reshape(rows * columns, 1, -1).astype(np.float32)
    errors = np.stack([((known - cell) ** 2).mean(-1).min() for cell in cells])
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-9))


def shares(folder: Path) -> str:
    """How many cells and pictures of a folder are right.  Errors: UserError."""
    note, paths = folder / "samples.json", sorted(folder.glob("[0-9]*.jpg"))
    if not note.exists() or not paths:
        raise UserError(f"{folder} holds no JPEGs that sample.py wrote: name a folder like out/small/samples")
    templates, found = known(JPEG(**read_json(note)["codec"])), []
    for path in paths:
        with Image.open(path) as picture:
            found.append(nearest(np.asarray(picture.convert("RGB")), templates))
    right = np.stack(found) > RIGHT
    return f"{folder}: {right.mean():.1%} of {right.size} cells, {right.all(1).mean():.1%} of {len(right)} pictures"


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="that sample.py wrote")
    for folder in parser.parse(arguments).folders:
        print(shares(folder))


if __name__ == "__main__":
    run(main)
