"""Pixels to the bytes of a file to tokens, and back: what the model reads and writes.

An image is already a sequence of symbols: its file.  Han et al. 2024, JPEG-LM (arXiv:2408.08459), train a language
model on just those bytes.  Two steps, of which the second is undone exactly, the first as far as JPEG allows:

    pixels (H, W, 3) uint8    a canonical codec: the same pixels always give the same file
      symbols (n,) uint8      its bytes, without those that are the same in every file
        tokens (m,) uint16    frequent pairs of bytes as one token, between a start and an end

JPEG is ITU-T T.81; clause numbers below are its own.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL
from PIL import Image, features

from plumbing.command import UserError

SOI, EOI, DHT = b"\xff\xd8", b"\xff\xd9", 0xC4  # start of image, end of image, Huffman tables (table B.1)


class Codec(Protocol):
    """What train.py and sample.py ask of a codec: a frozen dataclass whose fields are its settings, with these
    beside."""

    name: str  # in codec.json and of --codec
    vocab: int  # symbols are below this
    suffix: str  # of the files it writes

    def encode(self, pixels: np.ndarray) -> np.ndarray: ...  # the same pixels, the same symbols
    def decode(self, symbols: np.ndarray) -> np.ndarray: ...  # any symbols give pixels of the right size
    def file(self, symbols: np.ndarray) -> bytes: ...  # the symbols as a file that any viewer opens
    def check(self, symbols: np.ndarray) -> str | None: ...  # None for a whole valid file, else what is wrong where
    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray: ...  # the symbols of the top part of the picture
    def grammar(self) -> "Grammar": ...  # which symbols may follow which


# --- JPEG -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JPEG:
    """Baseline JPEG without its tables, as in section 3.1 of the paper.

    The quantization and Huffman tables are the same in every file of one quality, so they are left out and put back
    for the viewer.  A restart marker after every minimum coded unit (MCU, 16x16 pixels at 4:2:0) resets the decoder:
    a wrong byte spoils its MCU and no other.  With `header` the sequence is the file from SOI to EOI, as in the
    paper; without, only the entropy-coded data between the constant header and EOI.
    """

    size: int = 64  # pixels, both ways
    quality: int = 25  # of libjpeg, 1 to 100
    subsampling: str = "4:2:0"  # of the colours: 4:2:0 halves them both ways, 4:4:4 keeps them
    restart: int = 1  # MCUs from one restart marker to the next; 0: no markers
    header: bool = False  # keep the constant header, SOI and EOI in the sequence

    name, vocab, suffix = "jpeg", 256, ".jpg"

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise UserError(f"size is {self.size}: choose 16 to 1024 pixels")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}: choose 1 to 100")
        if self.subsampling not in SCALE:
            raise UserError(f"subsampling is {self.subsampling!r}: choose one of {', '.join(SCALE)}")
        if not 0 <= self.restart <= 65535:
            raise UserError(f"restart is {self.restart}: choose 0 (no markers) to 65535 MCUs")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (size, size, 3) uint8 to symbols (n,) uint8."""
        assert pixels.shape == (self.size, self.size, 3) and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        data = self._write(pixels, streamtype=2)
        return np.frombuffer(data if self.header else data[len(self.frame) : -len(EOI)], np.uint8)

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """Any symbols to pixels (size, size, 3) uint8; what cannot be read is grey, what is too much is left out."""
        with Image.open(io.BytesIO(self.file(symbols))) as image:
            return np.asarray(image.convert("RGB"))

    def file(self, symbols: np.ndarray) -> bytes:
        """The symbols as they are, with the tables and what else was left out put back: a file that any viewer opens.

        Only markers that have no place in a scan are dropped, for libjpeg would obey them, or give up.
        """
        data = bytes(np.asarray(symbols, np.uint8))
        scan = data[len(self.frame) :].removesuffix(EOI) if self.header else data
        scan = re.sub(rb"\xff+[^\x00\xd0-\xd7\xff]", b"", scan)
        return SOI + self.tables + self.frame[len(SOI) :] + scan + EOI

    def check(self, symbols: np.ndarray) -> str | None:
        """None for a whole valid file, else a sentence saying what is wrong where.

        Valid is what T.81 allows: every code is in the Huffman tables, no block has more than 64 coefficients, every
        FF is stuffed (F.1.2.3), bytes are filled up with ones, restart markers count modulo 8 (E.1.4), and there are
        exactly the MCUs that the frame needs.  Offsets count the bytes of the sequence.
        """
        data, at = bytes(symbols), 0
        if self.header:
            at = len(self.frame)
            if data[:at] != self.frame:
                wrong = next((i for i, (a, b) in enumerate(zip(data, self.frame, strict=False)) if a != b), len(data))
                return f"byte {wrong}: not the header of a {self.size}x{self.size} {self.subsampling} file"
        steps, end, width = scan_automaton(self.subsampling)
        last = self.restart or self.mcus
        for first in range(0, self.mcus, last):
            mcu, until, state = first, min(first + last, self.mcus), 0
            if first:
                marker = bytes([0xFF, 0xD0 + (first // last - 1) % 8])
                if data[at : at + 2] != marker:
                    there = data[at : at + 2].hex() or "the end"
                    return f"byte {at}: {there} where restart marker {marker.hex()} is due"
                at += 2
            while mcu < until:
                if at == len(data):
                    return f"byte {at}: the data end in MCU {mcu} of {self.mcus}"
                byte = data[at]
                for shift in range(7, -1, -1):
                    if mcu == until:
                        if not byte >> shift & 1:
                            return f"byte {at}: MCU {mcu - 1} is not filled up with ones"
                        continue
                    following = steps[2 * state + (byte >> shift & 1)]
                    if following < 0:
                        block, coefficient = divmod(state // width, 65)
                        return f"byte {at}: no such code in MCU {mcu}, block {block}, coefficient {coefficient}"
                    state = following
                    if state == end:
                        mcu, state = mcu + 1, 0
                at += 1
                if byte == 0xFF:
                    if data[at : at + 1] != b"\0":
                        return f"byte {at}: marker ff{data[at : at + 1].hex()} inside MCU {mcu}"
                    at += 1
        rest = data[at:]
        if rest != (EOI if self.header else b""):
            return f"byte {at}: {rest[:2].hex() or 'nothing'} after the last MCU"
        return None

    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray:
        """The symbols of the top `keep` of the picture, in whole rows of MCUs, up to and with the restart marker
        after them."""
        rows = round(keep * self.rows)
        if self.restart != 1:
            raise UserError(f"restart is {self.restart}: only a restart marker after every MCU tells where a row ends")
        if not 0 <= rows < self.rows:
            raise UserError(f"keep is {keep}: choose from 0 to below 1, in steps of 1/{self.rows} (rows of MCUs)")
        data, start = bytes(symbols), len(self.frame) if self.header else 0
        markers = [match.end() for match in re.finditer(rb"\xff[\xd0-\xd7]", data[start:])]
        return symbols[: start + markers[rows * self.rows - 1]] if rows else symbols[:start]

    def grammar(self) -> "Grammar":
        """Only with a restart marker after every MCU does each begin on a byte, with nothing remembered; else all is
        allowed."""
        return scan_grammar(self) if self.restart == 1 else no_grammar(self.vocab)

    @property
    def rows(self) -> int:
        """Rows of MCUs, and MCUs in a row."""
        return -(-self.size // (8 * SCALE[self.subsampling]))

    @property
    def mcus(self) -> int:
        return self.rows**2

    @cached_property
    def tables(self) -> bytes:
        """The segments that `streamtype=1` writes (DQT, DHT), which are left out of the sequence (B.5, abbreviated
        format)."""
        return self._write(np.zeros((self.size, self.size, 3), np.uint8), streamtype=1)[len(SOI) : -len(EOI)]

    @cached_property
    def frame(self) -> bytes:
        """The constant beginning of every file of these settings: SOI, APP0, SOF0, DRI, SOS."""
        data = self._write(np.zeros((self.size, self.size, 3), np.uint8), streamtype=2)
        scan = data.index(b"\xff\xda")
        return data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])]

    def _write(self, pixels: np.ndarray, streamtype: int) -> bytes:
        out = io.BytesIO()
        markers = {"restart_marker_blocks": self.restart} if self.restart else {}
        settings = {"quality": self.quality, "subsampling": self.subsampling, "streamtype": streamtype}
        Image.fromarray(pixels).save(out, "JPEG", **settings, **markers)
        return out.getvalue()


SCALE = {"4:2:0": 2, "4:4:4": 1}  # an MCU is so many 8x8 blocks of Y wide and high, then one of Cb, one of Cr (A.2.3)


@cache
def huffman_trees() -> dict[tuple[int, int], list[list[int | None]]]:
    """The Huffman trees of the DHT segments that the encoder writes (B.2.4.2), by (class, identifier): DC 0 or AC 1,
    luma 0 or chroma 1.

    A tree is a list of nodes; a node's two entries, one per bit, are the next node's index, -1 - value at a leaf, or
    None.
    """
    tables, at, trees = JPEG().tables, 0, {}
    while at < len(tables):
        marker, length = tables[at + 1], int.from_bytes(tables[at + 2 : at + 4])
        segment, at = tables[at + 4 : at + 2 + length], at + 2 + length
        while marker == DHT and segment:
            key, counts = (segment[0] >> 4, segment[0] & 15), segment[1:17]
            values, segment = segment[17 : 17 + sum(counts)], segment[17 + sum(counts) :]
            nodes, code, value = [[None, None]], 0, iter(values)
            for length_of_code, count in enumerate(counts, 1):  # codes of one length count upwards (C.2)
                for _ in range(count):
                    node = 0
                    for shift in range(length_of_code - 1, 0, -1):
                        bit = code >> shift & 1
                        if nodes[node][bit] is None:
                            nodes[node][bit] = len(nodes)
                            nodes.append([None, None])
                        node = nodes[node][bit]
                    nodes[node][code & 1] = -1 - next(value)
                    code += 1
                code <<= 1
            trees[key] = nodes
    return trees


@cache
def scan_automaton(subsampling: str):
    """What may follow, bit by bit, inside an MCU: (steps, end, width).

    A state is (block of the MCU, index of the coefficient in zigzag order, node of the Huffman tree or extra bits
    left), which is all that the reader of a baseline scan remembers (F.2.2).  `steps[2 * state + bit]` is the next
    state: `end` after the last bit of the MCU, -1 where the bit is not allowed.  State 0 begins an MCU,
    state (block * 65 + coefficient) * width the code of a coefficient.
    """
    trees, luma = huffman_trees(), SCALE[subsampling] ** 2
    nodes = max(map(len, trees.values()))
    width = nodes + 11  # then 1 to 11 extra bits left
    end = (luma + 2) * 65 * width
    steps = [-1] * (2 * end)

    def reach(block: int, coefficient: int, extra: int) -> int:
        if extra:
            return (block * 65 + coefficient) * width + nodes + extra - 1
        return (block * 65 + coefficient) * width if coefficient < 64 else (block + 1) * 65 * width

    for block in range(luma + 2):
        for coefficient in range(65):
            state = (block * 65 + coefficient) * width
            for extra in range(1, 12):
                at = 2 * (state + nodes + extra - 1)
                steps[at : at + 2] = [reach(block, coefficient, extra - 1)] * 2
            for node, bits in enumerate(trees[coefficient > 0, block >= luma] if coefficient < 64 else []):
                for bit, child in enumerate(bits):
                    if child is None:
                        continue
                    following = state + child
                    if child < 0:
                        run, extra = divmod(-1 - child, 16)  # zeros before it, bits of its value (F.1.2.2.1)
                        last = coefficient and (run, extra) == (0, 0)  # end of block
                        after = 64 if last else coefficient + run + 1
                        fits = after < 64 or after == 64 and (run, extra) != (15, 0)  # 16 zeros are followed by more
                        following = reach(block, after, extra) if fits else -1
                    steps[2 * (state + node) + bit] = following

    return steps, end, width


# --- the grammar: which tokens may come next ------------------------------------------------------------------------

LOCAL, ANY, NEVER = 0xFFFFF, 8 << 26, 15 << 26  # parts of an entry of Grammar.table


@dataclass(frozen=True, eq=False)
class Grammar:
    """A finite automaton that reads a file token by token and knows, before each, what may follow and where it stands.

    A state is one number, mcu * len(table) + local: how many MCUs are over, and where the reader is in this one.  The
    last three local states are the same for all: `marker`, after the FF that follows an MCU; then after EOI; then
    after the end.  The arrays are numpy's, or tensors on any device, for all is arithmetic and indexing, and any
    number of files go side by side.
    """

    table: np.ndarray  # (locals, vocab) int32: local state after a token | MCUs that end in it << 20 | phase << 26,
    # which is what the number of MCUs must be modulo 8 for its restart markers; 8: any will do, 15: none
    away: np.ndarray  # (locals,) int32: bytes to the end of the file, if this is the last MCU
    syntax: np.ndarray  # (locals, F) int64: where a local state is, as F small numbers,
    places: np.ndarray  # (MCUs + 1, F) int64: to which an MCU adds its place in the picture
    positions: tuple[int, ...] = ()  # the F numbers are below these
    first: int = 0  # state after the start
    mcus: int = 1
    header: bool = False
    closing: int = 0  # local state that the end may follow
    shortest: int = 0  # bytes of an MCU with the marker before it, at least

    def rest(self, mcu, local):
        """Tokens of the shortest way to the end of the file."""
        return self.away[local] + (self.mcus - 1 - mcu) * self.shortest

    def judge(self, entry, mcu, left: int):
        """Whether the table's entries are allowed at an MCU: restart markers count on, the picture has so many MCUs,
        and the rest of the file fits in `left` tokens."""
        phase, local, after = entry >> 26, entry & LOCAL, mcu + (entry >> 20 & 63)
        marker, last = len(self.table) - 3, self.mcus - 1 + self.header  # EOI begins like one more restart marker
        return (
            ((phase == 8) | (phase == mcu % 8))
            & (after <= self.mcus - 1 + self.header * (local >= marker))
            & ((after == last) | (local <= marker))
            & (self.rest(after, local) <= left)
        )

    def legal(self, state, left: int = 1 << 30):
        """Which tokens (..., vocab) may follow states (...), such that `left` more suffice to end the file."""
        size = len(self.table)
        return self.judge(self.table[state % size], (state // size)[..., None], left)

    def advance(self, state, token):
        """The states (...) after tokens (...), and whether they were allowed; what is not changes nothing."""
        size = len(self.table)
        mcu, entry = state // size, self.table[state % size, token]
        allowed = self.judge(entry, mcu, 1 << 30)
        after = (mcu + (entry >> 20 & 63)) * size + (entry & LOCAL)
        return state + (after - state) * allowed, allowed

    def position(self, state):
        """What the reader knows of its place, as F small numbers (..., F): see `scan_grammar`."""
        size = len(self.table)
        return self.syntax[state % size] + self.places[state // size]

    def walk(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The states (B, T) after every token of documents that begin with a start, and whether it was allowed.

        What is allowed is judged at once at the end; only where something is not, each step is taken by `advance`.
        """
        entries, allowed = np.full(tokens.shape, self.first, np.int32), np.ones(tokens.shape, bool)
        for t in range(1, tokens.shape[1]):
            entries[:, t] = self.table[entries[:, t - 1] & LOCAL, tokens[:, t]]
        mcus = (entries >> 20 & 63).cumsum(1, dtype=np.int64)
        states = mcus * len(self.table) + (entries & LOCAL)
        allowed[:, 1:] = self.judge(entries[:, 1:], mcus[:, :-1], 1 << 30)
        if allowed.all():
            return states, allowed
        for t in range(1, tokens.shape[1]):
            states[:, t], allowed[:, t] = self.advance(states[:, t - 1], tokens[:, t])
        return states, allowed


def no_grammar(vocab: int) -> Grammar:
    """All symbols in any order, and no positions."""
    table = np.array([[ANY] * vocab] + [[NEVER] * vocab] * 2, np.int32)
    return Grammar(table, np.zeros(3, np.int32), np.zeros((3, 0), np.int64), np.zeros((2, 0), np.int64))


def scan_grammar(codec: JPEG) -> Grammar:
    """Over bytes: the bits of `scan_automaton` eight at a time; around them header, stuffing, padding and markers.

    Local states are those of the bit automaton, those that wait for the 00 after an FF, the header's, the end of an
    MCU, and the three of `Grammar`.  Positions are five: the block, the coefficient, the node of which Huffman tree or
    the extra bits left, the row and the column of the MCU.
    """
    steps, end, width = scan_automaton(codec.subsampling)
    bits = np.array([*steps, -1, end, -1, -1], np.int32).reshape(-1, 2)  # after the end only ones, after -1 nothing
    following = np.arange(end, dtype=np.int32)[:, None]
    for _ in range(8):
        following = bits[following].reshape(end, -1)
    stuffed, which = np.unique(following[:, 0xFF], return_inverse=True)
    header = codec.frame if codec.header else b""
    in_header = end + len(stuffed)
    over = in_header + len(header)
    marker, eoi, ended = over + 1, over + 2, over + 3

    table = np.full((over + 4, codec.vocab), NEVER, np.int32)
    table[:end] = np.where(following < 0, NEVER, np.where(following == end, over, following) | ANY)
    table[end:in_header, 0] = np.where(stuffed < 0, NEVER, np.where(stuffed == end, over, stuffed) | ANY)
    table[:end, 0xFF] = np.where(following[:, 0xFF] < 0, NEVER, end + which | ANY)
    for i, byte in enumerate(header):
        table[in_header + i, byte] = (in_header + i + 1 if i + 1 < len(header) else 0) | ANY
    table[over, 0xFF] = marker | 1 << 20 | ANY
    table[marker, 0xD0:0xD8] = np.arange(1, 9) % 8 << 26  # number n - 1 stands before MCU n (E.1.4)
    if header:
        table[marker, EOI[1]] = eoi | ANY

    far = 1 << 20
    away = np.full(len(table), far, np.int32)  # to the end of the MCU: a fixed point, reached in a few rounds
    away[over] = 0
    while True:
        nearer = np.minimum(away, 1 + np.where(table < NEVER, away[table & LOCAL], far).min(1))
        if (nearer == away).all():
            break
        away = nearer
    shortest = int(2 + away[0])
    away[eoi] = away[ended] = shortest  # these are met when one MCU more is over than there are
    table[(table < NEVER) & (away == far)[table & LOCAL]] = NEVER  # no way leads out of there
    away += 2 * bool(header) + 1
    away[eoi], away[ended] = shortest + 1, shortest if header else 0

    syntax, places, positions = scan_positions(codec, end, width, stuffed.clip(0), len(header))
    first, closing = (in_header, eoi) if header else (0, over)
    return Grammar(table, away, syntax, places, positions, first, codec.mcus, codec.header, closing, shortest)


def scan_positions(codec: JPEG, end: int, width: int, stuffed: np.ndarray, header: int) -> tuple:
    """Where each local state of `scan_grammar` is, where each MCU is, and how many values the five numbers have.

    Trees share no nodes, so that a number says which of them is read.  Before a stuffed 00 it says just that, in the
    header how far it is read; what follows the MCUs has blocks of its own.
    """
    blocks = end // (65 * width)
    inside = np.concatenate([np.arange(end), stuffed])
    block, coefficient, node = inside // (65 * width), inside // width % 65, inside % width
    tree = 2 * (coefficient > 0) + (block >= blocks - 2)
    node = np.where(np.arange(len(inside)) < end, tree * width + node, 4 * width)
    syntax = np.zeros((len(inside) + header + 4, 5), np.int64)
    syntax[: len(inside), :3] = np.stack([block, coefficient, node], 1)
    syntax[len(inside) :, 0] = [*[blocks] * header, *range(blocks + 1, blocks + 5)]
    syntax[len(inside) : len(inside) + header, 2] = np.arange(header)
    places = np.zeros((codec.mcus + 1, 5), np.int64)  # when all MCUs are over, EOI may still come
    places[:, 3], places[:, 4] = np.divmod(np.minimum(np.arange(codec.mcus + 1), codec.mcus - 1), codec.rows)
    return syntax, places, (blocks + 5, 65, 4 * width + 1, codec.rows, codec.rows)


# --- byte pairs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizer:
    """Symbols as the model reads them: below `codec.vocab` a token is a symbol, then come the learned pairs, start
    and end.

    Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): merge i replaces every two neighbours `merges[i]`,
    from left to right, by token `codec.vocab + i`, merges in the order in which they were learned.
    """

    codec: Codec
    merges: tuple[tuple[int, int], ...] = ()

    @property
    def start(self) -> int:
        return self.codec.vocab + len(self.merges)

    @property
    def end(self) -> int:
        return self.start + 1

    @property
    def vocab(self) -> int:
        return self.start + 2

    def encode(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Documents of symbols to one stream (n,) uint16 of start, tokens, end, start, ... and the length of each.

        The stream is turned into a string with a character for each token, for then a merge is a search and replace
        at the speed of C, over many documents at once (split and join is a third faster than `str.replace`).  No
        merge reaches across documents, since none holds a start or an end.
        """
        text = "".join(f"{chr(self.start)}{to_text(document)}{chr(self.end)}" for document in documents)
        for token, (left, right) in enumerate(self.merges, self.codec.vocab):
            text = chr(token).join(text.split(chr(left) + chr(right)))
        stream = from_text(text)
        return stream, np.diff(np.flatnonzero(stream == self.start), append=len(stream))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The symbols of one document's tokens, up to its end if it has one."""
        ends = np.flatnonzero(tokens == self.end)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        known = [self.expansions[token] for token in tokens.tolist() if token < self.start]
        return np.concatenate([np.empty(0, self.dtype), *known])

    @cached_property
    def grammar(self) -> Grammar:
        """The codec's, over tokens: what a pair does is what its right half does after its left half."""
        grammar = self.codec.grammar()
        table = np.full((self.vocab, len(grammar.table)), NEVER, np.int32)
        table[: self.codec.vocab] = grammar.table.T
        for token, (left, right) in enumerate(self.merges, self.codec.vocab):
            one = table[left]
            two = table[right, one & LOCAL]
            mcus, phase = (one >> 20 & 63) + (two >> 20 & 63), two >> 26
            assert mcus.max() < 64, f"token {token} holds more than 63 restart markers"
            phase = np.where(phase < 8, (phase - (one >> 20 & 63)) % 8, phase)  # as seen from before the left half
            phase = np.where(one >> 26 == 8, phase, np.where((two >> 26 == 8) | (phase == one >> 26), one >> 26, 15))
            table[token] = np.where(phase == 15, NEVER, phase << 26 | mcus << 20 | two & LOCAL)
        ended = table.shape[1] - 1
        table[self.end, [grammar.closing, ended]] = ended | ANY
        return replace(grammar, table=np.ascontiguousarray(table.T))

    @property
    def hash(self) -> str:
        """Short, of all that gives a token its meaning."""
        return hashlib.sha256(repr((self.codec, self.merges)).encode()).hexdigest()[:16]

    @property
    def dtype(self) -> type:
        return np.uint8 if self.codec.vocab <= 256 else np.uint16

    @cached_property
    def expansions(self) -> list[np.ndarray]:
        """The symbols that each token stands for."""
        table = [np.array([symbol], self.dtype) for symbol in range(self.codec.vocab)]
        for left, right in self.merges:
            table.append(np.concatenate([table[left], table[right]]))
        return table


LONGEST = 64  # symbols that one token may stand for: on plain grounds they would grow to whole rows of a picture


def learn_pairs(codec: Codec, documents: Sequence[np.ndarray], vocab: int) -> Tokenizer:
    """Merge the most frequent pair of neighbours (the smallest of equals) until there are `vocab` tokens or no pair
    is left."""
    if not codec.vocab + 2 <= vocab <= 0xD800:  # above are the characters that a string cannot hold
        raise UserError(f"vocab is {vocab}: choose {codec.vocab + 2} (no pairs) to {0xD800:,}")
    text = chr(vocab - 1).join(map(to_text, documents))  # a mark between documents, above all tokens to be
    merges, sizes = [], np.ones(vocab - 1, np.int64)  # sizes: symbols that a token stands for
    for token in range(codec.vocab, vocab - 2):
        stream = from_text(text).astype(np.int64)
        counts = np.bincount(stream[:-1] * vocab + stream[1:], minlength=vocab * vocab).reshape(vocab, vocab)[:-1, :-1]
        counts[sizes[:, None] + sizes > LONGEST] = 0
        left, right = divmod(int(counts.argmax()), vocab - 1)
        if counts[left, right] < 2:
            break
        merges.append((left, right))
        sizes[token] = sizes[left] + sizes[right]
        text = text.replace(chr(left) + chr(right), chr(token))
    return Tokenizer(codec, tuple(merges))


def to_text(tokens: np.ndarray) -> str:
    return tokens.astype("<u2").tobytes().decode("utf-16-le")


def from_text(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-16-le"), "<u2").astype(np.uint16)


# --- codec.json: settings are typed once, in data.prepare, and travel with the data and the model -------------------

CODECS = {kind.name: kind for kind in (JPEG,)}


def fingerprint(codec: Codec) -> str:
    """A hash of what this machine's encoder makes of a fixed picture, for versions of libjpeg may differ in their
    bytes."""
    y, x = np.mgrid[: codec.size, : codec.size]
    picture = np.stack([x * y % 251, (x + y) ** 2 % 241, (x // 8 + y // 8) % 2 * 200], -1).astype(np.uint8)
    return hashlib.sha256(codec.encode(picture).tobytes()).hexdigest()[:16]


def encoder() -> str:
    return f"Pillow {PIL.__version__} with libjpeg-turbo {features.version('libjpeg_turbo') or features.version('jpg')}"


def describe(tokens: Tokenizer) -> str:
    """What codec.json holds: the codec and its settings, the byte pairs, and which encoder made them."""
    made_by = {"encoder": encoder(), "fingerprint": fingerprint(tokens.codec)}
    return json.dumps({"codec": tokens.codec.name, **asdict(tokens.codec), **made_by, "merges": tokens.merges})


def save_tokenizer(folder: Path, tokens: Tokenizer) -> None:
    Path(folder, "codec.json").write_text(describe(tokens) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read codec.json.  Errors: UserError."""
    path = Path(folder, "codec.json")
    if not path.exists():
        raise UserError(f"{folder} holds no codec.json: run `python -m data.prepare IMAGES {folder}` first")
    try:
        settings = json.loads(path.read_text())
        codec = CODECS[settings.pop("codec")]
        merges = tuple((left, right) for left, right in settings.pop("merges"))
        values = {field.name: settings[field.name] for field in fields(codec)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a codec.json of this version: {error!r}") from None
    return Tokenizer(codec(**values), merges)


def foreign_encoder(folder: Path, codec: Codec) -> str | None:
    """None if this machine encodes as the one that wrote codec.json, else a sentence that names both."""
    path = Path(folder, "codec.json")
    settings = json.loads(path.read_text()) if path.exists() else {"encoder": "another", "fingerprint": None}
    if settings["fingerprint"] == fingerprint(codec):
        return None
    return f"{folder} was encoded by {settings['encoder']}, but {encoder()} here writes other bytes for the same pixels"
