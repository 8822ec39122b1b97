"""What plumbing/draw.py promises: files that hold the very pixels, and clips that show what the model wrote of them."""

import math

import numpy as np
import pytest
from PIL import Image

from plumbing.draw import GIVEN, HOLD, WRITTEN, save_grid, save_pixels, save_strip


@pytest.fixture
def clips() -> list[np.ndarray]:
    """Five of 15 frames in which a light square moves over dark noise, (15, 48, 64, 3) uint8."""
    clips = np.random.default_rng(0).integers(0, 60, (5, 15, 48, 64, 3), np.uint8)
    for at in range(15):
        clips[:, at, 10:26, 2 * at : 2 * at + 16] += 180
    return list(clips)


def frames_of(path) -> tuple[list[np.ndarray], list[int]]:
    """The frames of an animated file, and for how many milliseconds each is shown."""
    with Image.open(path) as image:
        frames, durations = [], []
        for at in range(image.n_frames):
            image.seek(at)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return frames, durations


def border(sheet: np.ndarray, row: int, column: int, scale: int = 1) -> list[int]:
    """The colour to the left of a clip of 64x48 pixels in a grid, 16 below its upper edge."""
    return sheet[(2 + row * 52 + 16) * scale, (2 + column * 68) * scale].tolist()


def test_a_clip_is_written_without_loss_and_plays_at_its_speed(clips, tmp_path):
    path = save_pixels(tmp_path / "keep_0.5", clips[0], 12.5)
    frames, durations = frames_of(path)
    assert path == tmp_path / "keep_0.5.webp" and np.array_equal(frames, clips[0]) and durations == [80] * 15


def test_frames_that_stand_still_are_one_that_lasts_as_long(clips, tmp_path):
    still = clips[0][[0, 0, 0, 5, 5, 9]]
    frames, durations = frames_of(save_pixels(tmp_path / "still", still, 10))
    assert np.array_equal(frames, clips[0][[0, 5, 9]]) and durations == [300, 200, 100]


def test_a_grid_of_clips_moves_and_marks_what_was_written(clips, tmp_path):
    save_grid(tmp_path / "grid", clips, 10, kept=10 / 15)
    frames, durations = frames_of(tmp_path / "grid.webp")
    width, height = 2 + 3 * (64 + 2 + 2), 2 + 2 * (48 + 2 + 2)
    assert durations == [100] * 14 + [100 + HOLD] and frames[0].shape == (height * 3, width * 3, 3)  # small: enlarged
    for at, frame in enumerate(frames):
        assert np.abs(frame[10:151:3, 10:199:3].astype(int) - clips[0][at][:47, :63]).mean() < 20, at
        for row, column in ((0, 0), (0, 2), (1, 1)):
            far = [np.abs(np.subtract(border(frame, row, column, 3), colour)).max() for colour in (GIVEN, WRITTEN)]
            assert np.argmin(far) == (at >= 10), at  # nearly: compression blurs


@pytest.mark.parametrize("kept, given", [(0, 0), (10 / 15, 5), (0.66, 5), (14 / 15, 7)])
def test_a_film_strip_shows_every_second_of_15_frames_marked(kept, given, clips, tmp_path):
    path = save_strip(tmp_path / "strip", clips, kept)
    sheet = np.asarray(Image.open(path))
    assert path.name == "strip.png" and sheet.shape == (2 + 5 * (48 + 4), 2 + 8 * (64 + 4), 3)
    for row, clip in enumerate(clips):
        for column in range(8):
            top, left = 3 + row * 52, 3 + column * 68
            assert np.array_equal(sheet[top : top + 48, left : left + 64], clip[2 * column])
            assert border(sheet, row, column) == list(GIVEN if column < given else WRITTEN)


def test_a_grid_of_clips_lays_the_film_strip_beside_it(clips, tmp_path):
    save_grid(tmp_path / "grid", clips, 10, kept=0.2)
    save_strip(tmp_path / "strip", clips, kept=0.2)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "strip.png").read_bytes()
    save_grid(tmp_path / "one", [clips[0][:3]], 10)  # shorter than a strip is wide
    assert Image.open(tmp_path / "one.png").size[0] % (2 + 3 * (64 + 4)) == 0


def test_sixteen_clips_are_small_enough_for_a_page(tmp_path):
    """Smooth ones that move, as a codec leaves them."""
    y, x = np.mgrid[:64, :64] / 20
    waves = [np.sin(y * math.cos(turn) + x * math.sin(turn) + np.arange(15)[:, None, None] / 5) for turn in range(16)]
    clips = [np.stack([wave, wave**2, -wave], -1) for wave in waves]
    save_grid(tmp_path / "grid", [(clip * 120 + 120).clip(0, 255).astype(np.uint8) for clip in clips], 10)
    with Image.open(tmp_path / "grid.webp") as image:
        assert image.size == (548, 548) and (tmp_path / "grid.webp").stat().st_size < 500_000


@pytest.mark.parametrize("count, size", [(1, 8), (7, 64), (36, 64), (3, 600)])
def test_a_grid_of_pictures_is_what_it_was_before_there_were_clips(count, size, tmp_path):
    pictures = list(np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8))
    columns = math.ceil(count**0.5)
    rows = -(-count // columns)
    sheet = np.full((rows * (size + 2) + 2, columns * (size + 2) + 2, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (size + 2), 2 + i % columns * (size + 2)
        sheet[top : top + size, left : left + size] = picture
    scale = max(1, 512 // sheet.shape[1])
    Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1)).save(tmp_path / "before.png")
    save_grid(tmp_path / "grid", pictures, fps=0, kept=0.5)
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "before.png").read_bytes()
    assert not (tmp_path / "grid.webp").exists()
