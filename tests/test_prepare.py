"""What data.prepare promises: every usable file, the same result always, and each other file named."""

import io
import json
import multiprocessing.synchronize
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec import JPEG, Pixels, load_tokenizer
from data import prepare as module
from data import shapes
from data.pairs import learn_pairs
from data.prepare import prepare
from data.shapes import draw
from plumbing.command import UserError
from tests.conftest import ROOT, SHARED, command

SMALL = {"codec": JPEG(size=32), "vocab": 260, "validation": 0.1, "workers": 1}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("report.json", "lock")}


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
    monkeypatch.setitem(module.TASK, 3, 7)
    prepare(photos, tmp_path / "two", JPEG(size=32), vocab=300, validation=0.1, workers=2)
    assert contents(tmp_path / "two") == contents(prepared)


def test_views_are_the_mirrored_and_turned_pictures_one_view_after_the_other(photos, tmp_path):
    codec = Pixels(size=32, colours=0)
    for views in (1, 2, 8):
        prepare(photos, tmp_path / str(views), codec, vocab=None, validation=0.1, workers=1, views=views)
    plain, two, eight = (documents(tmp_path / str(views), "train") for views in (1, 2, 8))
    pictures = [each.reshape(codec.shape) for each in plain]
    turned = [[np.rot90(picture, turns) for picture in pictures] for turns in range(4)]
    wanted = [view for pictures in turned for view in (pictures, [picture[:, ::-1] for picture in pictures])]
    wanted = [picture.reshape(-1) for view in wanted for picture in view]
    assert len(plain) == 54 and all(map(np.array_equal, two, wanted[:108])) and len(two) == 108
    assert all(map(np.array_equal, eight, wanted)) and len(eight) == len(wanted)
    for views in (2, 8):
        found = documents(tmp_path / str(views), "val")
        assert all(map(np.array_equal, found, documents(tmp_path / "1", "val"))) and len(found) == 6
    with pytest.raises(UserError, match="--views is 3"):
        prepare(photos, tmp_path / "3", codec, vocab=None, validation=0.1, workers=1, views=3)


@pytest.mark.parametrize("codec", [Pixels(size=16, colours=32), JPEG(size=32, restart=2)])
def test_other_codecs_do_not_depend_on_the_workers_either(codec, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(module.PART, 3, 16)
    for workers in (1, 2):
        prepare(photos, tmp_path / str(workers), codec, vocab=None, validation=0.1, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert all(
        load_tokenizer(tmp_path / "1").codec.check(document) is None for document in documents(tmp_path / "1", "val")
    )


def test_all_documents_of_a_file_are_on_one_side_of_the_split(photos, tmp_path, monkeypatch):
    """A file may give several documents, as the clips of a video: here four, the file's number written into them."""

    def four(item, codec, notes):
        for _ in range(4):
            yield np.full(codec.shape, int(item.name.split("/")[1].split(".")[0]) * 4, np.uint8)

    monkeypatch.setitem(module.READERS, 3, four)
    codec = Pixels(size=4, colours=0)
    prepare(photos, tmp_path / "out", codec, vocab=None, validation=0.1, workers=1)
    files = {split: [int(document[0]) for document in documents(tmp_path / "out", split)] for split in ("train", "val")}
    assert len(files["val"]) == 24 and len(set(files["val"])) == 6
    assert len(files["train"]) == 216 and not set(files["train"]) & set(files["val"])


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
        "import data.prepare as p; from codec import JPEG; from pathlib import Path; import time; p.PART[3] = 8\n"
        "write = p.Part.write\n"
        "def slow(*a): write(*a); time.sleep(0.2)\n"
        "p.Part.write = slow\n"
        f"p.prepare(Path({str(photos)!r}), Path({str(tmp_path / 'out')!r}), JPEG(size=32), 300, 0.1, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out" / "parts"
    while process.poll() is None and len(list(parts.glob("*.json"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
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
    assert "pillow/broken_data_stream.png" in names and "pillow/decompression_bomb.gif" in names
    assert "pillow/hopper.ppm" not in names


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "OUT"], "not a folder"),
        (["EMPTY", "OUT"], "0 usable files of 0"),
        (["EMPTY", "OUT", "--codec", "pixels"], "0 usable files of 0"),
        (["PHOTOS", "PHOTOS/out"], "lies in"),
        (["EMPTY", "OUT", "--qualty", "3"], "did you mean --quality?"),
        (["EMPTY", "OUT", "--size", "abc"], "invalid int value: 'abc'"),
        (["EMPTY", "OUT", "--size", "8"], "choose 16 to 1024"),
        (["EMPTY", "OUT", "--val", "1"], "between 0 and 1"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, message, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "OUT": tmp_path / "out", "PHOTOS": photos, "PHOTOS/out": photos / "out"}
    result = command("-m", "data.prepare", *(places.get(a, a) for a in arguments))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


# --- what was begun, continued --------------------------------------------------------------------------------------


def drawings(folder, numbers, seed: int = 3):
    """Pictures in a format without compression, so that all files have one size."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        Image.fromarray(draw(i, 32, seed)).save(folder / f"{i:02d}.bmp")
    return folder


@pytest.mark.parametrize("then", [{}, {"vocab": 270}, {"codec": JPEG(size=32, quality=50)}])
def test_a_preparation_of_too_few_files_goes_on_when_there_are_more(then, tmp_path):
    """With the same settings or with others: nothing was finished."""
    with pytest.raises(UserError, match="5 usable files of 5 .* give it more"):
        prepare(drawings(tmp_path / "in", range(5)), tmp_path / "out", **SMALL)
    prepare(drawings(tmp_path / "in", range(5, 20)), tmp_path / "out", **{**SMALL, **then})
    prepare(tmp_path / "in", tmp_path / "fresh", **{**SMALL, **then})
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_file_that_was_replaced_is_encoded_anew(tmp_path):
    """Another picture under the name of one that an unfinished preparation had encoded, as large as that."""
    with pytest.raises(UserError, match="give it more"):
        prepare(drawings(tmp_path / "in", range(20)), tmp_path / "out", **{**SMALL, "validation": 0.01})
    drawings(tmp_path / "in", [7], seed=4)
    prepare(tmp_path / "in", tmp_path / "out", **SMALL)
    prepare(tmp_path / "in", tmp_path / "fresh", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_copy_is_prepared_already_and_a_file_of_another_size_is_refused(tmp_path, capsys):
    prepare(drawings(tmp_path / "in", range(20)), tmp_path / "out", **SMALL)
    shutil.copytree(tmp_path / "in", tmp_path / "copy", copy_function=shutil.copyfile)
    capsys.readouterr()
    prepare(tmp_path / "copy", tmp_path / "out", **SMALL)
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is prepared already\n"
    Image.fromarray(draw(0, 64)).save(tmp_path / "copy" / "07.bmp")
    with pytest.raises(UserError, match="listing: .*, now .*choose another folder, or delete this one"):
        prepare(tmp_path / "copy", tmp_path / "out", **SMALL)


def test_pictures_that_are_drawn_already_keep_their_time(tmp_path):
    """An interrupted preparation knows its parts by it; what a kill cut is drawn again."""
    shapes.make(tmp_path / "out", 40, 32)
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-pictures").iterdir()}
    first, cut, *_ = sorted(drawn)
    whole = cut.read_bytes()
    cut.write_bytes(whole[:50])
    shapes.make(tmp_path / "out", 40, 32)
    assert {path for path in drawn if path.stat().st_mtime_ns != drawn[path]} == {cut}
    assert cut.read_bytes() == whole


def test_two_preparations_of_one_folder_take_turns(photos, tmp_path):
    arguments = ["-m", "data.prepare", photos, tmp_path / "out", "--size", 32, "--val", 0.1, "--workers", 1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, **pipes) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("is prepared already" in out for out, _ in said) == 1
    assert sum("60 documents" in out for out, _ in said) == 1


# --- workers and memory ---------------------------------------------------------------------------------------------


def test_a_killed_worker_is_one_sentence_and_the_same_call_continues(photos, tmp_path, monkeypatch):
    two = {**SMALL, "workers": 2}
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_items", killed)
        with pytest.raises(UserError, match="a worker process was killed, .*the same command continues.*--workers 1"):
            prepare(photos, tmp_path / "out", **two)
    prepare(photos, tmp_path / "out", **two)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_worker_needs_nothing_that_processes_share(photos, tmp_path, monkeypatch):
    """As where /dev/shm cannot be written."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", refuse)
    with pytest.raises(UserError, match="no worker processes can be used here .*Read-only.*: pass --workers 1"):
        prepare(photos, tmp_path / "out", **{**SMALL, "workers": 2})
    prepare(photos, tmp_path / "out", **SMALL)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what a process held")
def test_more_pairs_take_no_more_memory(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "in" / f"{i}.png")
    script = (
        "import sys; from data.prepare import main; main(sys.argv[1:]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for vocab in (320, 5000):
        given = (tmp_path / "in", tmp_path / str(vocab), "--workers", 1, "--vocab", vocab)
        result = command("-c", script, *given)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert load_tokenizer(tmp_path / "5000").vocab > 4000
    assert peaks[1] - peaks[0] < 150  # MB


def test_learning_pairs_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    learn_pairs(JPEG(size=32), [JPEG(size=32).encode(draw(i, 32)) for i in range(9)], 300)
    assert "pairs: " in sys.stderr.getvalue() and "/42" in sys.stderr.getvalue()


def test_no_two_clips_of_moving_shapes_are_alike():
    count = shapes.movable(32)
    drawn = [{shapes.move(i, 32, 3, seed).tobytes(): i for i in range(count)} for seed in (0, 1)]
    assert len(drawn[0]) == count == 960 and drawn[0].keys() == drawn[1].keys() and drawn[0] != drawn[1]
    with pytest.raises(UserError, match="--count is 961: .* to 960"):
        shapes.make(Path("never"), 961, 32, clips=True)


@pytest.mark.parametrize("colours", [16, 300])
def test_pixels_of_any_number_of_colours_are_prepared_as_they_are(colours, photos, tmp_path):
    """Symbols of one byte and of two."""
    prepare(photos, tmp_path / "data", Pixels(size=8, colours=colours), None, validation=0.1, workers=1)
    codec = load_tokenizer(tmp_path / "data").codec
    pictures = [*module.usable(module.find_items(photos), codec)][9::10]
    found = documents(tmp_path / "data", "val")
    assert len(found) == len(pictures) == 6
    assert all(np.array_equal(a, codec.encode(b)) for a, b in zip(found, pictures, strict=True))
