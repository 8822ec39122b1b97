"""Five kinds of pictures to compare codecs on, from what lies in a folder of real data; plots need matplotlib.

    python -m tests.kinds eurosat cifar10 video/grid out/kinds-pictures     # then
    python -m studies.compare out/kinds --data out/kinds-pictures/* --size 32 --codecs jpeg vq4 --count 150

Each is a folder of train and test, PNGs of 32 pixels: satellite pictures, photos, faces (frames of films, some films
for the test alone), drawn shapes, and plots.
"""

import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data.shapes import draw
from data.sources import find_items, read_file
from plumbing.draw import save_pixels

SIZE, TRAIN, TEST = 32, 2000, 400


def square(picture: Image.Image) -> np.ndarray:
    """The largest centre square, shrunk."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    part = picture.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(part.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def photos(folder: Path) -> Iterator[np.ndarray]:
    """Pictures of all its folders, mixed by a fixed order."""
    items = [*find_items(folder)]
    for number in np.random.default_rng(0).permutation(len(items)).tolist():
        yield square(Image.open(io.BytesIO(read_file(items[number]))))


def frames(films: list[Path]) -> list[np.ndarray]:
    found = []
    for film in films:
        with av.open(str(film)) as video:
            found += [square(frame.to_image()) for frame in video.decode(video=0)]
    return [found[number] for number in np.random.default_rng(0).permutation(len(found)).tolist()]


def plots() -> Iterator[np.ndarray]:
    """Lines, bars, points and areas of random numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rng = np.random.default_rng(0)
    while True:
        figure, axes = pyplot.subplots(figsize=(1.28, 1.28), dpi=100)
        colour, kind = rng.choice(["tab:blue", "tab:orange", "tab:green", "tab:red"]), rng.integers(4)
        x, y = np.arange(12), np.abs(rng.normal(size=12).cumsum()) + 0.2
        if kind == 0:
            axes.plot(x, y, color=colour, lw=2)
        elif kind == 1:
            axes.bar(x, y, color=colour)
        elif kind == 2:
            axes.scatter(x, y, color=colour, s=14)
        else:
            axes.fill_between(x, y, color=colour)
        axes.tick_params(labelleft=False, labelbottom=False)
        figure.canvas.draw()
        yield square(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())))
        pyplot.close(figure)


def save(folder: Path, train: Iterator[np.ndarray], test: Iterator[np.ndarray]) -> None:
    for split, pictures, count in (("train", train, TRAIN), ("test", test, TEST)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(islice(pictures, count)):
            save_pixels(folder / split / f"{number:05d}", picture)


def main(satellite: Path, cifar: Path, films: Path, out: Path) -> None:
    for name, source in (("satellite", satellite), ("photos", cifar)):
        save(out / name, photos(source / "train"), photos(source / "test"))
    paths = sorted(path for path in films.iterdir() if path.is_file())
    save(out / "faces", iter(frames(paths[: -(-len(paths) * 4 // 5)])), iter(frames(paths[-(-len(paths) * 4 // 5) :])))
    drawn = (draw(number, SIZE) for number in range(TRAIN + TEST))
    save(out / "shapes", drawn, drawn)
    drawn = plots()
    save(out / "plots", drawn, drawn)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
