"""What data.clips and plumbing.child promise: the clips of any video by time, or a reason, and no harm from a file."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data import clips
from data.clips import DEINTERLACED, LEFT_OUT, read
from data.sources import VIDEO, Item, Unusable, find_items
from plumbing.child import Child, ChildFailed
from tests.conftest import ROOT, SHARED


@dataclass(frozen=True)
class Clips:
    shape: tuple[int, int, int, int] = (5, 32, 32, 3)
    fps: int = 5
    stride: float = 0


def film(frames, form="matroska", codec="ffv1", pix="bgr0", rate=25, times=None, aspect=None, **options) -> bytes:
    """A video file of frames, (H, W, 3) or in the file's own pixel format; `times` are milliseconds."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        for i, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(frame, "rgb24")
            if i == 0:
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pix
                stream.codec_context.color_range, stream.codec_context.colorspace = frame.color_range, frame.colorspace
                if times is not None:
                    stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
                if aspect:
                    stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = aspect
            frame = frame if frame.format.name == pix else frame.reformat(format=pix)
            frame.pts, frame.time_base = (i, Fraction(1, rate)) if times is None else (times[i], Fraction(1, 1000))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def numbered(count: int, height: int = 32, width: int = 32, step: int = 1) -> list[np.ndarray]:
    """Frames of one grey each, their number times a step."""
    return [np.full((height, width, 3), step * i, np.uint8) for i in range(count)]


def pictures(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Frames of blocks in four colours."""
    colours = np.array([(0, 0, 0), (255, 255, 255), (200, 30, 60), (20, 90, 220)], np.uint8)
    blocks = np.random.default_rng(0).integers(0, 4, (count, height // 4, width // 4))
    return list(colours[blocks.repeat(4, 1).repeat(4, 2)])


def shown(data: bytes, codec=Clips(), notes=None) -> np.ndarray:  # noqa: B008
    """The clips of a file, (n, T, H, W, 3)."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return np.stack(list(read(Item(file.name, 0, -1, "a"), codec, Counter() if notes is None else notes)))


def numbers(data: bytes, codec=Clips(), step: int = 1) -> list[list[int]]:  # noqa: B008
    """Which frames of a numbered film the clips show."""
    return np.rint(shown(data, codec).mean((2, 3, 4)) / step).astype(int).tolist()


FORMS = [
    ("mov", "mpeg4", "yuv420p"),
    ("mp4", "libx264", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("mpegts", "mpeg2video", "yuv420p"),
    ("mpeg", "mpeg2video", "yuv420p"),
    ("flv", "flv1", "yuv420p"),
    ("ogg", "libvpx", "yuv420p"),
    ("h264", "libx264", "yuv420p"),
    ("m4v", "mpeg4", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("apng", "apng", "rgb24"),
    ("yuv4mpegpipe", "rawvideo", "yuv420p"),
]


@pytest.mark.parametrize("form, codec, pix", FORMS)
def test_every_format_gives_its_frames_by_time(form, codec, pix):
    data = film(numbered(25, step=10), form, codec, pix)
    assert numbers(data, step=10) == [[0, 5, 10, 15, 20]]


@pytest.mark.parametrize("rate, fps, stride", [(25, 3, 0), (30, 7, 0.5), (10, 24, 0), (24, 5, 2.5), (12, 12, 0)])
def test_each_moment_shows_the_frame_that_is_on_the_screen_then(rate, fps, stride):
    codec, every = Clips((4, 32, 32, 3), fps, stride), max(1, round(stride * fps)) or 4
    moments = [i * rate // fps for i in range(100 * fps // rate + 1) if i * rate < 100 * fps]
    starts = range(0, len(moments) - 3, every if stride else 4)
    found = numbers(film(numbered(100), rate=rate), codec)
    assert found == [moments[start : start + 4] for start in starts] and found


def test_frames_of_different_lengths_stay_as_long_as_they_do():
    times = [333, 400, 700, 1290, 1333, 1534, 2900, 3000]  # the first begins
    expected = [max(i for i in range(8) if times[i] - 333 <= 200 * moment + 1) for moment in range(10)]
    assert numbers(film(numbered(8), times=times)) == [expected[:5], expected[5:]]


def test_gaps_and_times_that_jump_back_neither_fill_clips_nor_lose_frames():
    steps = [40 * i for i in range(25)]
    far = film(numbered(50), times=steps + [10**9 + time for time in steps])
    assert numbers(far) == [[0, 5, 10, 15, 20], [25, 30, 35, 40, 45]]
    far = film(numbered(45), times=steps + [10**9 + time for time in steps[:20]])
    assert numbers(far) == [[0, 5, 10, 15, 20]]  # no clip reaches over a gap
    frames = [clips.Frame(None, start, 0.04) for start in [*np.arange(25) / 25, *np.arange(25) / 25, *[None] * 25]]
    moments = [moment for moment, _ in clips.sampled(iter(frames), 0.04, 25) if moment >= 0]
    assert moments == list(range(75))
    frames = [clips.Frame(i, 1e9 * i, 1e9) for i in range(10)]
    assert len([moment for moment, _ in clips.sampled(iter(frames), 0.04, 25) if moment >= 0]) == 10


@pytest.mark.parametrize("form, codec, pix", [("avi", "ffv1", "bgr0"), ("gif", "gif", "rgb4_byte"), ("webp", "", "")])
def test_a_film_of_the_wanted_size_comes_through_unchanged(form, codec, pix):
    frames = pictures(10)
    if form == "gif":
        frames = [np.where(frame > 127, 255, 0).astype(np.uint8) for frame in frames]
    if form == "webp":
        out, images = io.BytesIO(), [Image.fromarray(frame) for frame in frames]
        images[0].save(out, "WEBP", save_all=True, append_images=images[1:], duration=200, lossless=True)
        found = shown(out.getvalue())
    else:
        found = shown(film(frames, form, codec, pix, 5))
    assert np.array_equal(found.reshape(10, 32, 32, 3), frames)


def test_the_whole_picture_is_shown_on_black_in_its_own_proportions():
    white = [np.full((32, 64, 3), 255, np.uint8)] * 5
    for frames, aspect, shape, box in (
        (white, None, (5, 32, 32, 3), np.s_[8:24, :]),
        (white, None, (5, 16, 64, 3), np.s_[:, 16:48]),
        (white, Fraction(1, 2), (5, 32, 32, 3), np.s_[:, :]),
        (white, Fraction(2, 1), (5, 32, 32, 3), np.s_[12:20, :]),
        ([np.full((8, 4, 3), 255, np.uint8)] * 5, None, (5, 32, 32, 3), np.s_[:, 8:24]),
    ):
        expected = np.zeros(shape[1:], np.uint8)
        expected[box] = 255
        form = ("mp4", "libx264", "yuv420p") if aspect else ()
        assert ((shown(film(frames, *form, rate=5, aspect=aspect), Clips(shape)) > 127) == (expected > 127)).all()


def test_what_is_transparent_is_laid_on_white():
    frame = np.zeros((32, 32, 4), np.uint8)
    frame[:16] = (200, 0, 0, 255)
    data = film([av.VideoFrame.from_ndarray(frame, "rgba")] * 5, "apng", "apng", "rgba", 5)
    expected = np.full((32, 32, 3), 255, np.uint8)
    expected[:16] = (200, 0, 0)
    assert (shown(data) == expected).all()


@pytest.mark.parametrize("matrix, turned", [((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2)])
def test_films_are_turned_upright(matrix, turned):
    """By the matrix of a track, which maps x and y to a x + c y and b x + d y, downwards (ISO 14496-12, 8.3.2)."""
    frames = pictures(5, 32, 64)
    data = bytearray(film(frames, "mov", "png", "rgb24", 5))
    at = data.index(b"tkhd") + 44
    a, b, c, d = (int(value * 65536).to_bytes(4, signed=True) for value in matrix)
    data[at : at + 8], data[at + 12 : at + 20] = a + b, c + d
    shape = np.rot90(frames[0], turned).shape
    assert np.array_equal(shown(bytes(data), Clips((5, *shape)))[0], np.rot90(frames, turned, (1, 2)))


@pytest.mark.parametrize("colour", [(255, 255, 255), (200, 60, 60), (40, 180, 90), (0, 0, 255)])
@pytest.mark.parametrize(
    "space, full, height, pix",
    [
        (1, 1, 64, "yuv444p"),
        (5, 2, 64, "yuv444p"),
        (2, 1, 64, "yuv444p"),
        (2, 1, 720, "yuv420p"),
        (1, 1, 64, "yuv420p10le"),
        (9, 1, 64, "yuv420p"),
    ],
)
def test_colours_are_those_of_the_film(colour, space, full, height, pix):
    """Against the formulas of ITU-R BT.601, BT.709 and BT.2020; 2 is for a film that does not tell."""
    red, blue = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}.get(1 if height == 720 else space, (0.299, 0.114))
    r, g, b = np.array(colour) / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    scales = [(255, 0), (255, 128), (255, 128)] if full == 2 else [(219, 16), (224, 128), (224, 128)]
    factor = 4 if "10" in pix else 1
    frame = av.VideoFrame(height, height, pix)
    for plane, value, (scale, zero) in zip(frame.planes, (luma, *chroma), scales, strict=True):
        level = min(round(factor * (value * scale + zero)), 256 * factor - 1)
        plane.update(np.full(plane.buffer_size // (1 + factor // 4), level, np.uint8 if factor == 1 else "<u2"))
    frame.colorspace, frame.color_range = space, full
    found = shown(film([frame] * 5, pix=pix, rate=5))
    assert np.abs(found.astype(int) - colour).max() <= 3


def test_interlaced_films_are_deinterlaced_and_counted():
    frames = []
    for i in range(25):
        frame = np.zeros((64, 64, 3), np.uint8)
        for field in (0, 1):  # a bar that moves by 4 pixels a field
            frame[field::2, (8 * i + 4 * field) % 48 :][:, :16] = 255
        frames.append(frame)
    found, notes = {}, Counter()
    for flags in ("+ildct+ilme", "+bitexact"):
        data = film(frames, "mpeg", "mpeg2video", "yuv420p", 25, flags=flags, qmin="1", qmax="2")
        found[flags] = shown(data, Clips((5, 64, 64, 3)), notes).astype(int)
    combs = {flags: np.abs(np.diff(pixels, axis=2)).mean() for flags, pixels in found.items()}
    assert notes == {DEINTERLACED: 1} and combs["+ildct+ilme"] < combs["+bitexact"] / 3


def test_clips_that_overlap_are_parts_of_the_same_film():
    data = film(pictures(40), rate=10)
    whole = shown(data, Clips((40, 32, 32, 3), 10))[0]
    for stride, every in ((0.1, 1), (0.3, 3), (0.04, 1), (1.1, 11)):
        found = shown(data, Clips((7, 32, 32, 3), 10, stride))
        assert np.array_equal(found, [whole[at : at + 7] for at in range(0, 34, every)])


def test_films_in_a_tar_are_the_same(tmp_path):
    films = {name: film(pictures(25), *form) for name, form in zip("abc", [*FORMS[:2], FORMS[5]], strict=True)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in films.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    codec = Clips(fps=10)
    found = {item.name: list(read(item, codec, Counter())) for item in find_items(tmp_path)}
    assert {name: np.array_equal(found[f"a.tar/{name}"], shown(data, codec)) for name, data in films.items()} == {
        name: True for name in films
    }


def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path):
    whole = film(numbered(25), "mov", "mpeg4", "yuv420p")
    single, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32)).save(single, "WEBP")
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    large = bytearray(film(numbered(2), "gif", "gif", "rgb8"))
    large[6:10] = (7000).to_bytes(2, "little") * 2
    playlists = [b"ffconcat version 1.0\nfile 'film'\n", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfilm\n"]
    for data, reason in {
        b"": "empty",
        b"some text\n" * 99: "not a video",
        **dict.fromkeys(playlists, "not a video"),
        gzip.compress(whole): "gzip",
        whole[:500]: "damaged",
        film(numbered(2), "gif", "gif", "rgb8")[:20]: "damaged",
        whole.replace(b"mp4v", b"zzzz").replace(b"esds", b"free"): "no decoder for its video",
        sound.getvalue(): "no video stream",
        bytes(large): "more than 36 megapixels",
        film(numbered(1), "gif", "gif", "rgb8"): "one frame",
        single.getvalue(): "one frame",
        film(numbered(20)): "shorter than a clip of 5 frames at 5 a second",
    }.items():
        with pytest.raises(Unusable, match=f"^{reason}"):
            shown(data)
    with pytest.raises(Unusable, match="unreadable"):
        list(read(Item(str(tmp_path / "none"), 0, -1, "a"), Clips(), Counter()))
    with pytest.raises(Unusable, match="why"):
        list(read(Item("", 0, -1, "a", "why"), Clips(), Counter()))
    assert "--codec h264" in VIDEO


@pytest.mark.parametrize("name, text", [("concat", "ffconcat version 1.0\nfile '{}'\n"),
    ("hls", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n")])  # fmt: skip
def test_no_file_opens_another_even_where_its_format_is_allowed(name, text, tmp_path, monkeypatch):
    (tmp_path / "other.ts").write_bytes(film(numbered(25), *FORMS[5]))
    (tmp_path / "list.m3u8").write_text(text.format(tmp_path / "other.ts"))
    with av.open(str(tmp_path / "list.m3u8"), options={"safe": "0"} if name == "concat" else {}) as container:
        assert container.streams.video  # as it would be followed
    monkeypatch.setattr(clips, "FORMATS", clips.FORMATS + " concat hls")
    codec = Clips()
    request = [str(tmp_path / "list.m3u8"), 0, -1, codec.shape, codec.fps, codec.stride]
    (answer,) = clips.answers(json.dumps(request).encode())
    assert json.loads(answer)["unusable"] in ("refers to other files", "not a video")


def test_damage_costs_the_end_and_is_counted():
    data = bytearray(film(pictures(100), "avi", "mpeg4", "yuv420p"))
    whole, notes = shown(bytes(data)), Counter()
    at = len(data) // 2
    data[at : at + 5000] = bytes(5000)
    found = shown(bytes(data), notes=notes)
    assert notes == {LEFT_OUT: 1} and 1 <= len(found) < len(whole) == 4
    assert np.array_equal(found, whole[: len(found)])


@pytest.mark.parametrize("form, codec, pix", [FORMS[1], FORMS[2], FORMS[4], FORMS[6], FORMS[11], FORMS[12]])
def test_no_damage_does_harm(form, codec, pix):
    data, rng, began = film(pictures(25), form, codec, pix), np.random.default_rng(0), time.monotonic()
    for i in range(20):
        broken = bytearray(data[: rng.integers(len(data))] if i % 2 else data)
        for at in rng.integers(0, len(broken), 4) if len(broken) else []:
            broken[at] = rng.integers(256)
        try:
            assert shown(bytes(broken)).shape[0] <= 2 * 5
        except Unusable as reason:
            assert "crash" not in str(reason) and "takes" not in str(reason)
    assert time.monotonic() - began < 60


# --- the child ------------------------------------------------------------------------------------------------------

OBEDIENT = """
import ctypes, os, time
def answers(request):
    word, _, rest = request.partition(b" ")
    if word == b"hang": time.sleep(1000)
    if word == b"die": os._exit(3)
    if word == b"crash": ctypes.string_at(0)
    if word == b"eat": b"x" * (4 << 30)
    if word == b"write": os.write(os.open(__file__ + "x", os.O_CREAT | os.O_WRONLY), b"x")
    if word == b"print": print("x" * 9999, flush=True); os.write(1, b"x")
    if word == b"count": yield from (str(i).encode() for i in range(int(rest)))
    yield str(len(request)).encode() + word
    yield b""
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "obedient.py").write_text(OBEDIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("obedient", memory=1 << 30, seconds=2)
    yield child
    child.close()


def test_a_child_answers_with_bytes_of_any_length(child):
    for request in (b"", b"print", b"x" * (3 << 20), bytes(range(256))):
        assert list(child.ask(request)) == [str(len(request)).encode() + request.partition(b" ")[0], b""]
    assert [int(answer) for answer in islice(child.ask(b"count 10000"), 10000)] == list(range(10000))
    assert list(child.ask(b"a")) == [b"1a", b""]  # after an iterator that was dropped


@pytest.mark.parametrize("order, reason", [(b"hang", "longer than 2 seconds"), (b"die", "code 3"), (b"crash", "killed"),
    (b"eat", "more memory than 1024 MiB"), (b"write", "code 1")])  # fmt: skip
def test_a_child_that_fails_says_why_and_the_next_request_works(order, reason, child):
    for _ in range(2):
        with pytest.raises(ChildFailed, match=reason):
            list(child.ask(order))
        assert list(child.ask(b"a")) == [b"1a", b""]
    process = child.process
    assert list(child.ask(b"a")) == [b"1a", b""] and child.process is process


def test_a_child_belongs_to_the_process_that_started_it(child):
    assert list(child.ask(b"a")) == [b"1a", b""]
    if (forked := os.fork()) == 0:
        os._exit(0 if list(child.ask(b"ab")) == [b"2ab", b""] else 1)
    assert os.waitpid(forked, 0)[1] == 0 and list(child.ask(b"abc")) == [b"3abc", b""]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_child_ends_with_its_parent_even_while_it_computes(child, tmp_path):
    script = "from plumbing.child import Child; c = Child('obedient'); c.start(); print(c.process.pid, flush=True); "
    script += "list(c.ask(b'hang'))"
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    grandchild = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    status, until = Path(f"/proc/{grandchild}/stat"), time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_film_comes_clip_by_clip_in_little_memory(tmp_path):
    frames = (frame for _ in range(40) for frame in pictures(50, 128, 128))
    (tmp_path / "long").write_bytes(film(frames, "avi", "mpeg4", "yuv420p"))
    clips.decoder.cache_clear()
    peaks = []
    for codec in (Clips((5, 128, 128, 3), 25, 8), Clips((5, 128, 128, 3), 25)):
        count = sum(1 for _ in read(Item(str(tmp_path / "long"), 0, -1, "a"), codec, Counter()))
        peaks.append(peak(clips.decoder().process.pid))
        assert count == (10 if codec.stride else 400)
    assert peaks[1] < peaks[0] * 1.2 + 20_000


def peak(pid: int) -> int:
    """KiB of memory that a process has had at most."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="needs the sample files beside the project")
def test_real_files_give_clips_or_a_reason():
    codec, found = Clips((5, 64, 64, 3)), Counter()
    for item in find_items(SHARED / "video"):
        notes = Counter()
        if item.name.endswith("LICENSE"):
            continue
        assert sum(clip.any() for clip in read(item, codec, notes)) >= 1 and not notes
    for item in find_items(SHARED / "odd_images"):
        if item.name.endswith((".gif", ".webp", ".fli")) or "apng" in item.name:
            try:
                found["clips"] += bool(list(read(item, codec, Counter())))
            except Unusable as reason:
                assert "crash" not in str(reason) and "takes" not in str(reason)
    assert found["clips"] > 20
