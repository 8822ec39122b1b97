"""Clips to the bytes of an H.264 stream and back, and a reader of those bytes in the standard's words.

A video in H.264 is cut into frames, a frame into macroblocks of 16x16 pixels.  The first frame (IDR) is written by
itself: each block of 4x4 pixels is predicted from its neighbours (intra).  Every other frame (P) may copy: a macroblock
takes the place in one of the last frames that a motion vector points to, or is skipped, which is the same with no
motion.  What the prediction lacks is transformed into coefficients, most of them rounded to zero, and those that are
left are written by CAVLC: how many there are, their signs and levels from the highest frequency down, and the zeros
between them, each as a codeword out of a table that what is known already selects.  With one macroblock a slice, as in
section 3.1 of the paper, nothing is predicted across macroblocks, and each begins on a whole byte, after a start code
and a header: a wrong bit spoils its macroblock and no other, as with JPEG's restart markers.

`Reader` reads like the syntax tables of ITU-T H.264, clause 7.3: a Python generator that asks for a byte, tells before
each where in the syntax it stands, and raises Illegal at the first bit after which no legal stream goes on.  Every
syntax element is a binary tree of its legal codewords.  Clauses and tables are those of the standard.
"""

import contextlib
import io
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np

import cavlc
import grammar
from cavlc import Node
from codec import Codec, Outline
from data.clips import Screen
from grammar import Illegal
from plumbing.child import Child, ChildFailed
from plumbing.command import UserError

# --- the reader -----------------------------------------------------------------------------------------------------

PLACES = [((b & 1) + (b >> 1 & 2), (b >> 1 & 1) + (b >> 2 & 2)) for b in range(16)]  # x, y of 4x4 blocks (6.4.3)


def near(block, width, base):
    """Left and upper neighbours of a 4x4 block among those of its plane, None outside the macroblock."""
    where = PLACES[: width * width]
    x, y = where[block]
    return base + where.index((x - 1, y)) if x else None, base + where.index((x, y - 1)) if y else None


NEAR = [*(near(b, 4, 0) for b in range(16)), *(near(b, 2, base) for base in (16, 20) for b in range(4))]
TABLE = [0, 0, 1, 1, 2, 2, 2, 2] + [3] * 9  # of coeff_token, by nC (9.2.1)


class Place(NamedTuple):
    """Where a slice begins: all that is remembered of what came before."""

    slice: int = 0
    number: int = -1  # frames since the last IDR frame
    idr: int = 1  # idr_pic_id of that frame
    kind: str = ""  # of the frame so far: IDR, P or I


class Reader:
    """Reads a stream of so many macroblocks a frame; a motion vector may point `reach` quarter pixels up or down."""

    def __init__(self, macroblocks: int, frames: int, reach: int, scene_cuts: bool):
        self.macroblocks, self.frames, self.reach, self.scene_cuts = macroblocks, frames, reach, scene_cuts
        self.bits, self.zeros, self.at, self.place, self.settled = [], 0, (0, 0), Place(), False

    def stream(self, place: Place | None) -> Generator[tuple, int, None]:  # B.1.1, 7.3.1
        """Asks for the bytes from the start of a slice on."""
        while place is not None:
            self.place = place  # from here on all can be read again
            place = yield from self.slice(*place)
        self.place = None

    def way(self, place: Place, begun: bytes) -> tuple[bytes, Place | None]:
        """The bytes of a short way to complete a slice, and where the next one begins."""
        return Way(self.macroblocks, self.frames, self.reach, self.scene_cuts).complete(place, begun)

    @staticmethod
    def pieces(data: bytes) -> list[bytes]:
        return units(data)

    def slice(self, index, number, idr, kind):  # 7.3.2.8
        self.at = frame, first = divmod(index, self.macroblocks)
        self.settled = first > 0 or not self.scene_cuts  # else its kind is still open
        if first:
            nals, kinds = (cavlc.IDR if kind == "IDR" else cavlc.OTHER,), (kind,)
        else:
            begun = (b"\0" + cavlc.OTHER, cavlc.IDR) if self.scene_cuts else (b"\0" + cavlc.OTHER,)
            nals = begun if frame else (cavlc.IDR,)
            kinds = ("P", "I") if self.scene_cuts else ("P",)
        self.zeros = 4  # start codes are not escaped
        nal = yield from self.walk(cavlc.start(nals))
        self.zeros = 0
        if not first:
            number, idr, kinds = (0, 1 - idr, ("IDR",)) if nal == cavlc.IDR else (number + 1, idr, kinds)
        kind = yield from self.walk(cavlc.header(kinds, first, number, idr, min(number, cavlc.REFS)))
        yield from self.slice_data(kind, min(number, cavlc.REFS))
        return Place(index + 1, number, idr, kind) if index + 1 < self.macroblocks * self.frames else None

    def walk(self, root, block=0, left=0, more=0):
        """The value of a codeword; asks for bytes without emulation prevention (7.3.1, 7.4.1).

        Yields (node, block, left, more, zeros): block is 0 to 26 in coding order, left the coefficients still to come,
        more the zeros left or the length of a level's suffix, zeros the zero bytes before the next one; 3: an escaping
        03 was read; 4: inside a start code.
        """
        node, bits = root, self.bits
        while type(node) is Node:
            if bits:
                node = node[bits.pop()]
                continue
            byte = yield node, block, left, more, self.zeros
            if self.zeros == 2:
                if byte == 3:
                    byte = yield node, block, left, more, 3
                    if byte > 3:
                        raise Illegal("03 without need")
                elif byte < 3:
                    raise Illegal("three bytes that only a start code may have")
                self.zeros = 0
            if self.zeros < 4:
                self.zeros = self.zeros + 1 if byte == 0 else 0
            node, rest = node.read.get(byte) or node.byte(byte)
            bits = self.bits = rest.copy()
        if node is None:
            raise Illegal(f"no such {root.name}")
        return node

    def slice_data(self, kind, refs):  # 7.3.4
        skipped = kind == "P" and (yield from self.walk(cavlc.SKIP))
        if not skipped:
            yield from self.macroblock("P" if kind == "P" else "I", refs)
        yield from self.walk(cavlc.STOP)
        if any(self.bits):
            raise Illegal("a slice is filled up with zeros")
        self.bits = []

    def macroblock(self, kind, refs):  # 7.3.5
        form, cbp = yield from self.walk(cavlc.mb_type(kind))
        if form == "P":
            yield from self.walk(cavlc.REF_IDX[refs])
            yield from self.walk(cavlc.mvd("mvd_x", *cavlc.MV_X))  # 8.4.1.3: there is none to predict it from
            yield from self.walk(cavlc.mvd("mvd_y", -self.reach, self.reach - 1))
        else:
            if form == "I4x4":
                yield from self.intra_modes()
            yield from self.walk(cavlc.CHROMA_MODE)
        if cbp is None:
            cbp = yield from self.walk(cavlc.CBP["inter" if form == "P" else "intra"])
        if cbp or form == "I16x16":
            yield from self.walk(cavlc.QP_DELTA)
            yield from self.residual(form == "I16x16", cbp)

    def intra_modes(self):  # 7.3.5.1
        modes = []
        for block in range(16):
            left, above = NEAR[block]
            predicted = 2 if None in (left, above) else min(modes[left], modes[above])
            mode = yield from self.walk(cavlc.intra_mode(predicted, left is not None, above is not None), block)
            modes.append(mode)

    def residual(self, apart, cbp):  # 7.3.5.3; apart: DC of the luma blocks come first, by themselves
        totals = [0] * 24

        def table(block):  # 9.2.1: by the mean of what both neighbours have
            known = [totals[other] for other in NEAR[block] if other is not None]
            return TABLE[sum(known) + len(known) // 2 >> len(known) // 2]

        if apart:
            yield from self.block(0, 0, 16)
        for block in range(16):
            if cbp >> (block >> 2) & 1:
                totals[block] = yield from self.block(1 + block, table(block), 15 if apart else 16)
        for plane in range(2 * (cbp > 15)):
            yield from self.block(17 + plane, 4, 4)
        for block in range(16, 16 + 8 * (cbp > 31)):
            totals[block] = yield from self.block(3 + block, table(block), 15)

    def block(self, block, table, most):  # 7.3.5.3.2: how many coefficients
        total, ones = yield from self.walk(cavlc.coeff_token(table, most), block)
        if not total:
            return 0
        if ones:
            yield from self.walk(cavlc.SIGNS[ones], block, total)
        size = int(total > 10 and ones < 3)
        for i in range(ones, total):  # 9.2.2
            prefix = yield from self.walk(cavlc.PREFIX, block, total - i, size)
            code, bits = min(prefix, 15) << size, 12 if prefix == 15 else 4 if prefix == 14 and not size else size
            if bits:
                code += yield from self.walk(cavlc.SUFFIX[bits], block, total - i, size)
            code += 15 * (prefix == 15 and not size) + 2 * (i == ones < 3)
            level = code // 2 + 1  # its absolute value
            size = size or 1
            if level > 3 << size - 1 and size < 6:
                size += 1
        zeros = (yield from self.walk(cavlc.total_zeros(total, most), block, total)) if total < most else 0
        for i in range(total - 1):  # 9.2.3
            if not zeros:
                break
            zeros -= yield from self.walk(cavlc.run_before(zeros), block, total - 1 - i, zeros)
        return total


class Way(Reader):
    """A reader that is given no bytes: it takes the bits that it has, then those that lead to the nearest end."""

    def walk(self, root, *where):
        node = root
        while type(node) is Node:
            bit = self.given.pop() if self.given else node.near
            self.taken.append(bit)
            node = node[bit]
        return node
        yield

    def complete(self, place: Place, begun: bytes) -> tuple[bytes, Place | None]:
        head = begun.find(1) + 1 or len(begun)
        plain = begun[:head] + re.sub(rb"\x00\x00\x03", b"\0\0", begun[head:])
        self.given, self.taken = [byte >> shift & 1 for byte in plain[::-1] for shift in range(8)], []
        try:
            next(self.slice(*place))
        except StopIteration as end:
            after = end.value
        size = -(-len(self.taken) // 8)
        data = int("".join(map(str, self.taken)).ljust(8 * size, "0"), 2).to_bytes(size)
        head = data.index(1) + 1
        data = data[:head] + re.sub(rb"\x00\x00(?=[\x00-\x03])", b"\0\0\3", data[head:])
        assert data.startswith(begun), (begun.hex(), data.hex())
        return data[len(begun) :], after


KINDS = {  # what a stream is made of, and the syntax elements of each by what their names begin with
    "start code": ("start code",),
    "header": ("slice_header",),
    "macroblock type": ("mb_", "coded_block_pattern", "intra_chroma"),
    "prediction": ("ref_idx", "mvd", "intra4x4"),
    "places of coefficients": ("coeff_token", "total_zeros", "run_before"),
    "values of coefficients": ("trailing_ones", "level"),
    "padding": ("rbsp",),
}


class Noted(Reader):
    """A reader that notes the bits at which each syntax element begins and ends, its kind and its macroblock."""

    def __init__(self, *settings: object):
        super().__init__(*settings)
        self.read, self.begun, self.notes = 0, 0, []  # bytes; bits; (begin, end, kind, macroblock)

    def walk(self, root, *where):
        value = yield from super().walk(root, *where)
        end = 8 * self.read - len(self.bits) * (root is not cavlc.STOP)  # zeros follow it to the end of the byte
        if end > self.begun:
            kind = next(i for i, names in enumerate(KINDS.values()) if root.name.startswith(names))
            self.notes.append((self.begun, end, kind, self.at[0] * self.macroblocks + self.at[1]))
            self.begun = end
        return value


# --- the codec ------------------------------------------------------------------------------------------------------

X264 = {  # section 3.1 of the paper: as plain a stream as the encoder writes
    "bframes": 0, "ref": cavlc.REFS, "trellis": 0, "me": "dia", "subme": 0, "psy": 0, "mixed-refs": 0, "fast-pskip": 0,
    "slice-max-mbs": 1, "threads": 1, "sliced-threads": 0, "partitions": "none", "cabac": 0, "8x8dct": 0, "annexb": 1,
    "colormatrix": "smpte170m",
}  # fmt: skip
SLICES = 1, 5  # NAL unit types: a slice, and one of an IDR frame (table 7-1); 7 and 8 are the parameter sets


@dataclass(frozen=True)
class H264(Codec):
    """Clips as in section 3.1 of the paper: baseline profile, constant quantizer, one macroblock a slice, no B-frames.

    The sequence is a byte stream (annex B) without parameter sets, which are the same in every clip and put back for
    the viewer, and without SEI.  Without `scene_cuts`, which is ours, the first frame alone is intra; with them x264
    may begin anew where the picture changes, as in the paper.  FFmpeg keeps accounts of 32 slices a frame: of frames
    with more macroblocks it says so, and may smooth the edges between them otherwise than the encoder did.
    """

    width: int = 64  # pixels
    height: int = 48  # pixels
    frames: int = 15  # of a clip
    fps: int = 3  # frames a second
    qp: int = 37  # quantizer: 6 more double its step
    scene_cuts: bool = False  # let the encoder begin anew within a clip
    stride: float = 0.0  # seconds from one clip of a file to the next; 0: they lie end to end

    name, suffix, part, symbols, vocab, kinds = "h264", ".mp4", "frames", 256, 1024, tuple(KINDS)

    def __post_init__(self) -> None:
        for name, least, most, step in (("width", 16, 1024, 2), ("height", 16, 1024, 2), ("frames", 1, 250, 1)):
            if not (least <= (value := getattr(self, name)) <= most and value % step == 0):
                raise UserError(f"{name} is {value}: choose {least} to {most}{', even' * (step - 1)}")
        if not (1 <= self.fps <= 120 and 20 <= self.qp <= 51):
            raise UserError(f"fps is {self.fps} and qp {self.qp}: choose 1 to 120 and 20 to 51")
        if not 0 <= self.stride <= 3600:
            raise UserError(f"stride is {self.stride}: choose 0 to 3600 seconds")

    shape = property(lambda self: (self.frames, self.height, self.width, 3))
    parts = property(lambda self: self.frames)
    units = property(lambda self: (self.frames, -(-self.height // 16), -(-self.width // 16)))  # macroblocks
    macroblocks = property(lambda self: self.units[1] * self.units[2])  # of a frame

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape == self.shape and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        return np.frombuffer(b"".join(unit for unit in units(self._write(pixels)) if kind_of(unit) in SLICES), np.uint8)

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """What is missing is as in the frame before (grey in the first), by FFmpeg's concealment; what is too much is
        left out.  Streams that `check` refuses are read by a process of its own."""
        if self.check(symbols) is None:
            return self.complete(self.read(bytes(symbols)))
        request = json.dumps(self.settings).encode() + b"\n" + bytes(symbols)
        try:
            found = b"".join(decoder().ask(request))
        except ChildFailed:
            found = b""
        return self.complete(np.frombuffer(found, np.uint8).reshape(-1, *self.shape[1:]))

    def read(self, data: bytes) -> np.ndarray:
        """The frames (n, H, W, 3) that FFmpeg finds in a sequence, n at most `frames`."""
        context, screen, found = av.CodecContext.create("h264", "r"), Screen(self.height, self.width, 1.0), []
        context.thread_count, context.extradata = 1, self.parameter_sets
        context.flags |= av.codec.context.Flags.output_corrupt
        for packet in [*map(av.Packet, self.access_units(data)), None]:
            with contextlib.suppress(av.FFmpegError):
                found += map(screen.pixels, context.decode(packet))
        return np.frombuffer(b"".join(found[: self.frames]), np.uint8).reshape(-1, *self.shape[1:])

    def complete(self, frames: np.ndarray) -> np.ndarray:
        """Exactly as many frames as the clip has: the last one stays."""
        last = frames[-1:] if len(frames) else np.full((1, *self.shape[1:]), 128, np.uint8)
        return np.concatenate([frames, *[last] * (self.frames - len(frames))])

    def access_units(self, data: bytes) -> list[bytes]:
        """The slices of each frame (7.4.1.2.4); whatever else there may be is left out."""
        found = []
        for unit in units(data):
            if kind_of(unit) in SLICES:
                if not found or unit[unit.index(1) + 2 :][:1] >= b"\x80":  # macroblock 0
                    found.append(b"")
                found[-1] += unit
        return found

    def file(self, symbols: np.ndarray) -> bytes:
        """An .mp4 that holds the very slices."""
        out, unit = io.BytesIO(), Fraction(1, self.fps)
        with av.open(io.BytesIO(self.blank), format="h264") as like, av.open(out, "w", format="mp4") as container:
            stream = container.add_stream_from_template(like.streams.video[0])
            for number, data in enumerate(self.access_units(bytes(symbols)) or [cavlc.IDR]):
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.pts, packet.dts = stream, unit, number, number
                packet.duration, packet.is_keyframe = 1, number == 0
                container.mux(packet)
        return out.getvalue()

    def check(self, symbols: np.ndarray) -> str | None:
        """Valid is what the encoder may write with these settings: the reader's syntax, to the last bit.

        That is stricter than FFmpeg, which passes over a wrong start code, header or trailing bit that does no harm,
        conceals slices that are missing, and knows what x264 never writes here.  It is nowhere more lenient.
        """
        data, reader = bytes(symbols), self.reader()
        stream = reader.stream(Place())
        next(stream)
        for at, byte in enumerate(data):
            try:
                stream.send(byte)
            except StopIteration:
                return None if at == len(data) - 1 else f"byte {at + 1}: after the last frame"
            except Illegal as error:
                return f"byte {at}: frame {reader.at[0]}, macroblock {reader.at[1]}: {error}"
        return f"byte {len(data)}: the end, in frame {reader.at[0]}, macroblock {reader.at[1]}"

    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray:
        count = round(self.kept(keep) * self.parts) * self.macroblocks
        return symbols[: sum(map(len, units(bytes(symbols))[:count]))]

    def grammar(self) -> grammar.Readers:
        # node (0: the end), block, coefficients left, zeros left or length of a suffix, zero bytes, frame, macroblock
        sizes = (len(cavlc.NODES) + 1, 27, 17, 17, 5, self.frames, self.macroblocks)
        return grammar.Readers(self.reader, sizes)

    def outline(self, symbols: np.ndarray) -> Outline:
        data, reader = bytes(symbols), self.reader(Noted)
        stream = reader.stream(Place())
        next(stream)
        with contextlib.suppress(Illegal, StopIteration):
            for reader.read, byte in enumerate(data, 1):
                stream.send(byte)
        kinds, units = (np.full(8 * len(data), -1) for _ in range(2))
        for begin, end, kind, unit in reader.notes:
            kinds[begin:end], units[begin:end] = kind, unit
        return Outline(kinds.reshape(-1, 8), units.reshape(-1, 8))

    def reader(self, kind: type[Reader] = Reader) -> Reader:
        level = self.parameter_sets[self.parameter_sets.index(b"\x67") + 3]
        return kind(self.macroblocks, self.frames, cavlc.MV_Y[level], self.scene_cuts)

    @cached_property
    def blank(self) -> bytes:
        """A stream of one black frame, as the encoder writes it: with all that is left out of a sequence."""
        return self._write(np.zeros(self.shape, np.uint8)[:1])

    @cached_property
    def parameter_sets(self) -> bytes:
        """SPS and PPS (7.3.2.1, 7.3.2.2), the same in every stream of these settings."""
        return b"".join(unit for unit in units(self.blank) if kind_of(unit) in (7, 8))

    @property
    def encoder(self) -> str:
        named = re.search(rb"x264 - core \d+", self.blank)
        return f"PyAV {av.__version__} with {named[0].decode() if named else 'an unknown x264'}"

    def _write(self, pixels: np.ndarray) -> bytes:
        context = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        context.framerate, context.time_base, context.thread_count = self.fps, Fraction(1, self.fps), 1
        settings = {**X264, "qp": self.qp} | ({} if self.scene_cuts else {"scenecut": 0})
        text = ":".join(f"{name}={value}" for name, value in settings.items())
        context.options = {"preset": "medium", "profile": "baseline", "x264-params": text}
        frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pixels]
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, context.time_base
        return b"".join(bytes(packet) for frame in [*frames, None] for packet in context.encode(frame))


def units(data: bytes) -> list[bytes]:
    """A byte stream cut before each start code (B.1.1); a zero before it belongs to it."""
    starts = [found.start() for found in re.finditer(rb"\x00?\x00\x00\x01", data)]
    return [data[start:end] for start, end in pairwise([*starts, len(data)])]


def kind_of(unit: bytes) -> int:
    """nal_unit_type (7.3.1), -1 where there is none."""
    return unit[at] & 31 if (at := unit.index(1) + 1) < len(unit) else -1


def answers(request: bytes) -> Iterator[bytes]:
    """What the process of `decode` does."""
    settings, data = request.split(b"\n", 1)
    yield H264(**json.loads(settings)).read(data).tobytes()


@cache
def decoder() -> Child:
    return Child("h264")
