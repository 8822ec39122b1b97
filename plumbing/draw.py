"""Pictures of a run: samples side by side in a grid, which moves if they are clips, and curves over the steps.

They are written elsewhere and renamed, so that a kill or a full disk leaves the picture before, or all of the new one.
"""

import io
import math
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.files import write_whole

COLOURS = [(60, 120, 200), (220, 90, 30), (60, 150, 80), (130, 60, 170), (190, 150, 20), (110, 110, 110)]
GIVEN, WRITTEN = (150, 150, 150), (255, 120, 0)  # around frames that the model was given, and that it wrote
STRIP = 8  # frames of a clip in a film strip: of 15, every second
HOLD = 1000  # milliseconds more for the last frame of a grid


def grid(pictures: list[np.ndarray], columns: int = 0, room: int = 512) -> Image.Image:
    """Pictures (H, W, 3) side by side, a thin line between them, enlarged if they are small: to `room` pixels."""
    columns = columns or math.ceil(len(pictures) ** 0.5)
    height, width, _ = pictures[0].shape
    sheet = np.full((-(-len(pictures) // columns) * (height + 2) + 2, columns * (width + 2) + 2, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (height + 2), 2 + i % columns * (width + 2)
        sheet[top : top + height, left : left + width] = picture
    image, scale = Image.fromarray(sheet), max(1, room // sheet.shape[1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def draw_curves(
    curves: dict[str, list[tuple[float, float]]], title: str, across: str = "steps", logarithmic: bool = False
) -> Image.Image:
    """Lines over steps, from 0 on, or over what else is named; the last value of each beside its name."""
    points = [point for curve in curves.values() for point in curve]
    width, height, scale = 960, 540, math.log10 if logarithmic else float
    left, right = (scale(end(x for x, _ in points)) if logarithmic or end is max else 0 for end in (min, max))
    low, high = min(y for _, y in points), max(y for _, y in points)
    step = 10 ** math.floor(math.log10(max(high - low, 0.1)))  # the axis begins and ends at round numbers
    bottom = math.floor(low / step) * step
    top = max(math.ceil(high / step) * step, bottom + step)  # one value alone may lie on a round number
    image, small = Image.new("RGB", (width, height), "white"), ImageFont.load_default(size=16)
    pen, box = ImageDraw.Draw(image), (70, 50, width - 30, height - 60)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - left) / (right - left or 1)
        return box[0] + (box[2] - box[0]) * across, box[3] - (box[3] - box[1]) * (y - bottom) / (top - bottom)

    for i in range(6):
        y, x = bottom + (top - bottom) * i / 5, left + (right - left) * i / 5
        x, level = 10**x if logarithmic else x, place(points[0][0], y)[1]
        pen.line([(box[0], level), (box[2], level)], fill=(225, 225, 225))
        pen.text((box[0] - 10, level), f"{y:,.4g}", "black", small, anchor="rm")
        text = f"{x:.2g}" if logarithmic else f"{x:,.0f}"
        pen.text((place(x, bottom)[0], box[3] + 10), text, "black", small, anchor="mt")
    pen.text((box[0], 18), title, "black", ImageFont.load_default(size=18))
    pen.text((width / 2, height - 12), across, "black", small, anchor="mb")
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), cycle(COLOURS), strict=False)):
        where = [place(*point) for point in curve]
        pen.line(where, fill=colour, width=2, joint="curve")
        for x, y in where if len(where) < 40 else []:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        last = f"{name} {curve[-1][1]:,.4g}" if curve else name
        pen.text((width - 30, 18 + 22 * i), last, colour, ImageFont.load_default(size=18), anchor="rt")
    return image


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def save_image(path: Path, image: Image.Image) -> None:
    """Write PATH, a PNG, whole."""
    write_whole(path, png(image))


def moving(frames: list[Image.Image], fps: float, hold: int = 0, **how: object) -> bytes:
    """A WebP that moves; a frame that equals the one before makes that one last longer, the last is held."""
    durations, data = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 / fps) + hold], io.BytesIO()
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=durations, loop=0, **how)
    return data.getvalue()


def save_frames(path_without_suffix: Path, frames: list[Image.Image], fps: float, hold: int = 0, **how: object) -> Path:
    """Write PATH.webp, which moves, whole."""
    path = path_without_suffix.with_name(path_without_suffix.name + ".webp")  # the name may have dots of its own
    write_whole(path, moving(frames, fps, hold, **how))
    return path


def save_pixels(path_without_suffix: Path, pixels: np.ndarray, fps: float = 0) -> Path:
    """Write without loss one picture (H, W, 3) as PATH.png, or one clip (T, H, W, 3) as PATH.webp."""
    if pixels.ndim == 4:
        return save_frames(path_without_suffix, list(map(Image.fromarray, pixels)), fps, lossless=True)
    path = path_without_suffix.with_name(path_without_suffix.name + ".png")
    save_image(path, Image.fromarray(pixels))
    return path


def marked(clip: np.ndarray, at: int, kept: float) -> np.ndarray:
    """Frame `at` of a clip (T, H, W, 3) in a thin border whose colour says whether it was given or written."""
    border = np.full(np.add(clip.shape[1:], (2, 2, 0)), GIVEN if at < round(kept * len(clip)) else WRITTEN, np.uint8)
    border[1:-1, 1:-1] = clip[at]
    return border


def save_strip(path_without_suffix: Path, clips: list[np.ndarray], kept: float = 0) -> Path:
    """Write clips (T, H, W, 3) as PATH.png, which shows motion standing still: some frames of each in a row, marked."""
    last = len(clips[0]) - 1
    shown = np.linspace(0, last, min(STRIP, last + 1)).round().astype(int)
    frames = [marked(clip, at, kept) for clip in clips for at in shown]
    return save_pixels(path_without_suffix, np.asarray(grid(frames, len(shown))))


def save_grid(path_without_suffix: Path, arrays: list[np.ndarray], fps: float = 0, kept: float = 0) -> Path:
    """Write pictures (H, W, 3) side by side as PATH.png; clips (T, H, W, 3) as PATH.webp, which moves, and the first
    of them as a film strip, PATH.png.  The share `kept` of a clip that was given has a grey border, the rest orange."""
    if arrays[0].ndim == 3:
        return save_pixels(path_without_suffix, np.asarray(grid(arrays)))
    frames = [grid([marked(clip, at, kept) for clip in arrays], room=640) for at in range(len(arrays[0]))]
    save_frames(path_without_suffix, frames, fps, HOLD, quality=80, minimize_size=True)
    return save_strip(path_without_suffix, arrays[:16], kept)
