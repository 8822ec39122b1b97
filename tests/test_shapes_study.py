"""What studies.shapes promises: the built-in pictures are all right, others are not."""

import json

import numpy as np
import pytest

from codec import JPEG
from data.shapes import draw
from plumbing.command import UserError
from studies.shapes import known, nearest, shares


def test_every_built_in_picture_is_right_and_a_spoilt_one_is_not(tmp_path):
    codec = JPEG()
    for i in range(20):
        pixels = draw(i).copy()
        if i == 7:  # one cell of four, half of it
            pixels[:32, :16] = 255 - pixels[:32, :16]
        (tmp_path / f"{i:05d}.jpg").write_bytes(codec.file(codec.encode(pixels)))
    with pytest.raises(UserError, match="holds no JPEGs that sample.py wrote"):
        shares(tmp_path)
    (tmp_path / "samples.json").write_text(json.dumps({"codec": codec.settings}))
    assert shares(tmp_path) == f"{tmp_path}: 98.8% of 80 cells, 95.0% of 20 pictures"


def test_the_nearest_drawing_is_found_by_its_psnr():
    templates = known(JPEG())
    assert templates.shape == (388, 32 * 32 * 3)
    cells = templates[[5, 9, 100, 387]].reshape(2, 2, 32, 32, 3).swapaxes(1, 2).reshape(64, 64, 3)
    cells = cells + np.where(np.arange(64 * 64 * 3).reshape(64, 64, 3) % 2, 2.0, -2.0)
    assert np.allclose(nearest(cells, templates), 10 * np.log10(255**2 / 4), atol=0.01)
