"""A folder tree of files to a data folder of tokens.

    python -m data.prepare photos data/photos                          # JPEG, 64x64, quality 25, 320 tokens
    python -m data.prepare photos data/photos --size 256 --header      # the sequences of the paper
    python -m data.prepare photos data/pixels --codec pixels --size 16
    python -m data.prepare films data/films --codec h264 --fps 10      # clips of 15 frames, as H.264
    python -m data.prepare --codec pixels --help                       # the settings of that codec
    python -m data.prepare shards data/shards                          # .tar shards (the WebDataset layout)

Every file is tried, whatever its name, but for those that begin with a dot.  What cannot be used is skipped, counted by
reason in report.json and named in skipped.txt.  The result depends on the files alone, not on the number of workers;
the same command continues an interrupted preparation.  data/README.md describes what is written.
"""

import argparse
import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from codec import CODECS, JPEG, Codec, Tokenizer, codec_named, save_tokenizer
from data import clips, pictures
from data.pairs import learn_pairs
from data.sources import Item, Unusable, find_items
from plumbing.command import Flags, UserError, differences, run
from plumbing.files import digest, read_json, write_json, write_whole
from plumbing.run import claim

READERS = {3: pictures.read, 4: clips.read}  # of source files to pixels, by the number of dimensions of a codec's shape
PART = {3: 8192, 4: 512}  # files, pictures or videos: what an interruption loses at most
SHARD = 1 << 25  # symbols of a shard at most, unless one document has more
TASK = {3: 64, 4: 1}  # files that a worker takes at once: pictures, videos
ENCODE = 64  # documents whose byte pairs are found at once
VIEWS = (1, 2, 8)  # of each picture or clip
MOST_WORKERS = 1024  # they are started all at once
LEARN = 1000  # files that a codec learns on, at least; fewer than twice as many
LOT, LOT_SYMBOLS = 2048, 1 << 20  # documents that a grammar walks side by side, and how large they are at most
SAMPLE = 10_000  # documents that byte pairs are learned on (section 3.2 of the paper) ...
SAMPLE_SYMBOLS = 1_000_000  # ... if they are no larger than this together


def read(item: Item, codec: Codec, notes: Counter[str]) -> Iterator[np.ndarray]:
    """The arrays of the codec's shape that a file holds; `notes` counts what was done to it.  Errors: Unusable."""
    return READERS[len(codec.shape)](item, codec, notes)


# --- workers --------------------------------------------------------------------------------------------------------


@contextmanager
def pool_of(count: int) -> Iterator[Executor | None]:
    """A pool of so many processes; None for one, which needs no other."""
    advice = "the same command continues: close what takes memory, or pass --workers 1"
    try:
        with ProcessPoolExecutor(count) if count > 1 else nullcontext() as pool:
            yield pool
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed, perhaps for want of memory; {advice}") from None
    except (OSError, ImportError) as error:
        if isinstance(error, OSError) and error.filename:  # of a file, and not of what processes share
            raise
        raise UserError(f"no worker processes can be used here ({error}): pass --workers 1") from None


def in_order(pool: Executor | None, function: Callable, tasks: Iterable[tuple], ahead: int) -> Iterator:
    """The results of `function(*task)`, computed in the pool, in the order of the tasks; never more than `ahead` wait
    in memory."""
    if pool is None:
        yield from (function(*task) for task in tasks)
        return
    waiting = deque()
    for task in tasks:
        waiting.append(pool.submit(function, *task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def chunks(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while chunk := list(islice(items, size)):
        yield chunk


def cores() -> int:
    """Those that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- files to symbols, in parts -------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What some files became."""

    documents: list[np.ndarray]  # symbols
    counts: list[int]  # of documents, for each file that could be used
    skipped: list[str]  # reason and name of each that could not, as a line
    notes: Counter[str]


def views_of(pixels: np.ndarray, views: int) -> Iterator[np.ndarray]:
    """Pixels (..., H, W, 3) as they are, mirrored, and both turned by one, two and three quarters; the first `views`
    of those."""
    for turns in range(-(-views // 2)):
        turned = np.rot90(pixels, turns, (-3, -2))
        yield from map(np.ascontiguousarray, (turned, turned[..., ::-1, :])[:views])


def encode_items(codec: Codec, views: int, items: list[Item]) -> Encoded:
    """What a worker does with a task."""
    encoded = Encoded([], [], [], Counter())
    for item in items:
        try:
            shown = [view for pixels in read(item, codec, encoded.notes) for view in views_of(pixels, views)]
            documents = [codec.encode(view) for view in shown]
        except Unusable as reason:
            encoded.skipped.append(f"{reason}\t{item.name}\n")
            continue
        encoded.documents.extend(documents)
        encoded.counts.append(len(documents))
    return encoded


class Part(NamedTuple):
    """Files that are encoded together, known by names, sizes, times and the codec: files in a temporary folder."""

    path: Path

    def write(self, codec: Codec, views: int, items: list[Item], pool: Executor | None, ahead: int, bar: tqdm) -> None:
        lengths, counts, skipped, notes = [], [], [], Counter()
        tasks = ((codec, views, task) for task in chunks(items, TASK[len(codec.shape)]))
        with open(self.path.with_suffix(".symbols"), "wb") as file:
            for encoded in in_order(pool, encode_items, tasks, ahead):
                file.writelines(document.tobytes() for document in encoded.documents)
                lengths += map(len, encoded.documents)
                counts += encoded.counts
                skipped += encoded.skipped
                notes += encoded.notes
                bar.update(len(encoded.counts) + len(encoded.skipped))
        np.savez(
            self.path.with_suffix(".npz"), lengths=np.array(lengths, np.uint32), counts=np.array(counts, np.uint32)
        )
        self.path.with_suffix(".skipped").write_text("".join(skipped), encoding="utf-8")
        write_json(self.path.with_suffix(".json"), notes)  # last: now the part is whole

    @property
    def whole(self) -> bool:
        return self.path.with_suffix(".json").exists()

    def load(self, name: str) -> np.ndarray:
        """`lengths` of the documents in symbols, or `counts` of documents for each file."""
        with np.load(self.path.with_suffix(".npz")) as file:
            return file[name]

    @property
    def skipped(self) -> str:
        return self.path.with_suffix(".skipped").read_text(encoding="utf-8")

    @property
    def notes(self) -> Counter[str]:
        return Counter(read_json(self.path.with_suffix(".json")))

    def documents(self, dtype: type, which: np.ndarray | slice = slice(None)) -> Iterator[np.ndarray]:
        lengths = self.load("lengths")
        if not len(lengths):
            return
        symbols, ends = np.memmap(self.path.with_suffix(".symbols"), dtype, "r"), np.cumsum(lengths, dtype=np.int64)
        for end, length in zip(ends[which], lengths[which], strict=True):
            yield np.array(symbols[end - length : end])

    def lots(self, dtype: type, which: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Documents as many at a time as go into a shard."""
        lot, size = [], 0
        for document in self.documents(dtype, which):
            if lot and size + len(document) > SHARD:
                yield lot
                lot, size = [], 0
            lot.append(document)
            size += len(document)
        if lot:
            yield lot


def stamp(item: Item) -> tuple[int, int]:
    """Size of the file that holds an item, and when it was last changed; -1 where that cannot be told."""
    try:
        found = os.stat(item.path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def encode(
    source: Path, codec: Codec, views: int, out: Path, files: int, pool: Executor | None, ahead: int
) -> list[Part]:
    """All files, in parts; those that are there already, of an interrupted preparation, are taken as they are."""
    parts, settings = [], [codec.name, asdict(codec), codec.fingerprint, views]
    with tqdm(total=files, unit=" files", desc="encode", disable=None) as bar:
        for items in chunks(find_items(source), PART[len(codec.shape)]):
            listing = [[item.name, item.length, *stamp(item)] for item in items]
            key = hashlib.sha256(json.dumps([settings, listing]).encode()).hexdigest()
            parts.append(Part(out / "parts" / key[:24]))
            if parts[-1].whole:
                bar.update(len(items))
            else:
                parts[-1].write(codec, views, items, pool, ahead, bar)
    return parts


# --- symbols to tokens ----------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """What train.py reads: whole documents of one split, one after the other."""

    stream: np.ndarray  # (n,) uint16 tokens
    lengths: np.ndarray  # (documents,) uint32 tokens
    syntax: np.ndarray | None  # (n, F) where each token leads
    symbols: int


def alike(documents: list[np.ndarray]) -> Iterator[list[int]]:
    """The numbers of some documents, in lots of such as are about as long, and together not too large."""
    numbers = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    while numbers:
        count = max(1, min(LOT, LOT_SYMBOLS // (1 + len(documents[numbers[-1]]))))
        yield numbers[-count:]
        numbers = numbers[:-count]


def syntax_of(tokenizer: Tokenizer, documents: list[np.ndarray], tokens: list[np.ndarray]) -> np.ndarray:
    """The syntax positions (n, F) to which the tokens of some documents lead, from the grammar of symbols: a pair leads
    where its last symbol does."""
    plain = Tokenizer(tokenizer.codec)
    grammar = plain.grammar
    dtype = np.uint8 if max(grammar.sizes) <= 256 else np.uint16
    sizes = np.array([*map(len, tokenizer.expansions), 1, 1])  # symbols of each token, start and end
    found = [None] * len(documents)
    for numbers in alike(documents):
        whole = [np.concatenate([[plain.start], documents[i], [plain.end]]) for i in numbers]
        walked = grammar.walk(whole)
        assert walked.illegal.tolist() == [len(document) for document in whole], "the encoder has left the grammar"
        positions = grammar.positions(walked.states).astype(dtype)
        for i, rows in zip(numbers, positions, strict=True):
            found[i] = rows[np.cumsum(sizes[tokens[i]]) - 1]
    return np.concatenate(found)


def validates(files: np.ndarray, validation: float) -> np.ndarray:
    """Which of some usable files, by their numbers, validate: every (1 / validation)-th."""
    return ((files + 1) * validation).astype(int) > (files * validation).astype(int)


def tokenize(
    part: Part, tokenizer: Tokenizer, first: int, views: int, validation: float, syntax: bool, out: Path, number: int
) -> dict[str, dict]:
    """What a worker makes of a part whose first usable file has the number `first`: shards, described for the report.

    Every (1 / validation)-th file validates, with all its documents, as they are: exact in number, and fair to every
    folder.  The others come view by view, so that no row holds two of one picture.
    """
    files = first + np.repeat(np.arange(len(part.load("counts"))), part.load("counts"))
    validating, numbers = validates(files, validation), np.arange(len(files)).reshape(-1, views)
    trains, held = (numbers[chosen[::views]] for chosen in (~validating, validating))
    described = {}
    for split, chosen in (("train", trains.T.reshape(-1)), ("val", held[:, 0])):
        for lot, documents in enumerate(part.lots(tokenizer.dtype, chosen)):
            pieces = [tokenizer.encode(piece) for piece in chunks(documents, ENCODE)]
            stream, lengths = map(np.concatenate, zip(*pieces, strict=True))
            tokens = np.split(stream, np.cumsum(lengths)[:-1])
            told = syntax_of(tokenizer, documents, tokens) if syntax else None
            shard = Shard(stream, lengths.astype(np.uint32), told, sum(map(len, documents)))
            name = f"{split}-{number:05d}" + f"-{lot:05d}" * (lot > 0)
            described[name] = write_shard(out / name, shard)
    return described


def write_shard(path: Path, shard: Shard) -> dict[str, object]:
    """Write a shard, and describe it for the report."""
    stream, lengths, syntax = (path.with_name(f"{path.name}{kind}.npy") for kind in ("", ".lengths", ".syntax"))
    np.save(stream, shard.stream)
    np.save(lengths, shard.lengths)
    numbers = {"documents": len(shard.lengths), "tokens": len(shard.stream), "symbols": shard.symbols}
    described = numbers | {"longest": int(shard.lengths.max()), "sha256": digest(stream, lengths)}
    if shard.syntax is not None:
        np.save(syntax, shard.syntax)
        described["syntax_sha256"] = digest(syntax)
    return described


# --- the whole ------------------------------------------------------------------------------------------------------


def prepare(
    source: Path,
    out: Path,
    codec: Codec,
    vocab: int | None,
    validation: float,
    workers: int,
    syntax: bool = True,
    views: int = 1,
) -> None:
    """Write OUT from SOURCE.  Errors: UserError for what the user can mend; OSError, after which the same call
    continues."""
    if views not in VIEWS or views > 2 and codec.shape[-3] != codec.shape[-2]:
        raise UserError(f"--views is {views}: choose 1, or 2 to mirror, or, of squares, 8 to turn as well")
    listing, files = hashlib.sha256(), 0
    for item in find_items(source):
        length = stamp(item)[0] if item.length < 0 else item.length
        listing.update(f"{item.name}\0{length}\n".encode())  # no times, for a copy is the same
        files += 1
    settings = {"codec": codec.name, **codec.settings, "vocab": vocab, "val": validation, "syntax": syntax}
    settings |= {"views": views, "files": files, "listing": listing.hexdigest()[:16]}
    if is_prepared(out, settings):
        print(f"{out} is prepared already")
        return
    (out / "parts").mkdir(parents=True, exist_ok=True)
    started, ahead = time.time(), 4 * workers
    with pool_of(workers) as pool:
        every = max(1, files // LEARN)
        codec = codec.learn(usable(islice(find_items(source), 0, None, every), codec))
        parts = encode(source, codec, views, out, files, pool, ahead)
        counts = [len(part.load("counts")) for part in parts]
        skipped = Counter(line.split("\t")[0] for part in parts for line in part.skipped.splitlines())
        if int(sum(counts) * validation) < 1 or sum(counts) < 2:
            reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common()) or "none skipped"
            found = f"{sum(counts)} usable files of {files} ({reasons})"
            raise UserError(f"{source} has {found}, too few to validate --val {validation} of them: give it more")
        tokenizer = learn(codec, parts, vocab)
        firsts = np.cumsum([0, *counts]).tolist()
        tasks = [(part, tokenizer, firsts[i], views, validation, syntax, out, i) for i, part in enumerate(parts)]
        results = in_order(pool, tokenize, tasks, ahead // 4)
        shards = {}
        for described in tqdm(results, "tokenize", len(tasks), unit=" parts", disable=None):
            shards |= described
    write_whole(out / "skipped.txt", "".join(part.skipped for part in parts).encode())
    save_tokenizer(out, tokenizer)
    notes = sum((part.notes for part in parts), Counter())
    report = {"settings": settings, "source": str(source.resolve()), "skipped": dict(skipped), "notes": dict(notes)}
    report |= {"seconds": round(time.time() - started, 1), "shards": shards}
    write_json(out / "report.json", report)  # last: now the folder is whole
    shutil.rmtree(out / "parts")
    print(
        f"{out}: {summary(shards)}; {counted(skipped, files)}" + "".join(f"; {n} {note}" for note, n in notes.items())
    )


def is_prepared(out: Path, settings: dict[str, object]) -> bool:
    """Whether OUT holds just what is asked for.  Errors: UserError where it holds something else."""
    if (out / "report.json").exists():
        before = read_json(out / "report.json").get("settings")
        if not isinstance(before, dict):
            raise UserError(f"{out}/report.json holds no settings: restore it, or delete {out} and prepare it anew")
        if changed := differences(before, settings):
            raise UserError(f"{out} was prepared otherwise ({changed}): choose another folder, or delete this one")
        return True
    if out.exists() and not (out / "parts").exists() and any(path.name != "lock" for path in out.iterdir()):
        raise UserError(f"{out} holds other files: choose a folder that is empty or new")
    return False


def usable(items: Iterable[Item], codec: Codec) -> Iterator[np.ndarray]:
    """The pixels of those that can be used."""
    for item in items:
        try:
            yield from read(item, codec, Counter())
        except Unusable:
            continue


def learn(codec: Codec, parts: list[Part], vocab: int | None) -> Tokenizer:
    """The byte pairs, from documents that are spread evenly."""
    lengths = np.concatenate([part.load("lengths") for part in parts])
    every = max(1, -(-len(lengths) // SAMPLE), -(-int(lengths.sum(dtype=np.int64)) // SAMPLE_SYMBOLS))
    dtype = Tokenizer(codec).dtype
    sample = [document for part in parts for document in part.documents(dtype, slice(None, None, every))]
    return learn_pairs(codec, sample, vocab or codec.vocab)


def summary(shards: dict[str, dict]) -> str:
    documents, symbols, tokens = (sum(s[key] for s in shards.values()) for key in ("documents", "symbols", "tokens"))
    lengths = f"{symbols / documents:,.0f} symbols, {tokens / documents:,.0f} tokens on average"
    return f"{documents:,} documents of {lengths}, {max(s['longest'] for s in shards.values()):,} at most (--context)"


def counted(skipped: Counter[str], files: int) -> str:
    reasons = "".join(f", {number} {reason}" for reason, number in skipped.most_common())
    return f"{skipped.total()} of {files:,} files skipped{reasons}"


def main(arguments: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--codec")
    asked = first.parse_known_args(arguments)[0].codec
    kind = codec_named(asked if asked in CODECS else JPEG.name)
    parser = Flags(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of files, of folders of files, or of .tar files of files")
    parser.add_argument("out", type=Path, help="data folder to write")
    parser.add_argument("--codec", choices=CODECS, default=JPEG.name, help="what the model will write (default: jpeg)")
    parser.add_argument("--vocab", type=int, help="tokens, pairs of symbols included (default: the codec's)")
    parser.add_argument("--val", type=float, default=0.05, help="share of the files that validate (default: 0.05)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")
    parser.add_argument(
        "--no-syntax", action="store_true", help="leave out syntax positions, which plain Llama has not"
    )
    parser.add_argument(
        "--views", type=int, default=1, help="of each: 1, 2 with its mirror image, 8 turned as well (default: 1)"
    )
    parser.add_fields(kind())
    flags = parser.parse(arguments)
    if not flags.source.is_dir():
        raise UserError(f"{flags.source} is not a folder: name a folder of files or of .tar files")
    if flags.out.resolve().is_relative_to(flags.source.resolve()):
        raise UserError(f"{flags.out} lies in {flags.source}, whose files it would count as its own: choose another")
    if not 0 < flags.val < 1 or not 1 <= flags.workers <= MOST_WORKERS:
        given = f"--val {flags.val} --workers {flags.workers}"
        raise UserError(f"{given}: the first is between 0 and 1, the second 1 to {MOST_WORKERS}")
    codec = kind(**{each.name: getattr(flags, each.name) for each in fields(kind) if each.name in flags})
    with claim(flags.out, wait=True):
        prepare(flags.source, flags.out, codec, flags.vocab, flags.val, flags.workers, not flags.no_syntax, flags.views)


if __name__ == "__main__":
    run(main)
