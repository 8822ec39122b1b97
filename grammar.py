"""What may come next in a file, and where in the file that is.

A format has a grammar: after these bytes of a JPEG only some others may follow.  Used as a mask while sampling, it
makes every sample a whole valid file, from any model.  Used as an input, it tells the model where in the file it
stands, which is hard to see in bytes: a Huffman code begins and ends anywhere within one.

`Grammar` is what sampling and preparation ask; `Table` answers for every format whose reader has finitely many states
and counts something: a picture's blocks (`scan`, JPEG) or the symbols themselves (`counting`, pixels).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from plumbing.command import UserError

FAR = 1 << 28  # tokens: more than any file has, and than any room
Array = Any  # numpy's while files are prepared, torch's on any device while they are sampled


class Walk(NamedTuple):
    """What `Grammar.walk` found in some documents."""

    states: object  # after each of their tokens
    illegal: np.ndarray  # (B,) the place of the first illegal token of each, its length where there is none
    rest: np.ndarray  # (B,) tokens from the end of each to the end of its file, at most, by the shortest way


class Grammar(Protocol):
    """Reads a batch of B files side by side, token by token.  States are of its own kind: hand back what it gave.

    `room` counts the tokens that the context has left after the one in question.
    """

    sizes: tuple[int, ...]  # how many values each of the F syntax positions has; () for none

    def to(self, device: object) -> "Grammar": ...  # the same, for states and tokens on a device of torch
    def begin(self, count: int) -> object: ...  # states of so many files, after their start token
    def mask(self, states: object, room: int, exact: bool = False) -> Array: ...  # (B, vocab) True where illegal
    def accept(self, states: object, tokens: Array, room: int) -> tuple[object, Sequence[int]]: ...  # see below
    def positions(self, states: object) -> Array: ...  # (B, F) where in the syntax the next token stands
    def rest(self, states: object) -> Array: ...  # (B,) tokens to the end of the file, at most, by the shortest way
    def walk(self, documents: Sequence[np.ndarray]) -> Walk: ...  # whole documents of tokens, start and end included
    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Grammar": ...  # of symbols: the same, over pairs too

    # `accept` reads tokens (B,), -1 for none, where they are legal and leave a way to the end within `room`.  The other
    # rows it leaves as they were, and names those whose token `mask` had left open: a mask that is not `exact` may know
    # only some of what is illegal, and whoever draws bans what was refused and draws again.  States of a walk can be
    # sliced like an array (B, T).


def refuse_bad_prompts(grammar: Grammar, prompts: list[np.ndarray], length: int) -> None:
    """Refuse prompts that begin no valid file, or none that can end within `length` tokens.  Errors: UserError."""
    walk = grammar.walk(prompts)
    for number, (prompt, illegal, rest) in enumerate(zip(prompts, walk.illegal, walk.rest, strict=True)):
        if illegal < len(prompt):
            where, advice = f"token {illegal} of {len(prompt)}", "encode it as the model's data, or pass --free"
            raise UserError(f"prompt {number} does not begin a valid file ({where}): {advice}")
        if rest > length - len(prompt):
            room = f"{max(0, length - len(prompt))} are left after a prompt of {len(prompt)}"
            needs = f"the rest of the file takes {rest} tokens or more, and {room}"
            raise UserError(f"{needs}: raise --length, pass --free, or take a model of more context")


# --- tables: finitely many states, and a count ----------------------------------------------------------------------


@dataclass
class State:
    """Of a Table: the state of the reader, which is one of finitely many, and how many units are over."""

    local: Array  # (B,)
    count: Array  # (B,)

    def __getitem__(self, index: object) -> "State":
        return State(self.local[index], self.count[index])


@dataclass(frozen=True, eq=False)
class Table:
    """A Grammar whose states are numbers, so that a step is a look-up, for a whole batch and on any device.

    An entry of `layers[i][local, token]` is rule * S + the local state that follows (S: number of local states).  A
    rule says at which counts the token is legal, and how far the count goes on; rule 0 never is, rule 1 always.  Of
    the layers, at most one has a legal entry at any count.  The tokens that are left are `away[local]`, as if nothing
    were to follow the present unit, and those of the units to come, which `cost` adds, too many where a rule forbids.
    """

    layers: tuple[Array, ...]  # of (S, vocab) int32
    away: Array  # (S,) int32, tokens
    cost: Array  # (counts, rules) int32, tokens
    advance: Array  # (rules,) int32, units
    local_syntax: Array  # (S, F) int16, and
    count_syntax: Array  # (counts, F): their sum is the syntax position
    sizes: tuple[int, ...]
    first: int = 0  # local state after the start token

    def to(self, device: object) -> "Table":
        import torch  # data preparation does without it

        arrays = ("away", "cost", "advance", "local_syntax", "count_syntax")
        moved = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))).to(device) for name in arrays}
        for name in ("local_syntax", "count_syntax"):
            moved[name] = moved[name].long()
        return replace(self, layers=tuple(torch.from_numpy(layer).to(device) for layer in self.layers), **moved)

    def begin(self, count: int) -> State:
        local = self.away[:1].repeat(count) * 0 + self.first  # on the device where the table lies
        return State(local, local * 0)

    def mask(self, states: State, room: int, exact: bool = True) -> Array:
        legal = False
        for layer in self.layers:
            entry = layer[states.local]
            rule, after = entry // len(self.away), entry % len(self.away)
            legal = legal | (self.away[after] + self.cost[states.count[..., None], rule] <= room)
        return ~legal

    def accept(self, states: State, tokens: Array, room: int = FAR - 1) -> tuple[State, tuple]:
        """The mask is exact, so of what it leaves open nothing is refused."""
        return self.step(states, tokens, room)[0], ()

    def step(self, states: State, tokens: Array, room: int = FAR - 1) -> tuple[State, Array]:
        """The states after tokens, and whether those were legal; an illegal token leaves the state as it is."""
        local, count, legal = states.local, states.count, False
        for layer in self.layers:
            entry = layer[states.local, tokens]
            rule, after = entry // len(self.away), entry % len(self.away)
            fits = self.away[after] + self.cost[states.count, rule] <= room
            local, count = local + (after - states.local) * fits, count + self.advance[rule] * fits
            legal = legal | fits
        return State(local, count), legal

    def positions(self, states: State) -> Array:
        return self.local_syntax[states.local] + self.count_syntax[states.count]

    def rest(self, states: State) -> Array:
        return self.away[states.local] + self.cost[states.count, 1]

    def walk(self, documents: Sequence[np.ndarray]) -> Walk:
        lengths = np.array([len(document) for document in documents])
        end = self.layers[0].shape[1] - 1  # behind a whole file it is legal, inside one it changes nothing
        tokens = np.full((lengths.max(), len(documents)), end, np.int32)
        for column, document in enumerate(documents):
            tokens[: len(document), column] = document
        states, illegal = self.begin(len(documents)), lengths.copy()
        local, count = (np.zeros(tokens.shape, np.int32) for _ in range(2))
        local[0], count[0] = states.local, states.count
        for at in range(1, len(tokens)):
            states, legal = self.step(states, tokens[at])
            local[at], count[at] = states.local, states.count
            if not legal.all():
                illegal = np.where(~legal & (at < illegal), at, illegal)
        walked = State(local.T, count.T)
        return Walk(walked, illegal, self.rest(walked[np.arange(len(documents)), lengths - 1]))

    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Table":
        """The same over tokens: symbols, then pairs of tokens before them, then start and end.

        What a pair does is what its right half does after its left half.
        """
        if not merges:
            return self
        size, rules = len(self.away), Rules(self.cost < FAR, self.advance)
        symbols = self.layers[0].shape[1] - 2
        layers = [np.zeros((size, symbols + len(merges) + 2), np.int32) for _ in self.layers]
        for new, old in zip(layers, self.layers, strict=True):
            new[:, :symbols], new[:, -2:] = old[:, :symbols], old[:, -2:]
        for token, (left, right) in enumerate(merges, symbols):
            ways = np.zeros(size, np.int64)  # in which the token can be read, from each state
            for one in layers:
                rows = np.flatnonzero(one[:, left])
                for two in layers:
                    first = one[rows, left]
                    second = two[first % size, right]
                    rule = rules.both(first // size, second // size)
                    entry = np.where(rule > 0, rule * size + second % size, 0)
                    for number, layer in enumerate(layers):
                        here = (entry > 0) & (ways[rows] == number)
                        layer[rows[here], token] = entry[here]
                    ways[rows] += entry > 0
            assert ways.max() <= len(layers), f"token {token} can be read in {ways.max()} ways"
        tail = self.cost[:, 1]
        return replace(self, layers=tuple(layers), cost=rules.cost(tail), advance=np.array(rules.advance, np.int32))


class Rules:
    """At which counts each rule is met, and by how much it lets the count advance."""

    def __init__(self, met: np.ndarray, advance: np.ndarray):
        self.met, self.advance = list(met.T), advance.tolist()
        self.numbers = {(step, row.tobytes()): i for i, (step, row) in enumerate(zip(advance, self.met, strict=True))}

    def number(self, met: np.ndarray, advance: int) -> int:
        """The number of a rule, which is made where there is none like it; 0 for one that is never met."""
        if not met.any():
            return 0
        if (advance, met.tobytes()) not in self.numbers:
            self.numbers[advance, met.tobytes()] = len(self.met)
            self.met.append(met)
            self.advance.append(advance)
        return self.numbers[advance, met.tobytes()]

    def both(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The rules of one after the other, for arrays of their numbers."""
        size = len(self.met)
        pairs = first * np.int64(size) + second
        found = np.zeros(size * size, np.int32)
        for pair in np.flatnonzero(np.bincount(pairs, minlength=size * size)).tolist():
            one, two = divmod(pair, size)
            step = self.advance[one]
            then = np.zeros_like(self.met[two])  # what the second meets at the count where the first arrives
            then[: len(then) - step] = self.met[two][step:]
            found[pair] = self.number(self.met[one] & then, step + self.advance[two])
        return found[pairs]

    def cost(self, tail: np.ndarray) -> np.ndarray:
        """(counts, rules): the tokens that the units to come take, `tail` by count, where a rule leads; more than any
        room if it is not met."""
        counts = np.arange(len(tail))[:, None]
        after = np.minimum(counts + np.array(self.advance), len(tail) - 1)
        return np.where(np.stack(self.met, 1), tail[after], 2 * FAR).astype(np.int32)


NEVER, ALWAYS = 0, 1  # numbers of rules


def rules_of(counts: int) -> Rules:
    return Rules(np.stack([np.zeros(counts, bool), np.ones(counts, bool)], 1), np.zeros(2, np.int64))


def counting(symbols: int, shape: tuple[int, ...]) -> Table:
    """Any symbols, as many as an array of `shape` has numbers.  Positions: the place in the array (row, column, ...)
    of the next one; the first is shape[0] when all are there."""
    total = int(np.prod(shape))
    counts, rules = np.arange(total + 1), rules_of(total + 1)
    one, whole = rules.number(counts < total, 1), rules.number(counts == total, 0)
    layer = np.zeros((2, symbols + 2), np.int32)  # local states: inside, ended
    layer[0, :symbols] = 2 * one
    layer[0, -1], layer[1, -1] = 2 * whole + 1, 2 * ALWAYS + 1
    tail = total - counts + 1  # and the end
    places = np.stack(np.unravel_index(np.minimum(counts, total - 1), shape), 1)
    places[-1] = shape[0], *[0] * (len(shape) - 1)
    sizes = (shape[0] + 1, *shape[1:])
    away, advance = np.array([0, -1], np.int32), np.array(rules.advance, np.int32)
    local_syntax = np.zeros((2, len(shape)), np.int16)
    return Table((layer,), away, rules.cost(tail), advance, local_syntax, places.astype(np.int16), sizes)
