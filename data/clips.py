"""Video files to clips: frames by time, upright, whole, on black where their shape is another.

The first frame that can be shown begins a series of moments, 1 / fps seconds apart; each shows the frame that is on the
screen then.  A frame without a time, or whose time is not after that of the frame before, follows it after one frame of
the average rate; a gap of more than GAP seconds, forward or back, begins a new series.  No clip reaches over two.

FFmpeg decodes in a child process (plumbing.child), which hostile files may crash.
"""

import io
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple, NoReturn

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from data.sources import LARGEST_FILE, SNIFFED, VIDEO, Item, Unusable, foreign, opened
from plumbing.child import Child, ChildFailed, TooLarge, TooSlow

FORMATS = "mov matroska avi mpeg mpegvideo mpegts flv ogg gif apng h264 hevc m4v obu ivf asf yuv4mpegpipe"  # FFmpeg's
MOST_PIXELS = 36_000_000  # of a frame; 8K has 33 million
GAP = 10.0  # seconds
ROUNDING = 0.0015  # seconds: where times are whole milliseconds, a difference is off by up to one
ANIMATION = re.compile(rb"GIF8|RIFF.{4}WEBP|\x89PNG.{,999}acTL", re.DOTALL)
DAMAGED = "damaged"
LEFT_OUT, DEINTERLACED = "damaged: the end left out", "deinterlaced"  # notes
PRECISE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
ITU601, ITU709, UNKNOWN = 5, 1, 2  # colour spaces
CLIP, MORE = b"C", b""  # how an answer with pixels begins; an answer that says no more than "not done yet"


def read(item: Item, codec, notes: Counter[str]) -> Iterator[np.ndarray]:
    """The clips of codec.shape (T, H, W, 3), uint8, that a video file holds: codec.fps frames a second, one clip every
    codec.stride seconds, end to end if this is 0.  Errors: Unusable, with the reason."""
    if item.trouble:
        raise Unusable(item.trouble)
    request = [os.path.abspath(item.path), item.offset, item.length, codec.shape, codec.fps, codec.stride]
    result = {}
    try:
        for answer in decoder().ask(json.dumps(request).encode()):
            if answer.startswith(CLIP):
                yield np.frombuffer(answer, np.uint8, offset=len(CLIP)).reshape(codec.shape)
            elif answer != MORE:
                result = json.loads(answer)
        notes.update(result["notes"])
        reason = result["unusable"]
    except TooSlow:
        raise Unusable("takes too long to decode") from None
    except TooLarge:
        raise Unusable("takes too much memory to decode") from None
    except (ChildFailed, ValueError, KeyError, TypeError):
        raise Unusable("crashes the decoder") from None
    if reason:
        raise Unusable(reason)


@lru_cache(1)
def decoder() -> Child:
    return Child("data.clips")


# --- in the child ---------------------------------------------------------------------------------------------------


def answers(request: bytes) -> Iterator[bytes]:
    """CLIP and pixels for each clip, MORE every second without one, at last {unusable: reason or "", notes}."""
    path, offset, length, shape, fps, stride = json.loads(request)
    av.logging.set_level(av.logging.PANIC)
    notes, clips, last, reason = Counter(), 0, time.monotonic(), ""
    try:
        with opened(path) as file:
            for clip in cut(Part(file, offset, length), tuple(shape), fps, stride, notes):
                if clip or time.monotonic() > last + 1:
                    clips, last = clips + bool(clip), time.monotonic()
                    yield b"".join([CLIP, *clip]) if clip else MORE
        if not clips:
            reason = f"shorter than a clip of {shape[0]} frames at {fps} a second"
    except MemoryError:
        raise
    except Unusable as error:
        reason = str(error)
    except Exception as error:  # FFmpeg and Pillow raise whatever they like
        reason = "unreadable" if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) else DAMAGED
        if clips and reason == DAMAGED:
            notes[LEFT_OUT] += 1
            reason = ""
    yield json.dumps({"unusable": reason, "notes": notes}).encode()


class Damage(Exception):
    pass


class Part:
    """A part of a file, from a byte on, of some length (-1: to the end), to read as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.at = file, offset, 0
        self.length = os.fstat(file.fileno()).st_size - offset if length < 0 else length
        file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.at)
        data = self.file.read(left if size < 0 else min(size, left))
        self.at += len(data)
        return data

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        to += {os.SEEK_CUR: self.at, os.SEEK_END: self.length}.get(whence & 3, 0)
        if to < 0:
            return -1
        self.at = to
        self.file.seek(self.offset + to)
        return to

    def tell(self) -> int:
        return self.at


class Frame(NamedTuple):
    picture: av.VideoFrame
    start: float | None  # seconds
    length: float  # seconds; 0: not known


def cut(file: Part, shape: tuple[int, ...], fps: int, stride: float, notes: Counter) -> Iterator[list[bytes]]:
    """The frames of each clip, as pixels, and an empty list for each frame of the file.  Errors: Unusable, and whatever
    the libraries raise, where a file is damaged."""
    count, height, width = shape[:3]
    every = max(1, round(stride * fps)) if stride else count
    head = file.read(SNIFFED)
    file.seek(0)
    if not head:
        raise Unusable("empty")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":  # which FFmpeg cannot decode where it is animated
        frames, rate, aspect = webp(file), 0, 1
    else:
        stream = video(file, head)
        rate, aspect = float(stream.average_rate or stream.guessed_rate or 0), stream.sample_aspect_ratio or 1
        frames = map(timed, deinterlaced(decoded(stream), notes))
    screen, window = Screen(height, width, float(aspect)), deque(maxlen=count)
    usual = min(max(1 / rate, 0.001), GAP) if rate else 0.04
    last, pixels = None, b""
    for moment, picture in sampled(frames, usual, fps):
        if picture is None:
            yield []
            continue
        if moment == 0:
            window.clear()
        if moment % every < count:
            if picture is not last:
                last, pixels = picture, screen.pixels(picture)
            window.append(pixels)
            if len(window) == count and (moment + 1 - count) % every == 0:
                yield list(window)


def sampled(frames: Iterator[Frame], usual: float, fps: int) -> Iterator[tuple[int, av.VideoFrame | None]]:
    """(number of the moment in its series, what the screen shows then), and (-1, None) for each frame of the file.

    `usual` is the length of a frame, in seconds, where a file does not tell.  Errors: Unusable."""
    shown, now, moment, seen = None, 0.0, 0, 0
    for frame in frames:
        yield -1, None
        if shown is not None:
            step = 0 if None in (frame.start, shown.start) else frame.start - shown.start
            ends = abs(step) > GAP
            now += shown_for(shown, usual) if ends else step if step > 0 else usual
            while moment / fps + ROUNDING < now:
                yield moment, shown.picture
                moment += 1
            if ends:
                now, moment = 0.0, 0
        shown, seen = frame, seen + 1
    if seen < 2:
        raise Unusable("one frame" if seen else "no frames")
    now += shown_for(shown, usual)
    while moment / fps + ROUNDING < now:
        yield moment, shown.picture
        moment += 1


def shown_for(frame: Frame, usual: float) -> float:
    return frame.length if 0 < frame.length <= GAP else usual


# --- files to frames ------------------------------------------------------------------------------------------------


def refuse(*_) -> NoReturn:
    raise Unusable("refers to other files")


def video(file: Part, head: bytes) -> av.video.stream.VideoStream:
    """The first video of a file, ready to decode.  Errors: Unusable."""
    options = {"format_whitelist": FORMATS.replace(" ", ",")}
    try:
        container = av.open(file, "r", options=options, io_open=refuse, metadata_errors="replace", buffer_size=1 << 16)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        kind = foreign(head)
        raise Unusable(DAMAGED if kind == VIDEO or ANIMATION.match(head) else kind or "not a video") from None
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise Unusable("no video stream")
    stream = next((s for s in streams if s.codec_context is not None), None)
    if stream is None:
        raise Unusable("no decoder for its video")
    if stream.codec_context.width * stream.codec_context.height > MOST_PIXELS:
        raise Unusable(f"more than {MOST_PIXELS // 10**6} megapixels")
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # the size may change later
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def decoded(stream) -> Iterator[av.VideoFrame]:
    """The frames from the first that is whole to the first that is not.  Errors: Damage, FFmpegError."""
    whole = failed = False
    with stream.container as container:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if whole or isinstance(error, MemoryError):
                    raise
                failed = True
                continue
            for frame in frames:
                if frame.is_corrupt and whole:
                    raise Damage
                whole = whole or not frame.is_corrupt
                if whole:
                    yield frame
            if packet.is_corrupt and whole:
                raise Damage
    if failed and not whole:
        raise Damage


def deinterlaced(frames: Iterator[av.VideoFrame], notes: Counter) -> Iterator[av.VideoFrame]:
    """From the first interlaced frame on, frames go through a filter, which passes on those that are not."""
    graph, kind = None, None
    for frame in frames:
        if kind != (kind := (frame.width, frame.height, frame.format.name)) and graph is not None:
            yield from pulled(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            notes[DEINTERLACED] = 1
            graph = Graph()
            size = {"width": frame.width, "height": frame.height}
            source = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        if graph is None:
            yield frame
        else:
            yield from pulled(graph, frame)
    if graph is not None:
        yield from pulled(graph, None)


def pulled(graph: Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """What a filter gives for the next frame, or at the end (None)."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def timed(frame: av.VideoFrame) -> Frame:
    return Frame(frame, frame.time, (frame.duration or 0) * float(frame.time_base))


def webp(file: Part) -> Iterator[Frame]:
    """The frames of an animated .webp.  Errors: Unusable, and whatever Pillow raises."""
    if file.length > LARGEST_FILE:  # which Pillow reads whole
        raise Unusable(f"file of more than {LARGEST_FILE >> 20} MiB")
    start = 0.0
    with Image.open(io.BytesIO(file.read()), formats=["WEBP"]) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Unusable(f"more than {MOST_PIXELS // 10**6} megapixels")
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            length = image.info.get("duration", 0) / 1000
            yield Frame(av.VideoFrame.from_ndarray(np.asarray(image.convert("RGBA")), "rgba"), start, length)
            start += length


# --- frames to pixels -----------------------------------------------------------------------------------------------


class Screen:
    """Frames laid on black, as large as they fit, in the middle of (height, width)."""

    def __init__(self, height: int, width: int, aspect: float):
        self.height, self.width, self.aspect = height, width, aspect  # of a pixel of the file, width to height
        self.reformatter = VideoReformatter()

    def pixels(self, frame: av.VideoFrame) -> bytes:
        """H x W x 3 bytes of a frame, in RGB."""
        turns = round(frame.rotation / 90) % 4  # counterclockwise
        frame = self.opaque(frame)
        wide, high = frame.width * self.aspect, frame.height
        width, height = (self.height, self.width) if turns % 2 else (self.width, self.height)
        scale = min(width / wide, height / high)
        size = min(width, max(1, round(wide * scale))), min(height, max(1, round(high * scale)))
        picture = np.rot90(self.convert(frame, *size, "rgb24").to_ndarray(), turns)
        if picture.shape[:2] == (self.height, self.width):
            return picture.tobytes()
        canvas = np.zeros((self.height, self.width, 3), np.uint8)
        top, left = (self.height - picture.shape[0]) // 2, (self.width - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return canvas.tobytes()

    def opaque(self, frame: av.VideoFrame) -> av.VideoFrame:
        """What is transparent is laid on white, as with pictures."""
        if not (frame.format.has_palette or frame.format.components[-1].is_alpha):
            return frame
        pixels = self.convert(frame, frame.width, frame.height, "rgba").to_ndarray()
        if pixels[..., 3].min() < 255:
            white = Image.new("RGBA", (frame.width, frame.height), "white")
            pixels = np.asarray(Image.alpha_composite(white, Image.fromarray(pixels)))
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[..., :3]), "rgb24")

    def convert(self, frame: av.VideoFrame, width: int, height: int, form: str) -> av.VideoFrame:
        """In the colours that a frame says it has, else in those that players take for its size."""
        smaller = width <= frame.width and height <= frame.height
        kind = (Interpolation.AREA if smaller else Interpolation.BICUBIC) | PRECISE
        space = None
        if frame.colorspace == UNKNOWN and not frame.format.is_rgb:
            space = ITU709 if frame.height >= 720 else ITU601
        return self.reformatter.reformat(frame, width, height, form, space, interpolation=kind, threads=1)
