"""What data.prepare wrote, read as one long row of tokens."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from plumbing.command import UserError
from plumbing.files import digest, read_json
from plumbing.processes import rank, world


class Stream:
    """The tokens of one split, all shards one after the other, and where its documents begin."""

    def __init__(self, folder: Path, split: str, syntax: int):
        """`syntax`: how many positions each token has, which are left aside if 0.  Errors: UserError."""
        shards = read_json(folder / "report.json").get("shards")
        names = sorted(name for name in shards if name.startswith(split)) if isinstance(shards, dict) else []
        if not names or not all(map(described, map(shards.get, names))):
            raise UserError(f"{folder}/report.json names no files of {split}: prepare {folder} anew")
        if syntax and "syntax_sha256" not in shards[names[0]]:
            raise UserError(f"{folder} holds no syntax positions: prepare it without --no-syntax, or pass --no-syntax")
        for name in names[rank() :: world()]:
            refuse_damaged(folder, name, shards[name]["sha256"], ("", ".lengths"))
            if syntax:
                refuse_damaged(folder, name, shards[name]["syntax_sha256"], (".syntax",))
        self.tokens = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
        self.syntax = [np.load(folder / f"{name}.syntax.npy", mmap_mode="r") for name in names] if syntax else []
        if syntax and any(each.shape[1] != syntax for each in self.syntax):
            others = f"{self.syntax[0].shape[1]} syntax positions a token, and not {syntax}"
            raise UserError(f"{folder} was prepared by another version ({others}): prepare it anew")
        lengths = np.concatenate([np.load(folder / f"{name}.lengths.npy") for name in names])
        self.documents = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])  # where each begins, and the end
        self.symbols = sum(shards[name]["symbols"] for name in names)
        self.bounds = np.cumsum([0, *map(len, self.tokens)])
        self.sha256 = [shards[name]["sha256"] for name in names]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens (count,) from `start` on; after the last one comes the first."""
        return self.pieces(self.tokens, start, count)

    def read_syntax(self, start: int, count: int) -> np.ndarray:
        """The syntax positions (count, F) to which those tokens lead; F is 0 for a plain Llama."""
        return self.pieces(self.syntax, start, count) if self.syntax else np.zeros((count, 0), np.uint8)

    def pieces(self, shards: list[np.ndarray], start: int, count: int) -> np.ndarray:
        found = []
        while count:
            start %= self.bounds[-1]
            number = int(np.searchsorted(self.bounds, start, "right")) - 1
            found.append(shards[number][start - self.bounds[number] :][:count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)

    def row_starts(self, context: int) -> np.ndarray:
        """Where the rows of context + 1 tokens begin: end to end, wherever that cuts a document, as in the paper.

        Rows that begin with a document cost the same bits a file for the same compute: see studies/README.md.
        """
        return np.arange(0, int(self.bounds[-1]) - context, context)


# --- which of them step s sees is a function of (seed, s) alone -----------------------------------------------------


@lru_cache(2)
def order_of_epoch(epoch: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_of_step(step: int, batch: int, count: int, seed: int) -> np.ndarray:
    """The numbers of the rows of one step (batch,): each of `count` once an epoch, in an order drawn from (seed,
    epoch)."""
    places = range(step * batch, (step + 1) * batch)
    return np.array([order_of_epoch(place // count, count, seed)[place % count] for place in places])


def described(shard: object) -> bool:
    """Whether a shard is described as data.prepare does."""
    kinds = {"sha256": str, "symbols": int}
    return isinstance(shard, dict) and all(type(shard.get(name)) is kind for name, kind in kinds.items())


def refuse_damaged(folder: Path, name: str, sha256: str, suffixes: tuple[str, ...]) -> None:
    paths = [folder / f"{name}{suffix}.npy" for suffix in suffixes]
    if not all(path.exists() for path in paths) or digest(*paths) != sha256:
        raise UserError(f"{folder}/{name}{suffixes[0]}.npy is not as it was written (sha256): prepare {folder} anew")
