"""Pixels to the symbols of a file to tokens, and back: what the model reads and writes.

An image is already a sequence of symbols: its file.  Han et al. 2024, JPEG-LM (arXiv:2408.08459), train a language
model on just those bytes.  Two steps, of which the second is undone exactly, the first as far as the format allows:

    pixels uint8              a canonical codec: the same pixels always give the same symbols
      symbols (n,)            of a JPEG its bytes, without those that are the same in every file
        tokens (m,) uint16    frequent pairs of symbols as one token, between a start and an end
"""

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property, lru_cache, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import PIL
from PIL import Image, features
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

import grammar
import jpeg
from plumbing.command import UserError
from plumbing.files import read_json, write_whole


class Outline(NamedTuple):
    """What the bits of some symbols are, the highest first: (n, 8), or (n, 1) where a symbol is one thing."""

    kinds: np.ndarray  # numbers of `Codec.kinds`, -1 from where nothing could be read any more
    units: np.ndarray  # of which part of the picture, counted as in `Codec.units`; -1 for none


class Codec:
    """What the rest of the project asks of a codec: a frozen dataclass whose fields are its settings.

    A field with `repr=False` is not set but learned; it travels in codec.json like the others.
    """

    name: ClassVar[str]  # in codec.json and of --codec
    suffix: ClassVar[str]  # of the files it writes
    symbols: int  # all symbols are below this
    vocab: int  # tokens that data.prepare learns if not told otherwise
    shape: tuple[int, ...]  # of the pixels: (H, W, 3), or of a clip (T, H, W, 3),
    fps: float = 0  # which plays at so many frames a second
    parts: int  # rows that follow one another in a file, between which `head` can cut,
    part: ClassVar[str]  # and what they are
    kinds: ClassVar[tuple[str, ...]]  # of bits, to show what a file is made of
    units: tuple[int, ...]  # that a picture is cut into: rows and columns, of a clip frames before them

    def learn(self, sample: Iterable[np.ndarray]) -> Self:
        """The codec with what it has to learn from pixels, of which it takes as many as it wants."""
        return self

    @property
    def dtype(self) -> type:
        """Of symbols, on disk too."""
        return np.uint8 if self.symbols <= 256 else np.uint16

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels of `shape` uint8 to symbols (n,) of `dtype`; the same pixels give the same symbols."""

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """Any symbols to pixels of `shape` uint8, never an exception."""

    def file(self, symbols: np.ndarray) -> bytes:
        """The symbols as a file that any viewer opens."""

    def check(self, symbols: np.ndarray) -> str | None:
        """None for a whole valid file, else a sentence that says what is wrong where."""

    def kept(self, keep: float) -> float:
        """The share that can be kept and is nearest to `keep`.  Errors: UserError."""
        if not 0 <= round(keep * self.parts) < self.parts:
            raise UserError(f"keep is {keep}: choose from 0 to below 1, in steps of 1/{self.parts} ({self.part})")
        return round(keep * self.parts) / self.parts

    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray:
        """The symbols of the first `kept(keep)` of a picture."""

    def begun(self, symbols: np.ndarray) -> bytes:
        """The beginning of `file` as far as its first symbols decide it; nothing where only all of them do."""
        return b""

    def outline(self, symbols: np.ndarray) -> Outline:
        """What each bit is, as far as the symbols can be read."""

    def grammar(self) -> grammar.Grammar:
        """Which symbols may follow which; after them come a start and an end."""

    @property
    def settings(self) -> dict[str, object]:
        """The fields that are set, without those that are learned."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}

    def save(self, folder: Path) -> dict[str, object]:
        """What makes it itself again elsewhere, as JSON; what is too large for that goes into files of the folder."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path, saved: dict[str, object]) -> Self:
        """The codec of what `save` gave.  Errors: KeyError, TypeError or ValueError, of which `load_tokenizer` makes a
        sentence."""
        if odd := [each.name for each in fields(cls) if each.repr and type(saved[each.name]) is not each.type]:
            raise TypeError(f"{odd[0]} is {saved[odd[0]]!r}")
        return cls(**{each.name: saved[each.name] for each in fields(cls)})

    @property
    def encoder(self) -> str:
        """The version of what encodes, for another may write other symbols for the same pixels."""
        return f"Pillow {PIL.__version__}"

    @property
    def fingerprint(self) -> str:
        """A hash of what this machine's encoder makes of a fixed picture."""
        *_, y, x, channel = np.indices(self.shape)
        pixels = np.choose(channel, [x * y % 251, (x + y) ** 2 % 241, (x // 8 + y // 8) % 2 * 200]).astype(np.uint8)
        return hashlib.sha256(self.encode(pixels).tobytes()).hexdigest()[:16]


# --- JPEG -----------------------------------------------------------------------------------------------------------

SOI, EOI = b"\xff\xd8", b"\xff\xd9"  # start of image, end of image (T.81 table B.1)
TABLES_ONLY, PICTURE_ONLY = 1, 2  # libjpeg's stream types
SCALE = {"4:2:0": 2, "4:4:4": 1}  # blocks of Y that an MCU is wide and high; then one of Cb, one of Cr (A.2.3)


@dataclass(frozen=True)
class JPEG(Codec):
    """Baseline JPEG without its tables, as in section 3.1 of the paper.

    The tables are the same in every file of one quality, so they are left out and put back for the viewer.  After a
    restart marker nothing is remembered of what came before: with one after every MCU, as in the paper, a wrong byte
    spoils its MCU and no other.  With `header` the sequence is the file from SOI to EOI, as in the paper; without, only
    the entropy-coded data between the constant header and EOI.
    """

    size: int = 64  # pixels, both ways
    quality: int = 25  # of libjpeg, 1 to 100
    subsampling: str = "4:2:0"  # of the colours: 4:2:0 halves them both ways, 4:4:4 keeps them
    restart: int = 1  # MCUs from one restart marker to the next; 0: no markers
    header: bool = False  # keep the constant header, SOI and EOI in the sequence

    name, suffix, part, symbols, vocab, kinds = "jpeg", ".jpg", "rows of MCUs", 256, 320, jpeg.KINDS

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 1024:
            raise UserError(f"size is {self.size}: choose 16 to 1024 pixels")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality is {self.quality}: choose 1 to 100")
        if self.subsampling not in SCALE:
            raise UserError(f"subsampling is {self.subsampling!r}: choose one of {', '.join(SCALE)}")
        if not 0 <= self.restart <= 65535:
            raise UserError(f"restart is {self.restart}: choose 0 (no markers) to 65535 MCUs")

    shape = property(lambda self: (self.size, self.size, 3))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape == self.shape and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        data = self._write(pixels, PICTURE_ONLY)
        return np.frombuffer(data if self.header else data[len(self.prefix) : -len(EOI)], np.uint8)

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """What cannot be read is grey, what is too much is left out."""
        with Image.open(io.BytesIO(self.file(symbols))) as image:
            return np.asarray(image.convert("RGB"))

    def file(self, symbols: np.ndarray) -> bytes:
        """The symbols as they are, with the tables and what else was left out put back.

        Only markers that have no place in a scan are dropped, for libjpeg would obey them, or give up.
        """
        data = bytes(np.asarray(symbols, np.uint8))
        scan = data[len(self.prefix) :].removesuffix(EOI) if self.header else data
        scan = re.sub(rb"\xff+[^\x00\xd0-\xd7\xff]", b"", scan)
        return SOI + self.tables + self.prefix[len(SOI) :] + scan + EOI

    def begun(self, symbols: np.ndarray) -> bytes:
        return self.file(symbols)[: -len(EOI)]

    def check(self, symbols: np.ndarray) -> str | None:
        """Valid is what T.81 allows: every code is in the Huffman tables, no block has more than 64 coefficients, no
        coefficient more bits and no DC another value than 8-bit pixels lead to, FF is stuffed (F.1.2.3), bytes are
        filled up with ones, restart markers count modulo 8 (B.2.1), no MCU is missing."""
        data, (before, after) = bytes(symbols), self.around
        if not data.startswith(before):
            wrong = len(os.path.commonprefix([data, before]))
            return f"byte {wrong}: not the header of a {self.size}x{self.size} {self.subsampling} file"
        try:
            *_, end = self.read_mcus(data)
        except jpeg.Damage as damage:
            return str(damage)
        if data[end:] != after:
            return f"byte {end}: {data[end : end + 2].hex() or 'nothing'} after the last MCU"
        return None

    def read_mcus(self, data: bytes, bits_from: Callable[[bytes, int], jpeg.Bits] = jpeg.Bits) -> Iterator[int]:
        """The offset behind each MCU of a sequence.  Errors: jpeg.Damage."""
        start, luma = len(self.around[0]), SCALE[self.subsampling] ** 2
        return jpeg.read_scan(data, start, standard_codes(), self.bounds, luma, self.mcus, self.restart, bits_from)

    def outline(self, symbols: np.ndarray) -> Outline:
        data, start = bytes(symbols), len(self.around[0])
        kinds, units = (np.full((len(data), 8), -1) for _ in range(2))
        with suppress(jpeg.Damage):
            for _ in self.read_mcus(data, partial(jpeg.Noted, kinds, units)):
                pass
        kinds[:start] = jpeg.HEADER
        for found in re.finditer(rb"\xff[\xd0-\xd9]|(?<=\xff)\x00", data[start:]):
            place = slice(start + found.start(), start + found.end())
            known = found.start() == 0 or kinds[place.start - 1, -1] >= 0
            kinds[place] = (jpeg.PADDING if len(found.group()) == 1 else jpeg.MARKER) if known else -1
        return Outline(kinds, units)

    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray:
        """To the last byte that holds nothing of the rows below, with the restart marker if one is there."""
        mcus = round(self.kept(keep) * self.parts) * self.parts
        if not mcus:
            return symbols[: len(self.around[0])]
        end = next(islice(self.read_mcus(bytes(symbols)), mcus - 1, None))
        return symbols[: end + 2 * bool(self.restart and mcus % self.restart == 0)]

    def grammar(self) -> grammar.Table:
        machine = jpeg.automaton(standard_codes(), self.bounds.sizes, SCALE[self.subsampling] ** 2)
        return jpeg.scan(machine, self.bounds.dc, self.mcus, self.parts, self.restart, *self.around)

    @property
    def around(self) -> tuple[bytes, bytes]:
        """What a sequence has before and after the MCUs."""
        return (self.prefix, EOI) if self.header else (b"", b"")

    @property
    def encoder(self) -> str:
        libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
        return f"Pillow {PIL.__version__} with libjpeg-turbo {libjpeg}"

    @property
    def parts(self) -> int:
        """Rows of MCUs, and MCUs in a row."""
        return -(-self.size // (8 * SCALE[self.subsampling]))

    @property
    def mcus(self) -> int:
        return self.parts**2

    units = property(lambda self: (self.parts, self.parts))

    @cached_property
    def tables(self) -> bytes:
        """The segments DQT and DHT, which are left out of the sequence (B.5, abbreviated format)."""
        return self._write(np.zeros(self.shape, np.uint8), TABLES_ONLY)[len(SOI) : -len(EOI)]

    @cached_property
    def bounds(self) -> jpeg.Bounds:
        return jpeg.bounds_of(self.tables)

    @cached_property
    def prefix(self) -> bytes:
        """The constant beginning of every file of these settings: SOI, APP0, SOF0, DRI, SOS."""
        data = self._write(np.zeros(self.shape, np.uint8), PICTURE_ONLY)
        scan = data.index(b"\xff\xda")
        return data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4])]

    def _write(self, pixels: np.ndarray, streamtype: int) -> bytes:
        out = io.BytesIO()
        markers = {"restart_marker_blocks": self.restart} if self.restart else {}
        settings = {"quality": self.quality, "subsampling": self.subsampling, "streamtype": streamtype}
        Image.fromarray(pixels).save(out, "JPEG", **settings, **markers)
        return out.getvalue()


@cache
def standard_codes() -> jpeg.Codes:
    """The Huffman codes that the encoder writes with, the same at every quality (annex K.3)."""
    return jpeg.huffman_codes(JPEG().tables)


# --- pixels ---------------------------------------------------------------------------------------------------------


class Counted(Codec):
    """A codec whose pictures all have as many symbols: an array, from left to right and from top to bottom."""

    suffix, kinds = ".png", ("symbol",)
    vocab = property(lambda self: self.symbols + 2)  # no pairs
    places: tuple[int, ...]  # the symbols as an array: rows, columns and what else there is

    def file(self, symbols: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(self.decode(symbols)).save(out, "PNG")
        return out.getvalue()

    def check(self, symbols: np.ndarray) -> str | None:
        if len(symbols) != np.prod(self.places):
            return f"symbol {len(symbols)}: the end, where {' x '.join(map(str, self.places))} are due"
        if (wrong := np.flatnonzero(symbols >= self.symbols)).size:
            return f"symbol {wrong[0]}: {symbols[wrong[0]]}, but there are {self.symbols}"
        return None

    def head(self, symbols: np.ndarray, keep: float) -> np.ndarray:
        return symbols[: round(self.kept(keep) * self.parts) * int(np.prod(self.places[1:]))]

    units = property(lambda self: self.places[:2])

    def outline(self, symbols: np.ndarray) -> Outline:
        units = np.arange(len(symbols))[:, None] // int(np.prod(self.places[2:]))
        return Outline(np.zeros_like(units), np.where(units < np.prod(self.units), units, -1))

    def grammar(self) -> grammar.Table:
        return grammar.counting(self.symbols, self.places)


@dataclass(frozen=True)
class Pixels(Counted):
    """Pixels from left to right and from top to bottom, as the paper's ImageGPT has them (Chen et al. 2020, section 3):
    each one symbol, a colour of a palette, or three, red, green and blue.  The smallest codec."""

    size: int = 32  # pixels, both ways
    colours: int = 512  # of the palette, which is learned on the data; 0: all, as three numbers a pixel
    palette: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)

    name, part = "pixels", "rows of pixels"

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1024:
            raise UserError(f"size is {self.size}: choose 1 to 1024 pixels")
        if not (self.colours == 0 or 2 <= self.colours <= 4096):
            raise UserError(f"colours is {self.colours}: choose 2 to 4096, or 0 for red, green and blue")
        object.__setattr__(self, "palette", tuple(map(tuple, self.palette)))  # lists, as JSON has them

    shape = property(lambda self: (self.size, self.size, 3))
    parts = property(lambda self: self.size)

    @property
    def symbols(self) -> int:
        return len(self.palette) if self.colours else 256

    @property
    def places(self) -> tuple[int, ...]:
        """The symbols as an array: rows, columns and, without a palette, channels."""
        return self.shape[: 2 if self.colours else 3]

    def learn(self, sample: Iterable[np.ndarray]) -> Self:
        """The palette: the means of k-means over 65,536 pixels; all colours where they are few."""
        if not self.colours:
            return self
        found = [each.reshape(-1, 3) for each in sample] or [np.zeros((1, 3), np.uint8)]  # data.prepare says why none
        rng = np.random.default_rng(0)
        pixels = rng.permutation(np.concatenate(found))[:65_536]
        means = np.unique(pixels, axis=0)
        if len(means) > self.colours:
            means = rng.permutation(means)[: self.colours].astype(np.float64)
            with warnings.catch_warnings(action="ignore"):  # a mean that is nearest to no pixel stays where it is
                means = kmeans2(pixels.astype(np.float64), means, iter=20, minit="matrix")[0]
        palette = np.unique(means.round().astype(np.uint8), axis=0)
        return type(self)(self.size, self.colours, tuple(map(tuple, palette.tolist())))

    @cached_property
    def nearest(self) -> cKDTree:
        return cKDTree(np.array(self.palette))

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape == self.shape and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
        if not self.colours:
            return pixels.reshape(-1)
        return self.nearest.query(pixels.reshape(-1, 3))[1].astype(self.dtype)

    def decode(self, symbols: np.ndarray) -> np.ndarray:
        """What is missing is grey, what is too much is left out."""
        table = np.array(self.palette, np.uint8) if self.colours else np.arange(256, dtype=np.uint8)
        known = table[np.minimum(symbols[: np.prod(self.places)], len(table) - 1)].reshape(-1)
        pixels = np.full(np.prod(self.shape), 128, np.uint8)
        pixels[: len(known)] = known
        return pixels.reshape(self.shape)


# --- byte pairs -----------------------------------------------------------------------------------------------------

LARGEST_VOCAB = 0xD800  # above are the characters that a string cannot hold


@dataclass(frozen=True)
class Tokenizer:
    """Symbols as the model reads them: below `codec.symbols` a token is a symbol, then come the learned pairs, start
    and end.

    Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): merge i replaces every two neighbours `merges[i]`,
    from left to right, by token `codec.symbols + i`, merges in the order in which they were learned.
    """

    codec: Codec
    merges: tuple[tuple[int, int], ...] = ()
    made_by: tuple[str, str] | None = field(default=None, compare=False)  # the encoder of the data, its fingerprint

    @property
    def start(self) -> int:
        return self.codec.symbols + len(self.merges)

    @property
    def end(self) -> int:
        return self.start + 1

    @property
    def vocab(self) -> int:
        return self.start + 2

    def encode(self, documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Documents of symbols to one stream (n,) uint16 of start, tokens, end, start, ... and the length of each.

        The stream becomes a string with a character for each token, for then a merge is a search and replace at the
        speed of C (split and join is a third faster than `str.replace`).  None reaches across a start or an end.
        """
        texts = (document.astype("<u2").tobytes().decode("utf-16-le") for document in documents)
        text = "".join(f"{chr(self.start)}{each}{chr(self.end)}" for each in texts)
        for token, (left, right) in enumerate(self.merges, self.codec.symbols):
            text = chr(token).join(text.split(chr(left) + chr(right)))
        stream = np.frombuffer(text.encode("utf-16-le"), "<u2").astype(np.uint16)
        return stream, np.diff(np.flatnonzero(stream == self.start), append=len(stream))

    def prompt(self, symbols: np.ndarray) -> tuple[np.ndarray, bytes]:
        """Start and the first tokens (n,) of a file that begins with symbols, and the bytes of the symbols behind them.

        Into which tokens these go is decided by what follows: spelled as if the file ended there, they are something
        that the model has hardly ever seen.
        """
        tokens = self.encode([symbols])[0][:-1]
        ends = np.cumsum([0, *(len(self.expansions[token]) for token in tokens[1:])])
        sure = np.searchsorted(ends, max(0, len(symbols) - max(map(len, self.expansions)) + 1), "right")
        return tokens[:sure], symbols[ends[sure - 1] :].tobytes()

    def clashes(self, due: bytes) -> np.ndarray:
        """(vocab,) True for the tokens that neither begin with the bytes of some symbols nor are the first of them."""
        return np.array([not (each.startswith(due) or due.startswith(each)) for each in self.spellings] + [True, True])

    @cached_property
    def spellings(self) -> list[bytes]:
        """The bytes of the symbols that each token stands for."""
        return [symbols.tobytes() for symbols in self.expansions]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """The symbols of one document's tokens, up to its end if it has one."""
        ends = np.flatnonzero(tokens == self.end)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        known = [self.expansions[token] for token in tokens.tolist() if token < self.start]
        return np.concatenate([np.empty(0, self.dtype), *known])

    @property
    def grammar(self) -> grammar.Grammar:
        """The codec's, over tokens."""
        return grammar_of(self)

    @property
    def hash(self) -> str:
        """Short, of all that gives a token its meaning."""
        text = json.dumps([self.codec.name, asdict(self.codec), self.merges])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def dtype(self) -> type:
        return self.codec.dtype

    @cached_property
    def expansions(self) -> list[np.ndarray]:
        """The symbols that each token stands for."""
        table = [np.array([symbol], self.dtype) for symbol in range(self.codec.symbols)]
        for left, right in self.merges:
            table.append(np.concatenate([table[left], table[right]]))
        return table


@lru_cache(16)
def grammar_of(tokenizer: Tokenizer) -> grammar.Grammar:
    """The grammar over a tokenizer's tokens, which takes seconds to build: the last 16 are kept."""
    return tokenizer.codec.grammar().with_pairs(tokenizer.merges)


# --- codec.json: settings are typed once, in data.prepare, and travel with the data and the model -------------------

CODECS = {"jpeg": "codec.JPEG", "pixels": "codec.Pixels", "h264": "h264.H264", "vq": "data.vq.VQ"}


def codec_named(name: str) -> type[Codec]:
    """One of CODECS, of which each is imported when it is asked for.  Errors: KeyError."""
    module, kind = CODECS[name].rsplit(".", 1)
    return getattr(import_module(module), kind)


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write codec.json: the codec, the pairs, and which encoder made the data."""
    codec = tokenizer.codec
    encoder, fingerprint = tokenizer.made_by or (codec.encoder, codec.fingerprint)
    saved = {"codec": codec.name, **codec.save(folder), "encoder": encoder, "fingerprint": fingerprint}
    write_whole(folder / "codec.json", json.dumps({**saved, "merges": tokenizer.merges}).encode() + b"\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read codec.json.  Errors: UserError."""
    path = Path(folder, "codec.json")
    if not path.exists():
        raise UserError(f"{folder} holds no codec.json: run `python -m data.prepare SOURCE {folder}` first")
    saved = read_json(path)
    try:
        merges = tuple((int(left), int(right)) for left, right in saved["merges"])
        made_by = str(saved["encoder"]), str(saved["fingerprint"])
        codec = codec_named(saved["codec"]).load(path.parent, saved)
        if not all(0 <= token < codec.symbols + i for i, pair in enumerate(merges) for token in pair):
            raise ValueError("a pair of tokens that are not there")
        return Tokenizer(codec, merges, made_by)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a codec.json of this version: {error!r}") from None


def foreign_encoder(tokenizer: Tokenizer) -> str | None:
    """None if this machine encodes as the one that made the data, else a sentence that names both."""
    codec, (encoder, fingerprint) = tokenizer.codec, tokenizer.made_by or (None, tokenizer.codec.fingerprint)
    if fingerprint == codec.fingerprint:
        return None
    return f"the data were encoded by {encoder}, but {codec.encoder} here writes other symbols for the same pixels"
