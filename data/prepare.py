"""A folder tree of images to a data folder of tokens.

    python -m data.prepare photos data/photos                                # 64x64, quality 25, 320 tokens
    python -m data.prepare photos data/photos --size 256 --header            # the sequences of the paper
    python -m data.prepare shards data/shards                                # .tar shards (the WebDataset layout)

Every file is tried, whatever its name: turned upright, made RGB, the largest centre square resized with antialias.
What cannot be used is skipped, counted by reason in report.json and named in skipped.txt.  The result depends on the
files alone, not on the number of workers; the same command continues an interrupted preparation.  data/README.md
describes what is written.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from codec import CODECS, Codec, Tokenizer, encoder, fingerprint, learn_pairs, save_tokenizer
from data.pictures import read_square
from data.sources import Item, Unusable, read_file, walk
from plumbing.command import Flags, UserError, differences, run
from plumbing.files import digest, write_whole

PART = 8192  # files: what an interruption loses at most
TASK = 64  # files that a worker takes at once
SAMPLE = 10_000  # documents that byte pairs are learned on (section 3.2 of the paper) ...
SAMPLE_SYMBOLS = 1_000_000  # ... if they are no larger than this together


# --- all files to tokens --------------------------------------------------------------------------------------------


def encode_items(codec: Codec, items: list[Item]) -> tuple[list[np.ndarray], list[str]]:
    """What a worker does: the symbols of the files that can be used, and a line of reason and name for each that
    cannot."""
    documents, skipped = [], []
    for item in items:
        try:
            documents.append(codec.encode(read_square(read_file(item), codec.size)))
        except Unusable as reason:
            skipped.append(f"{reason}\t{item.name}\n")
    return documents, skipped


def in_order(pool: ProcessPoolExecutor, function: Callable, tasks: Iterable[tuple], ahead: int) -> Iterator:
    """The results of `function(*task)`, computed in the pool, in the order of the tasks; never more than `ahead` wait
    in memory."""
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


def encode_part(
    path: Path, codec: Codec, items: list[Item], pool: ProcessPoolExecutor, workers: int, bar: tqdm
) -> None:
    """Write the symbols of some files, the length of each document and, last, the names of those skipped."""
    lengths, skipped = [], []
    with open(path.with_suffix(".symbols"), "wb") as file:
        for documents, lines in in_order(
            pool, encode_items, ((codec, task) for task in chunks(items, TASK)), 4 * workers
        ):
            lengths += map(len, documents)
            skipped += lines
            file.writelines(document.tobytes() for document in documents)
            bar.update(len(documents) + len(lines))
    np.save(path.with_suffix(".lengths.npy"), np.array(lengths, np.uint32))
    lines = "".join(skipped).encode("utf-8", "surrogateescape")
    write_whole(path.with_suffix(".skipped"), lines)  # the part is whole when this is there


def read_documents(path: Path, dtype: type, which: slice = slice(None)) -> list[np.ndarray]:
    lengths = np.load(path.with_suffix(".lengths.npy"))
    if not len(lengths):
        return []
    symbols, ends = np.memmap(path.with_suffix(".symbols"), dtype, "r"), np.cumsum(lengths, dtype=np.int64)
    return [np.array(symbols[end - length : end]) for end, length in zip(ends[which], lengths[which], strict=True)]


def tokenize(
    path: Path, tokens: Tokenizer, first: int, validation: float
) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """What a worker makes of a part that begins with document `first`: {split: (stream, lengths, symbols)}."""
    chosen, splits = {"train": [], "val": []}, {}
    for i, document in enumerate(read_documents(path, tokens.dtype), first):
        # every (1 / validation)-th document validates: exact in number, and fair to every folder
        chosen["val" if int((i + 1) * validation) > int(i * validation) else "train"].append(document)
    for split, documents in chosen.items():
        if documents:
            pieces = [tokens.encode(piece) for piece in chunks(documents, TASK)]
            splits[split] = (*map(np.concatenate, zip(*pieces, strict=True)), sum(map(len, documents)))
    return splits


def prepare(source: Path, out: Path, codec: Codec, vocab: int, validation: float, workers: int) -> None:
    """Write OUT from SOURCE.  Errors: UserError for what the user can mend; OSError, after which the same call
    continues."""
    listing, files = hashlib.sha256(), 0
    for item in walk(source):
        listing.update(f"{item.name}\0{item.length}\n".encode(errors="surrogateescape"))
        files += 1
    settings = {"codec": codec.name, **asdict(codec), "vocab": vocab, "val": validation, "encoder": fingerprint(codec)}
    settings |= {"source": str(source.resolve()), "files": files, "listing": listing.hexdigest()[:16]}
    parts = out / "parts"
    for place in (out / "report.json", parts / "settings.json"):
        if place.exists():
            before = json.loads(place.read_text())
            if changed := differences(before.get("settings", before), settings):
                raise UserError(f"{out} was prepared otherwise ({changed}): choose another folder, or delete this one")
    if (out / "report.json").exists():
        print(f"{out} is prepared already")
        return
    if out.exists() and any(path.name != "parts" for path in out.iterdir()) and not parts.exists():
        raise UserError(f"{out} holds other files: choose a folder that is empty or new")
    parts.mkdir(parents=True, exist_ok=True)
    (parts / "settings.json").write_text(json.dumps(settings))

    started, paths = time.time(), []
    with ProcessPoolExecutor(workers) as pool:
        with tqdm(total=files, unit=" files", desc="encode") as bar:
            for number, items in enumerate(chunks(walk(source), PART)):
                paths.append(parts / f"{number:05d}")
                if paths[-1].with_suffix(".skipped").exists():
                    bar.update(len(items))
                else:
                    encode_part(paths[-1], codec, items, pool, workers, bar)
        lengths = [np.load(path.with_suffix(".lengths.npy")) for path in paths]
        lists = [path.with_suffix(".skipped").read_bytes() for path in paths]
        skipped = Counter(line.split(b"\t")[0].decode() for lines in lists for line in lines.splitlines())
        documents, symbols = sum(map(len, lengths)), sum(int(length.sum(dtype=np.int64)) for length in lengths)
        if int(documents * validation) < 1 or documents < 2:
            reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common()) or "none skipped"
            found = f"{documents} usable images of {files} files ({reasons})"
            raise UserError(f"{source} has {found}, too few to validate --val {validation} of them: give it more")

        every = max(1, -(-documents // SAMPLE), -(-symbols // SAMPLE_SYMBOLS))
        sample = [
            document
            for path in paths
            for document in read_documents(path, Tokenizer(codec).dtype, slice(None, None, every))
        ]
        print(f"learning byte pairs on {len(sample):,} of {documents:,} documents")
        tokens = learn_pairs(codec, sample, vocab)
        del sample

        firsts = np.cumsum([0, *map(len, lengths)])
        tasks = [(path, tokens, int(first), validation) for path, first in zip(paths, firsts, strict=False)]
        shards, longest = {}, 0
        for number, splits in enumerate(
            tqdm(in_order(pool, tokenize, tasks, workers), "tokenize", len(tasks), unit=" parts")
        ):
            for split, (stream, sizes, covered) in splits.items():
                name = f"{split}-{number:05d}"
                np.save(out / f"{name}.npy", stream)
                np.save(out / f"{name}.lengths.npy", sizes.astype(np.uint32))
                sha = digest(out / f"{name}.npy", out / f"{name}.lengths.npy")
                shards[name] = {"documents": len(sizes), "tokens": len(stream), "symbols": covered, "sha256": sha}
                longest = max(longest, int(sizes.max(initial=0)))

    (out / "skipped.txt").write_bytes(b"".join(lists))
    save_tokenizer(out, tokens)
    report = {"settings": settings, "skipped": dict(skipped), "encoder": encoder(), "shards": shards}
    report["seconds"] = round(time.time() - started, 1)
    write_whole(out / "report.json", json.dumps(report, indent=1).encode() + b"\n")  # last: now the folder is whole
    shutil.rmtree(parts)
    reasons = "".join(f", {number} {reason}" for reason, number in skipped.most_common())
    length = sum(shard["tokens"] for shard in shards.values()) / documents
    lengths = f"{symbols / documents:,.0f} symbols, {length:,.0f} tokens on average, {longest:,} at most (--context)"
    print(f"{out}: {documents:,} documents of {lengths}; {skipped.total()} of {files:,} files skipped{reasons}")


def cores() -> int:
    """Those that this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> None:
    parser = Flags(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of images, of folders of images, or of .tar files of images")
    parser.add_argument("out", type=Path, help="data folder to write")
    parser.add_argument("--codec", choices=CODECS, default="jpeg", help="what the model will write (default: jpeg)")
    parser.add_argument("--vocab", type=int, default=320, help="tokens, byte pairs included; 258: none (default: 320)")
    parser.add_argument(
        "--val", type=float, default=0.05, help="share of the images that is kept for validation (default: 0.05)"
    )
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")
    for codec in CODECS.values():
        parser.add_fields(codec())
    flags = parser.parse(arguments)
    kind = CODECS[flags.codec]
    if not flags.source.is_dir():
        raise UserError(f"{flags.source} is not a folder: name a folder of images or of .tar files")
    if not 0 < flags.val < 1 or flags.workers < 1:
        given = f"--val {flags.val} --workers {flags.workers}"
        raise UserError(f"{given}: the first is between 0 and 1, the second at least 1")
    codec = kind(**{field.name: getattr(flags, field.name) for field in fields(kind) if field.name in flags})
    prepare(flags.source, flags.out, codec, flags.vocab, flags.val, flags.workers)


if __name__ == "__main__":
    run(main)
