"""What may come next in a file, and where in the file that is.

A format has a grammar: after these bytes of a JPEG only some others may follow.  Used as a mask while sampling, it
makes every sample a whole valid file, from any model.  Used as an input, it tells the model where in the file it
stands, which is hard to see in bytes: a Huffman code begins and ends anywhere within one.

`Grammar` is what sampling and preparation ask; `Table` answers for every format whose reader has finitely many states
and counts something: a picture's blocks (`jpeg.scan`) or the symbols themselves (`counting`, pixels).  `Readers`
answers for formats that no table can hold (H.264).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from plumbing.command import UserError

FAR = 1 << 28  # tokens: more than any file has, and than any room
Array = Any  # numpy's while files are prepared, torch's on any device while they are sampled


def expansions(merges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each token: of the 256 that are one, then of the pairs."""
    found = [bytes([symbol]) for symbol in range(256)]
    for left, right in merges:
        found.append(found[left] + found[right])
    return found


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
    def mask(self, states: object, room: int, exact: Sequence[int] = ()) -> Array: ...  # (B, vocab) True where illegal
    def accept(self, states: object, tokens: Array, room: int | Array) -> tuple[object, Sequence[int]]: ...  # see below
    def keep(self, states: object, rows: Array) -> object: ...  # the states of some of the files
    def positions(self, states: object) -> Array: ...  # (B, F) where in the syntax the next token stands
    def rest(self, states: object) -> Array: ...  # (B,) tokens to the end of the file, at most, by the shortest way
    def walk(self, documents: Sequence[np.ndarray], tell: bool = True) -> Walk: ...  # whole documents
    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Grammar": ...  # of symbols: the same, over pairs too

    # `accept` reads tokens (B,), -1 for none, where they are legal and leave a way to the end within `room`, which may
    # be (B,).  The other rows it leaves as they were, and names those whose token `mask` had left open: but for rows
    # `exact`, a mask may know only some of what is illegal, and whoever draws bans what was refused and draws again.
    # `walk` takes documents with their start and end.  Its states can be sliced like an array (B, T); if it need not
    # `tell`, they may have no positions.


def refuse_bad_prompts(walk: Walk, prompts: list[np.ndarray], length: int) -> None:
    """Refuse prompts that begin no valid file, or none that can end within `length` tokens.  Errors: UserError."""
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
    """Of a Table: the state of the reader, which is one of finitely many, how many units are over, and what the memory
    tells."""

    local: Array  # (B,)
    count: Array  # (B,)
    told: Array  # (B, K)
    values: Array = None  # (B, N) what the memory holds; a state of a walk can be looked at, but leads no further

    def __getitem__(self, index: object) -> "State":
        return State(self.local[index], self.count[index], self.told[index])


class Memory:
    """What a Table's reader remembers besides, to tell it the model: numbers that it decoded.  Here nothing."""

    sizes: tuple[int, ...] = ()  # how many values each of the K syntax positions has that it tells
    waits = False  # whether a step looks at what came out to know how to go on, for which a GPU must be waited for

    def to(self, device: object) -> "Memory":
        return self

    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Memory":
        return self

    def begin(self, local: Array) -> State:
        """The first states, of these local ones."""
        nothing = local[:, None][:, :0]
        return State(local, local * 0, nothing, nothing)

    def read(self, before: State, after: State, tokens: Array, legal: Array) -> tuple[State, Array]:
        """`after` with what is remembered and told after some tokens, and which of the tokens (B,), legal but for that,
        are legal; the others leave all as it was."""
        return State(after.local, after.count, before.told, before.values), legal

    def allowed(self, states: State, legal: Array) -> Array:
        """Which of all tokens (B, vocab), legal but for what is remembered, are legal."""
        return legal


@dataclass(frozen=True, eq=False)
class Table:
    """A Grammar whose states are numbers, so that a step is a look-up, for a whole batch and on any device.

    An entry of `layers[i][local, token]` is rule << bits | the local state that follows.  A rule says at which counts
    the token is legal, and how far the count goes on; rule 0 never is, rule 1 always.  Of the layers, at most one has a
    legal entry at any count.  JPEG needs two where an MCU may be followed by another without a marker: the byte in
    which it ends goes on with padding or with the next MCU's bits.  `away[local]` is the tokens to the end of the
    present unit, `cost[count, rule]` those of all units after it, or too many for any room where the rule forbids.

    The memory may forbid more.  To ask it about every token takes longer than to be refused now and then; on a GPU,
    where every question would be waited for, the mask is `exact`.
    """

    layers: tuple[Array, ...]  # of (S, vocab) int32
    away: Array  # (S,) int32, tokens
    cost: Array  # (counts, rules) int32, tokens
    advance: Array  # (rules,) int32, units
    local_syntax: Array  # (S, F) int16, and
    count_syntax: Array  # (counts, F): their sum is the syntax position
    sizes: tuple[int, ...]  # of those, and of what the memory tells
    first: int = 0  # local state after the start token
    memory: Memory = Memory()
    exact: bool = False  # whether the mask leaves nothing open that `accept` would refuse

    @cached_property
    def bits(self) -> int:
        return bits_of(len(self.away))

    def to(self, device: object) -> "Table | OnCPU":
        return OnCPU(self) if str(device) == "cpu" else self.tensors(device)

    def tensors(self, device: object) -> "Table":
        import torch  # data preparation does without it

        arrays = ("away", "cost", "advance", "local_syntax", "count_syntax")
        moved = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))).to(device) for name in arrays}
        for name in ("local_syntax", "count_syntax"):
            moved[name] = moved[name].long()
        moved["layers"] = tuple(torch.from_numpy(layer).to(device) for layer in self.layers)
        return replace(self, memory=self.memory.to(device), exact=True, **moved)

    def begin(self, count: int) -> State:
        return self.memory.begin(self.away[:1].repeat(count) * 0 + self.first)  # on the device where the table lies

    def mask(self, states: State, room: int, exact: Sequence[int] = ()) -> Array:
        legal = False
        for layer in self.layers:
            entry = layer[states.local]
            rule, after = entry >> self.bits, entry & (1 << self.bits) - 1
            legal = legal | (self.away[after] + self.cost[states.count[..., None], rule] <= room)
        if self.exact:
            legal = self.memory.allowed(states, legal)
        elif len(rows := np.array(exact, int)):
            legal[rows] = self.memory.allowed(self.keep(states, rows), legal[rows])
        return ~legal

    def accept(self, states: State, tokens: Array, room: int | Array = FAR - 1) -> tuple[State, Sequence[int]]:
        states, legal, known = self.step(states, tokens, room)
        return states, () if self.exact else np.flatnonzero(known & ~legal).tolist()

    def step(self, states: State, tokens: Array, room: int | Array = FAR - 1) -> tuple[State, Array, Array]:
        """The states after tokens, whether those were legal, and but for what is remembered; an illegal token leaves
        the state as it is."""
        local, count, legal = states.local, states.count, False
        for layer in self.layers:
            entry = layer[states.local, tokens]
            rule, after = entry >> self.bits, entry & (1 << self.bits) - 1
            fits = (self.away[after] + self.cost[states.count, rule] <= room) & (tokens >= 0)
            local, count = local + (after - states.local) * fits, count + self.advance[rule] * fits
            legal = legal | fits
        return *self.memory.read(states, State(local, count, None), tokens, legal), legal

    def keep(self, states: State, rows: Array) -> State:
        return replace(states[rows], values=states.values[rows])

    def positions(self, states: State) -> Array:
        where = self.local_syntax[states.local] + self.count_syntax[states.count]
        where[..., where.shape[-1] - states.told.shape[-1] :] += states.told
        return where

    def rest(self, states: State) -> Array:
        return self.away[states.local] + self.cost[states.count, 1]

    def walk(self, documents: Sequence[np.ndarray], tell: bool = True) -> Walk:
        if not tell:  # reading numbers takes longer than all else
            return replace(self, memory=Memory()).walk(documents)
        lengths = np.array([len(document) for document in documents])
        end = self.layers[0].shape[1] - 1  # behind a whole file it is legal, inside one it changes nothing
        tokens = np.full((lengths.max(), len(documents)), end, np.int32)
        for column, document in enumerate(documents):
            tokens[: len(document), column] = document
        states, illegal = self.begin(len(documents)), lengths.copy()
        local, count = (np.zeros(tokens.shape, np.int32) for _ in range(2))
        told = np.zeros((*tokens.shape, len(self.memory.sizes)), np.int16)
        local[0], count[0], told[0] = states.local, states.count, states.told
        for at in range(1, len(tokens)):
            states, legal, _ = self.step(states, tokens[at])
            local[at], count[at], told[at] = states.local, states.count, states.told
            if not legal.all():
                illegal = np.where(~legal & (at < illegal), at, illegal)
        walked = State(local.T, count.T, told.swapaxes(0, 1))
        return Walk(walked, illegal, self.rest(walked[np.arange(len(documents)), lengths - 1]))

    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Table":
        """The same over tokens: symbols, then pairs of tokens before them, then start and end.

        What a pair does is what its right half does after its left half.
        """
        if not merges:
            return self
        size, bits, rules = len(self.away), self.bits, Rules(self.cost < FAR, self.advance)
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
                    second = two[first & (1 << bits) - 1, right]
                    rule = rules.both(first >> bits, second >> bits)
                    entry = np.where(rule > 0, rule << bits | second & (1 << bits) - 1, 0)
                    for number, layer in enumerate(layers):
                        here = (entry > 0) & (ways[rows] == number)
                        layer[rows[here], token] = entry[here]
                    ways[rows] += entry > 0
            assert ways.max() <= len(layers), f"token {token} can be read in {ways.max()} ways"
        assert len(rules.met) << bits < 1 << 31, f"{len(rules.met)} rules are too many for a table of {size} states"
        cost, advance = rules.cost(self.cost[:, 1]), np.array(rules.advance, np.int32)
        return replace(self, layers=tuple(layers), cost=cost, advance=advance, memory=self.memory.with_pairs(merges))


def bits_of(states: int) -> int:
    """Bits that hold the number of a local state in an entry of a Table; the rule stands above them."""
    return (states - 1).bit_length()


@dataclass(frozen=True, eq=False)
class OnCPU:
    """A Table for tensors on the CPU: arrays as small as those of a batch of files are faster there in numpy."""

    table: Table

    sizes = property(lambda self: self.table.sizes)

    def begin(self, count: int) -> State:
        return self.table.begin(count)

    def mask(self, states: State, room: int, exact: Sequence[int] = ()) -> Array:
        return self.tensor(self.table.mask(states, room, exact))

    def accept(self, states: State, tokens: Array, room: int | Array = FAR - 1) -> tuple[State, Sequence[int]]:
        return self.table.accept(states, np.asarray(tokens), np.asarray(room))

    def keep(self, states: State, rows: Array) -> State:
        return self.table.keep(states, np.asarray(rows))

    def positions(self, states: State) -> Array:
        return self.tensor(self.table.positions(states)).long()

    def tensor(self, array: np.ndarray) -> Array:
        import torch

        return torch.from_numpy(array)


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


# --- readers: a generator a file ------------------------------------------------------------------------------------


class Illegal(ValueError):
    """What a reader raises at the first byte after which no legal file goes on."""


@dataclass(slots=True)
class Row:
    """A file that is being read."""

    reader: Any
    generator: Any  # of its `stream`, which waits for a byte
    ask: tuple | None  # (node, where it stands in the syntax ..., zero bytes before) of that byte; None after the last
    begun: bytearray  # what of the present unit was read
    ended: bool = False  # by an end token

    def push(self, byte: int) -> None:
        """Read a byte.  Errors: Illegal, after which the row can only be read again."""
        if self.ask is None:
            raise Illegal("after the end")
        place = self.reader.place
        self.begun.append(byte)
        try:
            self.ask = self.generator.send(byte)
        except StopIteration:
            self.ask = None
        if self.reader.place is not place:
            self.begun.clear()


class Seen(NamedTuple):
    """States of Readers that can only be looked at: what was asked, by number, and the syntax positions."""

    asks: np.ndarray  # (...) int32
    positions: np.ndarray  # (..., F) int16

    def __getitem__(self, index: object) -> "Seen":
        return Seen(self.asks[index], self.positions[index])


class Piece(NamedTuple):
    """A whole unit: the states before each of its bytes, and the place after it."""

    seen: Seen
    after: object


class Spelling(NamedTuple):
    """In how few tokens a row of bytes to the end of the file can be spelled, from each of its first bytes on, for a
    token may begin in one unit and end in another."""

    data: bytes  # as many as the longest token has
    tokens: list[int]  # one more than bytes


LONGEST_WAY = 64  # bytes that complete a unit, from wherever one stands in it, at most


class Readers:
    """A Grammar of formats that no table can hold: each file has a reader, which dies where no legal file goes on.

    `make()` gives a reader of files that are a row of units, each of which can be read again from its place on:
    `stream(place)` is a generator that asks for bytes.  It yields (node, ..., zeros), what the byte goes on with and
    where that stands, as small integers; `node.open()` (256,) are the bytes that may be next.  `place` is where the
    present unit begins, None after the last; `at` are its numbers, which are positions too; `settled` says whether the
    place after it is the same however it goes on.  `way(place, begun)` gives the bytes of a short way to complete a
    unit, and the place after it; `pieces(data)` cuts bytes into what may be units.  A row whose token is refused is set
    back by reading its unit again.
    """

    def __init__(self, make: Callable, sizes: tuple[int, ...], merges: Sequence = (), device: object = None):
        self.make, self.sizes, self.merges, self.device, self.guide = make, sizes, merges, device, make()
        self.expansions = expansions(merges)
        self.start = len(self.expansions)  # the start token; then comes the end
        self.trie: dict[int, list] = {}  # of expansions: by byte the token that ends there, and what may follow
        for token, expansion in enumerate(self.expansions):
            branch = self.trie
            for byte in expansion[:-1]:
                branch = branch.setdefault(byte, [None, {}])[1]
            branch.setdefault(expansion[-1], [None, {}])[0] = token
        self.first = np.array([expansion[0] for expansion in self.expansions])
        self.lengths = np.array([*map(len, self.expansions), 0, 0])
        self.longest = int(self.lengths.max())
        # tokens by which the end is farther from within a unit than from its place, at most
        self.far = LONGEST_WAY + self.longest
        self.numbers: dict[tuple[int, int], int] = {}  # of rows of `legal`, by (id of the node, zeros)
        self.legal: list[np.ndarray] = [np.zeros(256, bool)]  # (256,) the bytes that may be next: none after the last
        self.tails: dict[object, Spelling] = {None: Spelling(b"", [1])}  # from a place, the end is a token
        self.spelled = lru_cache(1 << 15)(self.spell)
        self.piece = lru_cache(1 << 15)(self.read_piece)
        self.exact = lru_cache(1 << 12)(self.exact_mask)

    def to(self, device: object) -> "Readers":
        return Readers(self.make, self.sizes, self.merges, device)

    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Readers":
        return Readers(self.make, self.sizes, merges, self.device)

    # what the contract asks for

    def begin(self, count: int) -> list[Row]:
        return [self.read_again(self.guide.place) for _ in range(count)]

    def mask(self, states: list[Row] | Seen, room: int, exact: Sequence[int] = ()) -> Array:
        """By the first byte of a token; of the rows `exact` by all of it."""
        asks = states.asks if isinstance(states, Seen) else np.array([self.look(row)[0] for row in states])
        found, which = np.unique(asks, return_inverse=True)
        masks = np.ones((len(found), self.start + 2), bool)
        masks[:, : self.start] = ~np.stack([self.legal[number] for number in found])[:, self.first]
        masks[found == 0, -1] = False
        masks = masks[which.reshape(asks.shape)]
        for number in exact:
            if (row := states[number]).ask is not None:
                spare = None if self.far_off(row, room) else room - self.tail(row.reader.place).tokens[0]
                masks[number] = self.exact(row.reader.place, bytes(row.begun), spare)
        return self.on_device(masks)

    def accept(self, states: list[Row], tokens: Array, room: int | Array = FAR - 1) -> tuple[list[Row], list[int]]:
        refused, rooms = [], room.tolist() if getattr(room, "ndim", 0) else [room] * len(states)
        for number, (token, room) in enumerate(zip(tokens.tolist(), rooms, strict=True)):
            row = states[number]
            if token < 0:
                continue
            if row.ask is None and token == self.start + 1:
                row.ended = True
            elif row.ask is None or token >= self.start:
                refused.append(number)
            else:
                place, begun = row.reader.place, bytes(row.begun)
                if not self.read(row, self.expansions[token], room):
                    refused.append(number)
                    states[number] = self.read_again(place, begun)
        return states, refused

    def keep(self, states: list[Row], rows: Array) -> list[Row]:
        return [states[row] for row in rows.tolist()]

    def positions(self, states: list[Row] | Seen) -> Array:
        if isinstance(states, Seen):
            return states.positions
        return self.on_device(np.array([self.look(row)[1] for row in states]))

    def rest(self, states: list[Row]) -> Array:
        return np.array([self.tokens_to_end(row) for row in states])

    def walk(self, documents: Sequence[np.ndarray], tell: bool = True) -> Walk:
        longest, fields = max(map(len, documents)), len(self.sizes)
        asks = np.zeros((len(documents), longest), np.int32)
        positions = np.zeros((len(documents), longest, fields), np.int16)
        illegal, rest = [], []
        for number, tokens in enumerate(documents):
            data = b"".join(self.expansions[token] for token in tokens.tolist() if token < self.start)
            seen, row = self.read_file(data)
            ends = np.cumsum(self.lengths[tokens])  # bytes after each token
            known = len(seen.asks) - 1
            wrong = (ends > known) | (tokens == self.start) | (tokens == self.start + 1) & (seen.asks[-1] > 0)
            wrong[0] = False  # the start
            row.ended = tokens[-1] == self.start + 1
            asks[number, : len(tokens)] = seen.asks[np.minimum(ends, known)]
            positions[number, : len(tokens)] = seen.positions[np.minimum(ends, known)]
            illegal.append(int(wrong.argmax()) if wrong.any() else len(tokens))
            rest.append(self.tokens_to_end(row))
        return Walk(Seen(asks, positions), np.array(illegal), np.array(rest))

    # reading

    def read_again(self, place: object, begun: bytes = b"") -> Row:
        """A row that has read so much of the unit at a place."""
        reader = self.make()
        generator = reader.stream(place)
        row = Row(reader, generator, next(generator, None), bytearray())
        for byte in begun:
            row.push(byte)
        return row

    def read(self, row: Row, data: bytes, room: int) -> bool:
        """Whether a row could read bytes, and can end within `room` tokens; if not, it must be read again."""
        try:
            for byte in data:
                row.push(byte)
        except Illegal:
            return False
        return self.fits(row, room)

    def fits(self, row: Row, room: int) -> bool:
        """Whether a row can end within `room` tokens."""
        sure = row.ask is not None and row.ask[-1] != 3 and self.far_off(row, room)
        return sure or self.tokens_to_end(row) <= room

    def far_off(self, row: Row, room: int) -> bool:
        """Whether `room` is so large that a row has some way to the end, however its unit goes on."""
        return row.reader.settled and self.tail(row.reader.place).tokens[0] + self.far <= room

    def read_file(self, data: bytes) -> tuple[Seen, Row]:
        """The states before each legal byte and after the last, and the row that has read them."""
        place, pieces, at = self.guide.place, [], 0
        for unit in self.guide.pieces(data):
            if place is None or (piece := self.piece(place, unit)) is None:
                break
            pieces.append(piece.seen)
            place, at = piece.after, at + len(unit)
        row = self.read_again(place)
        looks = [self.look(row)]
        for byte in data[at:]:
            place, begun = row.reader.place, bytes(row.begun)
            try:
                row.push(byte)
            except Illegal:
                row = self.read_again(place, begun)
                break
            looks.append(self.look(row))
        return Seen(*map(np.concatenate, zip(*pieces, together(looks), strict=True))), row

    def read_piece(self, place: object, unit: bytes) -> Piece | None:
        """A whole unit; None where it is not."""
        row, looks = self.read_again(place), []
        try:
            for byte in unit:
                looks.append(self.look(row))
                row.push(byte)
        except Illegal:
            return None
        return None if row.begun else Piece(together(looks), row.reader.place)

    def look(self, row: Row) -> tuple[int, tuple[int, ...]]:
        """The number of what a row asks for, and its syntax positions, which are zeros after the last byte."""
        if row.ask is None:
            return 0, (0,) * len(self.sizes)
        node, *where = row.ask
        return self.number(node, where[-1]), (node.id + 1, *where, *row.reader.at)

    def number(self, node: object, zeros: int) -> int:
        """Of the bytes that a node leaves open after so many zeros, which are noted where they are new."""
        if (known := self.numbers.get((id(node), zeros))) is None:
            legal = node.open()
            legal[4 if zeros == 3 else 256 :] = False  # what was escaped
            legal[: 3 if zeros == 2 else 0] = False  # what must be escaped ...
            legal[3] |= zeros == 2  # ... by this
            known = self.numbers[id(node), zeros] = len(self.legal)
            self.legal.append(legal)
        return known

    # the way to the end, in tokens

    def tokens_to_end(self, row: Row) -> int:
        """Tokens of a short way to the end of the file; too many where a row cannot go on."""
        if row.ask is None:
            return 1 - row.ended
        place, begun, tokens = row.reader.place, bytes(row.begun), 2 * FAR
        if row.ask[-1] != 3:
            return self.spelled(*self.guide.way(place, begun)).tokens[0]
        for byte in range(4):  # one of these is due, but none may be legal
            with suppress(Illegal):
                self.read_again(place, begun + bytes([byte]))
                way, after = self.guide.way(place, begun + bytes([byte]))
                tokens = min(tokens, self.spelled(bytes([byte]) + way, after).tokens[0])
        return tokens

    def tail(self, place: object) -> Spelling:
        """The shortest units from a place to the end of the file, and the end."""
        units, at = [], place
        while at not in self.tails:
            units.append((at, *self.guide.way(at, b"")))
            at = units[-1][-1]
        for begun, way, after in reversed(units):
            self.tails[begun] = self.spell(way, after)
        return self.tails[place]

    def spell(self, data: bytes, after: object) -> Spelling:
        """Bytes, and the shortest units from a place on.  Of what is left after the first token it is one less, so the
        way ends as promised."""
        tail = self.tail(after)
        whole, fewest = data + tail.data, [0] * len(data) + tail.tokens
        for at in range(len(data) - 1, -1, -1):
            branch, fewest[at] = self.trie, 1 + fewest[at + 1]
            for end in range(at, len(whole)):
                if whole[end] not in branch:
                    break
                token, branch = branch[whole[end]]
                if token is not None:
                    fewest[at] = min(fewest[at], 1 + fewest[end + 1])
        return Spelling(whole[: self.longest], fewest[: self.longest + 1])

    def exact_mask(self, place: object, begun: bytes, spare: int | None) -> np.ndarray:
        """(vocab,) True for the tokens that are illegal, or leave no way to the end within `spare` more tokens than the
        shortest units from the place on take; None is without limit."""
        mask = np.ones(self.start + 2, bool)
        room = FAR - 1 if spare is None else self.tail(place).tokens[0] + spare

        def descend(row: Row, branch: dict[int, list]) -> None:
            legal = self.legal[self.look(row)[0]]
            for byte, (token, below) in branch.items():
                if not legal[byte]:
                    continue
                after = self.read_again(row.reader.place, row.begun)
                if self.read(after, bytes([byte]), FAR - 1):
                    if token is not None:
                        mask[token] = not self.fits(after, room)
                    descend(after, below)

        descend(self.read_again(place, begun), self.trie)
        return mask

    def on_device(self, array: np.ndarray) -> Array:
        if self.device is None:
            return array
        import torch  # data preparation does without it

        return torch.from_numpy(array).to(self.device)


def together(looks: list[tuple[int, tuple[int, ...]]]) -> Seen:
    asks, positions = zip(*looks, strict=True)
    return Seen(np.array(asks, np.int32), np.array(positions, np.int16))
