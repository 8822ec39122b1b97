"""What studies.video promises: measures that equal their closed forms, and tables of what a run on clips writes."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import sample
from codec import load_tokenizer
from data.prepare import prepare
from data.stream import Stream
from h264 import H264, units
from plumbing.command import UserError
from plumbing.draw import GIVEN, WRITTEN, save_pixels
from studies import video
from studies.video import complaint, distances, documents, likeness, page, psnr, ssim
from tests.benchmark import random_state
from tests.conftest import RUN
from train import parse, train

CODEC = H264(width=32, height=16, frames=4, fps=10)


def moving(seed: int, height: int = 16) -> np.ndarray:
    """A square that moves over one colour, (4, height, 32, 3) uint8."""
    rng = np.random.default_rng(seed)
    ground, x, y, speed = rng.integers(40, 200, 3), rng.integers(12), rng.integers(4), rng.integers(1, 3)
    clip = np.full((4, height, 32, 3), ground, np.uint8)
    for at in range(4):
        clip[at, y : y + 12, x + speed * at : x + speed * at + 12] = 255 - ground
    return clip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder of ten clips, without loss."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(10):
        save_pixels(folder / f"{seed}", moving(seed), CODEC.fps)
    return folder


@pytest.fixture(scope="module")
def clips(source, tmp_path_factory) -> Path:
    """The folder of a run of two steps on those clips."""
    folder = tmp_path_factory.mktemp("video")
    prepare(source, folder / "data", CODEC, vocab=300, validation=0.3, workers=1)
    longest = max(
        shard["longest"] for shard in json.loads((folder / "data/report.json").read_text())["shards"].values()
    )
    flags = [*RUN, "--context", str(longest + 16), "--batch", "2", "--steps", "1", "--every", "1", "--samples", "1"]
    train(parse(["--data", str(folder / "data"), "--out", str(folder / "run"), *flags])[0])
    return folder / "run"


# --- measures -------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_error_of_a_frame_over_all_clips():
    truth = np.random.default_rng(0).integers(0, 200, (2, 3, 16, 16, 3), np.uint8)
    found = truth + np.array([[3, 0, 5], [3, 0, 0]], np.uint8)[:, :, None, None, None]
    one, same, two = psnr(found, truth)
    assert one == pytest.approx(20 * np.log10(255 / 3)) and two == pytest.approx(10 * np.log10(255**2 / (25 / 2)))
    assert same is None and psnr(255 - 0 * truth, 0 * truth)[0] == 0


def test_ssim_equals_its_closed_forms():
    clips = np.random.default_rng(0).integers(0, 200, (2, 3, 24, 20, 3), np.uint8)
    assert ssim(clips, clips) == pytest.approx([1, 1, 1], abs=1e-12)
    dark, light, small = np.full((1, 1, 16, 16, 3), 50, np.uint8), np.full((1, 1, 16, 16, 3), 90, np.uint8), 2.55**2
    assert ssim(dark, light)[0] == pytest.approx((2 * 50 * 90 + small) / (50**2 + 90**2 + small))
    grey = np.repeat(np.random.default_rng(1).integers(0, 256, (1, 1, 11, 11, 1), np.uint8), 3, -1)  # one window
    window = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x = grey[0, 0, :, :, 0].astype(float)
    y, mean = 255 - x, (window * x).sum()
    variance = (window * np.square(x - mean)).sum()  # of the negative too, and minus it is their covariance
    light = (2 * mean * (255 - mean) + small) / (mean**2 + (255 - mean) ** 2 + small)
    contrast = (7.65**2 - 2 * variance) / (2 * variance + 7.65**2)
    assert y.min() >= 0 and ssim(grey, 255 - grey)[0] == pytest.approx(light * contrast)


def test_the_last_frame_of_a_clip_that_stands_still_is_the_same_as_those_ahead():
    still = np.repeat(moving(0)[:1], 4, 0)[None]
    noisy = still.copy()
    noisy[:, 2:] += 4
    table = likeness(2, noisy, still, None)
    assert table[""] == ["+1", "+2"]
    assert table["PSNR of the last frame given to the round trip"] == [None, None]
    assert table["SSIM of the last frame given to the round trip"] == pytest.approx([1, 1])
    assert table["PSNR of the model to the round trip"] == pytest.approx([20 * np.log10(255 / 4)] * 2)
    text = page("a title", table)
    assert "| PSNR of the last frame given to the round trip | same | same |" in text
    assert "| PSNR of the model to the round trip | 36.09 | 36.09 |" in text and "|---|---|---|\n" in text


def test_ffmpeg_is_silent_about_whole_files_alone():
    codec = H264(width=32, height=32, frames=4)
    symbols = codec.encode(moving(0, 32))
    slices = units(bytes(symbols))
    damaged = [*slices[:5], slices[5][:-2] + b"\xff\xff", *slices[6:]]
    whole, *others = [
        complaint(codec.file(np.frombuffer(b"".join(each), np.uint8)), 4)
        for each in (slices, *([*slices[:at], *slices[at + 1 :]] for at in range(16)), damaged, [])
    ]
    assert len(slices) == 16 and whole is None and all(others)
    assert complaint(codec.file(symbols), 5) == "4 frames, not 5"
    assert complaint(b"no video", 4) and complaint(codec.file(symbols), 4) is None


def test_fid_of_the_same_frames_is_nought(tmp_path):
    torch.save(random_state(), tmp_path / "weights.pth")
    network = fid.load(tmp_path / "weights.pth", 768)
    clips, others = (np.stack([moving(seed) for seed in seeds]) for seeds in ((0, 1), (2, 3)))
    sets = {"samples": clips, "training clips": others, "validation clips": clips}
    table = distances(network, sets, torch.device("cpu"))
    floor = table["training clips to validation clips"][0]
    assert len(table) == 3 and table["samples to validation clips"][0] < 1e-3 * floor


# --- a run ----------------------------------------------------------------------------------------------------------


def test_documents_are_those_of_the_data_evenly_spread(clips):
    tokenizer, data = load_tokenizer(clips), clips.parent / "data"
    held = documents(Stream(data, "val", 0), tokenizer, 2)
    made = {CODEC.encode(moving(seed)).tobytes() for seed in range(10)}
    assert len(held) == 2 and {symbols.tobytes() for symbols in held} < made


def test_all_of_it_is_measured_and_written(clips, source, tmp_path, capsys):
    video.main([str(clips), "--count", "2", "--keep", "0.5", "--originals", str(source), "--to", str(tmp_path / "to")])
    said, tables = capsys.readouterr().out, json.loads((tmp_path / "to/video.json").read_text())
    assert said.startswith("no FID without --weights") and (tmp_path / "to/video.md").read_text() in said
    about, bits, ahead, valid = tables.values()
    assert about == {"": ["clips", "frames", "given", "seed"], "step_00000001": [2, 4, 2, 0]}
    assert bits["bits a frame"][0] == pytest.approx(bits["bits a clip"][0] / 4)
    assert bits["bytes in a file"][0] > bits["bytes in the sequence"][0] > 0
    assert all(shares == [1, 1, 1] for name, shares in valid.items() if name.endswith("with the grammar"))
    assert valid["untrained, without the grammar"] == [0, 0, 0] and len(valid) == 5
    tokenizer, data = load_tokenizer(clips), clips.parent / "data"
    held = documents(Stream(data, "val", 0), tokenizer, 2)
    truth = np.stack([CODEC.decode(symbols) for symbols in held])
    made = {CODEC.encode(moving(seed)).tobytes(): moving(seed) for seed in range(10)}
    pixels = np.stack([made[symbols.tobytes()] for symbols in held])
    assert ahead["PSNR of the round trip to the originals"] == pytest.approx(psnr(truth[:, 2:], pixels[:, 2:]))
    assert ahead["SSIM of the last frame given to the originals"] == pytest.approx(
        ssim(truth[:, [1, 1]], pixels[:, 2:])
    )
    assert len(ahead) == 1 + 2 * 5
    strips = {name: np.asarray(Image.open(tmp_path / f"to/{name}.png")) for name in ("true", "continued")}
    scale = strips["true"].shape[1] // (2 + 4 * 36)
    borders = {name: strip[4 * scale, 2 * scale :: 36 * scale][:4].tolist() for name, strip in strips.items()}
    assert borders == {"true": [list(GIVEN)] * 4, "continued": [list(GIVEN)] * 2 + [list(WRITTEN)] * 2}
    assert all((tmp_path / f"to/{name}.webp").exists() for name in strips)


def test_the_same_seed_gives_the_same_numbers(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "TEMPERATURES", [1.0])
    for name in ("one", "other"):
        video.main([str(clips), "--count", "2", "--seed", "1", "--to", str(tmp_path / name)])
    assert (tmp_path / "one" / "video.json").read_bytes() == (tmp_path / "other" / "video.json").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--keep", "0.1"], "--keep is 0.1: choose 0.25 or more"),
        (["--count", "1"], "choose a count from 2"),
        (["--weights", "nothing.pth"], "nothing.pth, asked for by --weights, is no file"),
        (["--data", "PICTURES"], "holds other tokens than .* reads: name its data"),
        (["--originals", "PICTURES"], "lacks 2 of 2 clips: name what the data were made from"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, clips, prepared, tmp_path):
    arguments = [str(prepared) if each == "PICTURES" else each for each in arguments]
    with pytest.raises(UserError, match=message):
        video.main([str(clips), "--count", "2", "--to", str(tmp_path / "to"), *arguments])
    assert not (tmp_path / "to").exists()


def test_a_run_on_pictures_is_refused(finished, tmp_path):
    flags = Namespace(run=finished, data=None)
    with pytest.raises(UserError, match="was trained on pictures .* a run that was trained on clips"):
        video.study(flags)


def test_files_that_no_viewer_can_read_are_left_out_of_the_grid(clips, tmp_path, capsys):
    sample.main([str(clips), "--free", "--count", "2", "--length", "20", "--to", str(tmp_path)])
    assert "0 of 2 are whole valid files" in capsys.readouterr().out and not (tmp_path / "grid.webp").exists()
    for number in range(2):
        (tmp_path / f"0000{number}.mp4").write_bytes(CODEC.file(CODEC.encode(moving(number))))
    sample.main([str(clips), "--free", "--count", "3", "--length", "20", "--to", str(tmp_path)])
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape[0] % (2 + 2 * (16 + 4)) == 0  # two of three
