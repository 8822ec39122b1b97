"""What data.prepare promises: every usable file, the same result always, and each other file named."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from codec import JPEG, load_tokenizer
from data import prepare as module
from data import sources
from data.pictures import read_square
from data.prepare import prepare
from data.shapes import draw
from data.sources import Unusable
from plumbing.command import UserError
from tests.conftest import ROOT, SHARED, command


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def documents(folder, split: str) -> list[np.ndarray]:
    """The symbols of every document of a split."""
    tokens, found = load_tokenizer(folder), []
    for path in sorted(folder.glob(f"{split}-*[0-9].npy")):
        stream, lengths = np.load(path), np.load(path.with_suffix(".lengths.npy"))
        found += [tokens.decode(part) for part in np.split(stream, np.cumsum(lengths)[:-1])]
    return found


def test_every_image_is_there_once(photos, prepared):
    jpeg = JPEG(size=32)
    files = sorted(photos.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    expected = [jpeg.encode(np.asarray(Image.open(path))).tobytes() for path in files]
    found = [document.tobytes() for split in ("train", "val") for document in documents(prepared, split)]
    assert sorted(found) == sorted(expected)
    assert len(documents(prepared, "val")) == 6
    assert all(jpeg.check(document) is None for document in documents(prepared, "train"))


def test_the_result_does_not_depend_on_the_workers(photos, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TASK", 7)
    prepare(photos, tmp_path / "two", JPEG(size=32), vocab=300, validation=0.1, workers=2)
    assert contents(tmp_path / "two") == contents(prepared)


def test_tar_shards_give_what_their_files_give(photos, tmp_path):
    jpeg = {"codec": JPEG(size=32), "vocab": 258, "validation": 0.1, "workers": 1}
    (tmp_path / "tars").mkdir()
    for name in ("class0", "class1"):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for path in sorted((photos / name).iterdir()):
                tar.add(path, path.name)
                tar.addfile(tarfile.TarInfo("label.cls"), io.BytesIO())
    prepare(tmp_path / "tars", tmp_path / "a", **jpeg)
    prepare(photos, tmp_path / "b", **jpeg)
    for split in ("train", "val"):
        assert [d.tobytes() for d in documents(tmp_path / "a", split)] == [
            d.tobytes() for d in documents(tmp_path / "b", split)
        ]
    assert (tmp_path / "a" / "skipped.txt").read_text().count("empty\tclass0.tar/label.cls") == 30


def test_a_preparation_that_was_killed_continues_to_the_same_result(photos, prepared, tmp_path):
    """kill -9 while parts are written; the second call finds the whole parts and gives the bytes of an uninterrupted
    one."""
    script = (
        "import data.prepare as p; from codec import JPEG; from pathlib import Path; import time; p.PART = 8\n"
        "encode = p.encode_part\n"
        "def slow(*a): encode(*a); time.sleep(0.2)\n"
        "p.encode_part = slow\n"
        f"p.prepare(Path({str(photos)!r}), Path({str(tmp_path / 'out')!r}), JPEG(size=32), 300, 0.1, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "parts"
    while process.poll() is None and len(list(parts.glob("*.skipped"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.skipped")}
    assert 3 <= len(kept) < 8
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
    assert documents(tmp_path / "out", "train")[0].tobytes() == documents(prepared, "train")[0].tobytes()
    whole = {split: [d.tobytes() for d in documents(prepared, split)] for split in ("train", "val")}
    assert {split: [d.tobytes() for d in documents(tmp_path / "out", split)] for split in ("train", "val")} == whole
    assert not parts.exists()


def test_other_settings_are_refused_with_a_difference(photos, prepared):
    prepare(photos, prepared, JPEG(size=32), vocab=300, validation=0.1, workers=1)  # the same: nothing to do
    with pytest.raises(UserError, match="quality: 25, now 50"):
        prepare(photos, prepared, JPEG(size=32, quality=50), vocab=300, validation=0.1, workers=1)
    with pytest.raises(UserError, match="holds other files"):
        prepare(photos, photos, JPEG(size=32), vocab=300, validation=0.1, workers=1)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path):
    png = saved(Image.fromarray(draw(0)), "PNG")
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (20_000).to_bytes(4) + (20_000).to_bytes(4) + b"\x08\2\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4) + png[33:]
    cases = {
        b"": "empty",
        b"GIF? no, text": "not an image",
        png[: len(png) // 2]: "truncated or damaged",
        bomb: "megapixels",
        saved(Image.new("RGB", (200, 63)), "PNG"): "smaller than 64",
        saved(Image.new("F", (64, 64)), "TIFF"): "unknown range",
    }
    for data, reason in cases.items():
        with pytest.raises(Unusable, match=reason):
            read_square(data, 64)
    with pytest.raises(Unusable, match="unreadable"):
        sources.read_file(sources.Item(str(tmp_path), 0, -1, "a folder"))


def test_every_mode_becomes_rgb():
    """Grey, 16 bits, palette, alpha and CMYK pictures of one colour keep it; what is transparent is white."""
    grey = np.full((64, 64), 100, np.uint8)
    wide = Image.fromarray(np.full((64, 64), 100 * 257, np.uint16))
    for data in (
        saved(Image.fromarray(grey), "PNG"),
        saved(wide, "PNG"),
        saved(wide, "TIFF"),
        saved(Image.fromarray(grey).convert("P"), "GIF"),
        saved(Image.fromarray(grey).convert("LA"), "PNG"),
        saved(Image.fromarray(grey).convert("RGB").convert("CMYK"), "TIFF"),
        saved(Image.fromarray(grey).convert("RGB"), "WEBP", lossless=True),
        saved(Image.fromarray(grey).convert("RGB"), "BMP"),
    ):
        assert np.array_equal(read_square(data, 64), np.full((64, 64, 3), 100))
    clear = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    assert (read_square(saved(clear, "PNG"), 64) == 255).all()
    assert (read_square(saved(Image.new("1", (64, 64), 1), "PNG"), 64) == 255).all()


def test_the_largest_centre_square_is_taken_upright():
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = draw(3)
    assert np.array_equal(read_square(saved(Image.fromarray(wide), "PNG"), 64), draw(3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = saved(Image.fromarray(np.rot90(draw(3)).copy()), "PNG", exif=exif)
    assert np.array_equal(read_square(turned, 64), draw(3))


def test_shapes_are_the_same_every_time():
    assert np.array_equal(draw(7), draw(7)) and not np.array_equal(draw(7), draw(8))
    assert draw(0, 32).shape == (32, 32, 3)


@pytest.mark.skipif(not (SHARED / "odd_images").exists(), reason="no odd images at hand")
def test_odd_images_never_crash_and_are_all_accounted_for(tmp_path):
    result = command("-m", "data.prepare", SHARED / "odd_images", tmp_path / "out", "--size", 32)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [line.split("\t")[1] for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()]
    used = sum(shard["documents"] for shard in report["shards"].values())
    assert used + len(names) == report["settings"]["files"] and sum(report["skipped"].values()) == len(names)
    assert used > 600
    assert "pillow/truncated_jpeg.jpg" in names and "pillow/decompression_bomb.gif" in names
    assert "pillow/hopper.ppm" not in names


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "OUT"], "not a folder"),
        (["EMPTY", "OUT"], "0 usable images of 0 files"),
        (["EMPTY", "OUT", "--qualty", "3"], "did you mean --quality?"),
        (["EMPTY", "OUT", "--size", "abc"], "invalid int value: 'abc'"),
        (["EMPTY", "OUT", "--size", "8"], "choose 16 to 1024"),
        (["EMPTY", "OUT", "--val", "1"], "between 0 and 1"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "OUT": tmp_path / "out"}
    result = command("-m", "data.prepare", *(places.get(a, a) for a in arguments))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
