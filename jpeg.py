"""What is inside a JPEG: how to read one, and what may come next in one.

The picture is cut into blocks of 8x8 numbers, of brightness (Y) and of two colours (Cb, Cr).  A cosine transform turns
a block into 64 coefficients, from its average (DC) to its finest detail (AC); a low quality divides them by large
numbers and rounds, so that most become zero.  They are written in zigzag order, from coarse to fine: DC as the
difference from the block before it, and each AC coefficient that is not zero.  A Huffman code says how many zeros are
skipped before it and how many bits its value has, then come those bits; one code says that only zeros are left.  At
4:2:0 the colours have half the resolution, so four blocks of Y and one of each colour cover 16x16 pixels: a minimum
coded unit (MCU).  After a restart marker DC is a difference from zero, and bits begin on a whole byte.

The first half of this page is a parser in the words of the standard (ITU-T T.81, clauses are its own); `codec.JPEG`
checks files with it.  The second half is the same knowledge as a machine that takes a byte and says which may follow;
sampling and the model's syntax positions use that.  The two share the tables of the file and nothing else, so each
tests the other.  Both also know how large a coefficient can be in a picture of 8 bits: a model that is free to write
larger ones now and then covers a block with black and white stripes, or, as DC is a sum of differences, the rest of
the picture with white.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from grammar import ALWAYS, FAR, NEVER, Array, Memory, State, Table, bits_of, expansions, rules_of

DHT, DQT = 0xC4, 0xDB  # the markers of Huffman tables and of quantization tables (table B.1)
Codes = dict[tuple[int, int], dict[str, int]]  # by (class, identifier), DC 0 or AC 1, luma 0 or chroma 1: {bits: value}


# --- a parser -------------------------------------------------------------------------------------------------------


def segments(tables: bytes, wanted: int) -> Iterator[bytes]:
    """What the segments of one marker hold."""
    at = 0
    while at < len(tables):
        marker, length = tables[at + 1], int.from_bytes(tables[at + 2 : at + 4])
        if marker == wanted:
            yield tables[at + 4 : at + 2 + length]
        at += 2 + length


def huffman_codes(tables: bytes) -> Codes:
    """The Huffman codes of some DHT segments (B.2.4.2)."""
    found = {}
    for segment in segments(tables, DHT):
        while segment:
            key, counts = (segment[0] >> 4, segment[0] & 15), segment[1:17]
            values, segment = segment[17 : 17 + sum(counts)], segment[17 + sum(counts) :]
            codes, code, value = {}, 0, iter(values)
            for bits, count in enumerate(counts, 1):  # codes of one length count upwards (C.2)
                for _ in range(count):
                    codes[f"{code:0{bits}b}"] = next(value)
                    code += 1
                code <<= 1
            found[key] = codes
    return found


@dataclass(frozen=True)
class Bounds:
    """What pictures of 8 bits lead to, of luma and of chroma."""

    sizes: list[list[int]]  # (2, 64) bits of a coefficient at most, in zigzag order; of DC: of a difference
    dc: list[tuple[int, int]]  # the least DC there is, and the largest


def bounds_of(tables: bytes) -> Bounds:
    """By the DQT segments (B.2.4.1, tables of bytes).

    A transform of 8 bits gives no more than 10 and a sign, and for DC -1024 to 1016, eight times the mean of samples
    from -128 to 127, which the table's number divides, rounding (A.3.1, A.3.3 and A.3.4).
    """
    found = {}
    for segment in segments(tables, DQT):
        while segment:
            found[segment[0] & 15], segment = segment[1:65], segment[65:]
    sizes = [
        [((2047 - 1024 * (k > 0) + step // 2) // step).bit_length() for k, step in enumerate(found[which])]
        for which in (0, 1)
    ]
    steps = [found[which][0] for which in (0, 1)]
    return Bounds(sizes, [(-((1024 + step // 2) // step), (1016 + step // 2) // step) for step in steps])


class Damage(Exception):
    """What is wrong with a file, and at which byte."""


class Bits:
    """The bits of the entropy-coded data from an offset to the next marker, first the highest of each byte; after FF a
    00 is skipped (F.1.2.3), which tells it from a marker."""

    def __init__(self, data: bytes, start: int):
        run = re.compile(rb"(?:[^\xff]|\xff\x00)*", re.DOTALL).match(data, start).group()
        self.data, self.start, self.packed = data, start, run.replace(b"\xff\x00", b"\xff")
        self.bits = f"{int.from_bytes(self.packed):0{8 * len(self.packed)}b}" if self.packed else ""
        self.at, self.mcu, self.block = 0, 0, 0

    @property
    def place(self) -> str:
        return f"MCU {self.mcu}, block {self.block}"

    @property
    def offset(self) -> int:
        """Of the byte that holds the next bit."""
        return self.start + self.at // 8 + self.packed.count(0xFF, 0, self.at // 8)

    def take(self, count: int) -> str:
        if self.at + count > len(self.bits):
            self.at = len(self.bits)
            there = self.data[self.offset : self.offset + 2].hex()
            raise Damage(f"byte {self.offset}: {f'marker {there}' if there else 'the end'} in {self.place}")
        self.at += count
        return self.bits[self.at - count : self.at]

    def code(self, table: dict[str, int]) -> int:
        """Read a Huffman code: no code is the beginning of another (F.2.2.3)."""
        for length in range(1, 17):
            value = table.get(self.bits[self.at : self.at + length])
            if value is not None and self.take(length):
                return value
        self.take(min(16, len(self.bits) - self.at + 1))  # says so where the data end
        self.at -= 16
        raise Damage(f"byte {self.offset}: no such code in {self.place}")

    def fill_up(self) -> None:
        """Pass over the ones that fill up the last byte of an interval."""
        rest = self.bits[self.at :]
        if len(rest) >= 8 or "0" in rest:
            raise Damage(
                f"byte {self.offset}: {self.place} is followed by {rest[:8]}, not by ones to the end of a byte"
            )
        self.at = len(self.bits)


def extend(bits: str) -> int:
    """The number that the bits of a value stand for (F.2.2.1)."""
    return int(bits or "0", 2) - (bits.startswith("0") and (1 << len(bits)) - 1)


def read_block(bits: Bits, dc: dict[str, int], ac: dict[str, int], largest: list[int]) -> int:
    """Read a block (F.2.2) and return its DC difference.  AC is checked only: at most 64 coefficients in all, none of
    more bits than `largest` has for its zigzag index.  Errors: Damage."""

    def value(index: int, size: int) -> int:
        if size > largest[index]:
            raise Damage(f"byte {bits.offset}: coefficient {index} has {size} bits in {bits.place}, more than it can")
        return extend(bits.take(size))

    difference = value(0, bits.code(dc))
    last = 0  # index of the last coefficient that is known, in zigzag order
    while last < 63:
        zeros, size = divmod(bits.code(ac), 16)
        if (zeros, size) == (0, 0):  # end of block: the rest is zero
            return difference
        if (zeros, size) == (15, 0):  # sixteen zeros, before more
            last += 16
        else:
            last += zeros + 1
        if last > (62 if size == 0 else 63):
            raise Damage(f"byte {bits.offset}: more than 64 coefficients in {bits.place}")
        value(last, size)
    return difference


def read_scan(
    data: bytes,
    start: int,
    codes: Codes,
    bounds: Bounds,
    luma: int,
    mcus: int,
    restart: int,
    bits_from: Callable[[bytes, int], Bits] = Bits,
) -> Iterator[int]:
    """Parse the entropy-coded data of so many MCUs of `luma` blocks of Y, a marker after every `restart` of them (0:
    never), and give after each the offset behind its last whole byte.  Errors: Damage."""
    interval, bits = restart or mcus, bits_from(data, start)
    for mcu in range(mcus):
        if mcu % interval == 0:
            before = [0, 0, 0]  # DC of each component (F.2.1.3.1)
        for block in range(luma + 2):
            bits.mcu, bits.block = mcu, block
            chroma, component = int(block >= luma), max(0, block - luma + 1)
            before[component] += read_block(bits, codes[0, chroma], codes[1, chroma], bounds.sizes[chroma])
            least, most = bounds.dc[chroma]
            if not least <= before[component] <= most:
                found = f"DC is {before[component]} in {bits.place}, not {least} to {most}"
                raise Damage(f"byte {bits.offset}: {found}")
        if (mcu + 1) % interval and mcu + 1 < mcus:
            yield bits.offset
            continue
        bits.fill_up()
        yield bits.offset
        if mcu + 1 < mcus:  # markers count modulo 8 (B.2.1)
            due, there = bytes([0xFF, 0xD0 + mcu // interval % 8]), data[bits.offset : bits.offset + 2]
            if there != due:
                found = there.hex() or "the end"
                raise Damage(f"byte {bits.offset}: {found} where restart marker {due.hex()} is due")
            bits = bits_from(data, bits.offset + 2)


KINDS = ("header", "marker", "DC", "AC", "end of block", "padding")
HEADER, MARKER, AVERAGE, DETAIL, END_OF_BLOCK, PADDING = range(len(KINDS))


class Noted(Bits):
    """Bits of which is noted what each is, as a number of KINDS, and of which MCU, both (n, 8)."""

    def __init__(self, kinds: np.ndarray, mcus: np.ndarray, data: bytes, start: int):
        super().__init__(data, start)
        run = np.frombuffer(data[start : start + len(self.packed) + self.packed.count(0xFF)], np.uint8)
        self.bytes = start + np.flatnonzero((run > 0) | (np.append(0, run)[:-1] < 0xFF))  # none that are stuffed
        self.kinds, self.mcus, self.kind, self.begun = kinds, mcus, AVERAGE, None

    def note(self, begin: int) -> None:
        """What was read from a bit on."""
        places = np.arange(begin, self.at)
        places = self.bytes[places // 8], places % 8
        self.kinds[places], self.mcus[places] = self.kind, self.mcu

    def take(self, count: int) -> str:
        taken = super().take(count)
        self.note(self.at - count)
        return taken

    def code(self, table: dict[str, int]) -> int:
        first, self.begun, begin = (self.mcu, self.block) != self.begun, (self.mcu, self.block), self.at
        self.kind = AVERAGE if first else DETAIL
        if (value := super().code(table)) == 0 and not first:
            self.kind = END_OF_BLOCK
            self.note(begin)
        return value

    def fill_up(self) -> None:
        begin, self.kind = self.at, PADDING
        super().fill_up()
        self.note(begin)


# --- a grammar ------------------------------------------------------------------------------------------------------


LONGEST_VALUE = 11  # bits (tables F.1 and F.2)


@dataclass(frozen=True)
class Automaton:
    """What may follow, bit by bit, inside an MCU, which is all that the reader of a scan remembers (T.81 F.2.2).

    A state is one number for (block of the MCU, index of the next coefficient in zigzag order, place).  Places are, in
    order: the nodes of the coefficient's Huffman tree; 1 to 11 bits of a value left; a value of 1 to 11 bits of which
    none is read, for its first bit is its sign.  Index 64 means that the block's last value is still being read.  State
    0 begins an MCU.
    """

    steps: np.ndarray  # (end, 2) the state after a 0 and after a 1; -1 where that is not legal
    nodes: int
    width: int  # places of a coefficient: nodes, then 1 to 11 bits left, then 1 to 11 bits that begin

    @property
    def end(self) -> int:
        """The state after the last bit of the MCU."""
        return len(self.steps)


def following(coefficient: int, run: int, size: int) -> int:
    """The coefficient after a code of so many zeros and a value of `size` bits: 64 if the block is over, -1 if it has
    no room, for 16 zeros (15, 0) are followed by another value (F.1.2.2.1)."""
    if coefficient > 0 and (run, size) == (0, 0):  # end of block
        return 64
    after = coefficient + run + 1
    return after if after < 64 or (after == 64 and (run, size) != (15, 0)) else -1


def automaton(codes: Codes, largest: list[list[int]], luma: int) -> Automaton:
    """For MCUs of `luma` blocks of Y, then one of each colour, and values of no more bits than `largest` says."""
    trees = {key: tree(table) for key, table in codes.items()}
    nodes = max(map(len, trees.values()))
    width, blocks = nodes + 2 * LONGEST_VALUE, luma + 2
    steps = np.full((blocks, 65, width, 2), -1, np.int32)

    def reach(block: int, coefficient: int, bits: int, begins: bool = False) -> int:
        """The state before a coefficient, or before the bits that are left of the value before it."""
        if bits:
            return (block * 65 + coefficient) * width + nodes + begins * LONGEST_VALUE + bits - 1
        return (block * 65 + coefficient) * width if coefficient < 64 else (block + 1) * 65 * width

    for block in range(blocks):
        for coefficient in range(65):
            for bits in range(1, LONGEST_VALUE + 1):
                left = [nodes + bits - 1, nodes + LONGEST_VALUE + bits - 1]
                steps[block, coefficient, left] = reach(block, coefficient, bits - 1)
            children = trees[int(coefficient > 0), int(block >= luma)] if coefficient < 64 else []
            for node, pair in enumerate(children):
                for bit, child in enumerate(pair):
                    if child is None:
                        continue
                    target = reach(block, coefficient, 0) + child
                    if child < 0:  # a whole code
                        run, size = divmod(-1 - child, 16)  # zeros before the value, bits of the value
                        after = following(coefficient, run, size)
                        fits = after >= 0 and size <= largest[int(block >= luma)][after - 1]
                        target = reach(block, after, size, True) if fits else -1
                    steps[block, coefficient, node, bit] = target
    return Automaton(steps.reshape(-1, 2), nodes, width)


def tree(codes: dict[str, int]) -> list[list[int | None]]:
    """Huffman codes as nodes; the two entries of a node, for a 0 and a 1, are the next node, -1 - value, or None."""
    nodes = [[None, None]]
    for code, value in codes.items():
        node = 0
        for bit in map(int, code[:-1]):
            if nodes[node][bit] is None:
                nodes[node][bit] = len(nodes)
                nodes.append([None, None])
            node = nodes[node][bit]
        nodes[node][int(code[-1])] = -1 - value
    return nodes


def nibbles(machine: Automaton, onward: bool) -> np.ndarray:
    """(states, 16) the state after each four bits, -1 where they are not legal, from each state, the last row being
    that of -1.

    Where an MCU ends inside a byte, the rest are ones (F.1.2.3), and the state is `end`; or, `onward`, the bits of the
    next MCU, and the state is end + 1 + one inside that.  No byte holds the ends of two: an MCU takes 14 bits or more.
    """
    end, nowhere = machine.end, [[-1, -1]]
    steps = np.concatenate([machine.steps, [[-1, end]], nowhere])
    if onward:
        steps = into_the_next(machine)
    two = steps[steps].reshape(-1, 4)
    return two[two].reshape(-1, 16)


def into_the_next(machine: Automaton) -> np.ndarray:
    """(2 * end + 2, 2) the state after each bit where an MCU is followed by the bits of the next, as in `nibbles`."""
    inside = np.where(machine.steps == machine.end, machine.end + 1, machine.steps)
    beyond = np.where((machine.steps < 0) | (machine.steps == machine.end), -1, machine.steps + machine.end + 1)
    return np.concatenate([inside, [[-1, machine.end]], beyond, [[-1, -1]]])


def parts_of(machine: Automaton) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each state, whether it stands in the Huffman code of a DC difference; how many bits this has, if none is read;
    and how many of them are left, if some are.  0 elsewhere."""
    states = np.arange(machine.end)
    coefficient, place = states // machine.width % 65, states % machine.width - machine.nodes
    count = np.where((coefficient == 1) & (place >= 0), place % LONGEST_VALUE + 1, 0)
    begins = place >= LONGEST_VALUE
    return (coefficient == 0) & (place < 0), count * begins, count * ~begins


def least_differences(machine: Automaton) -> np.ndarray:
    """(end + 1,) the least number other than negative that a DC difference can still be, before its sign; the last is
    that of -1."""
    code, size, _ = parts_of(machine)
    least = np.append((1 << size) >> 1, FAR)
    for _ in range(16):
        least[:-1][code] = least[machine.steps[code]].min(1)
    return least


def bytes_to_end(machine: Automaton) -> np.ndarray:
    """(end + 1,) the fewest bytes from each state to the end of the MCU, the bits filled up and an FF stuffed: a fixed
    point, reached in a few rounds.

    Whether a DC can stay within its bounds is not known here, so of DC differences the least are read, of which one can
    always follow, and their bits as if they were to fill an FF.
    """
    end, (code, size, left) = machine.end, parts_of(machine)
    steps = np.concatenate([machine.steps, [[-1, end], [-1, -1]]])
    forced = np.concatenate([size + left > 0, [False, False]])
    least, chosen = least_differences(machine), np.full((end + 2, 2), True)
    chosen[:end][code] = least[machine.steps[code]] == least[machine.steps[code]].min(1, keepdims=True)
    away = np.full(end + 2, FAR, np.int32)  # the last is that of -1
    away[end] = 0

    def best(zero: np.ndarray, one: np.ndarray) -> np.ndarray:
        zero, one = (np.where(chosen[:, bit], each[steps[:, bit]], FAR) for bit, each in enumerate((zero, one)))
        return np.where(forced, np.maximum(zero, one), np.minimum(zero, one))

    while True:
        ones, other = 2 + away, 1 + away  # after a byte, by whether it is FF
        for _ in range(8):
            ones, other = best(other, ones), best(other, other)
        if (ones[:end] >= away[:end]).all():
            return away[: end + 1]
        away[:end] = np.minimum(away[:end], ones[:end])


@dataclass(frozen=True)
class Layout:
    """The numbers of the local states of `scan`.

    First those of the automaton, which also stand between two bytes of which one ends inside a code; then those that
    wait for the 00 after an FF; the prefix's; and four: `over`, the MCU and its padding are read; `marker`, an FF after
    that; `closed`, the suffix is read; `ended`, the file.
    """

    end: int  # states of the automaton
    after_ff: np.ndarray  # the states of `nibbles` before which a stuffed 00 may come
    prefix: int  # bytes

    waiting = property(lambda self: np.arange(self.end, self.end + len(self.after_ff)))
    in_prefix = property(lambda self: self.end + len(self.after_ff))
    over = property(lambda self: self.in_prefix + self.prefix)
    marker = property(lambda self: self.over + 1)
    closed = property(lambda self: self.over + 2)
    ended = property(lambda self: self.over + 3)
    size = property(lambda self: self.over + 4)
    unit = property(lambda self: 1 << bits_of(self.size))  # of rules in an entry of the table


def scan(
    machine: Automaton,
    dc: list[tuple[int, int]],
    mcus: int,
    columns: int,
    restart: int,
    prefix: bytes = b"",
    suffix: bytes = b"",
) -> Table:
    """The grammar of bytes: `prefix`, the entropy-coded data of so many MCUs with a marker after every `restart` of
    them (0: never), `suffix` (EOI).  Local states are those of `Layout`, the count is the number of the MCU."""
    number, interval, rules = np.arange(mcus + 1), restart or mcus, rules_of(mcus + 1)
    closes = ((number + 1) % interval == 0) | (number + 1 == mcus)  # an interval ends with this MCU
    readings = [(nibbles(machine, onward=False), rules.number(closes, 0) if interval > 1 else ALWAYS)]
    if goes_on := rules.number(~closes & (number < mcus), 1):
        readings.append((nibbles(machine, onward=True), goes_on))
    all_ones = [half[half[: machine.end, 15], 15] for half, _ in readings]
    after_ff = np.unique(np.concatenate(all_ones))
    at = Layout(machine.end, after_ff[after_ff >= 0], len(prefix))

    layers = scan_layers(readings, at)
    layer = layers[0]
    for i, byte in enumerate(prefix):
        layer[at.in_prefix + i, byte] = ALWAYS * at.unit + (at.in_prefix + i + 1 if i + 1 < len(prefix) else 0)
    layer[at.over, 0xFF] = rules.number(number < mcus - 1 + bool(suffix), 1) * at.unit + at.marker
    for n in range(8):  # markers count the intervals before them, modulo 8 (B.2.1)
        due = (number < mcus) & ((number // interval - 1) % 8 == n)
        layer[at.marker, 0xD0 + n] = rules.number(due, 0) * at.unit
    if suffix:
        layer[at.marker, suffix[1]] = rules.number(number == mcus, 0) * at.unit + at.closed
    whole = rules.number(number == mcus - 1, 0)
    layer[at.closed if suffix else at.over, 257] = (ALWAYS if suffix else whole) * at.unit + at.ended
    layer[at.ended, 257] = ALWAYS * at.unit + at.ended

    away, tail = scan_rest(bytes_to_end(machine), at, mcus, interval, len(suffix))
    memory = decoded(machine, dc, at, (mcus // columns, columns), interval, closes)
    local_syntax, sizes = scan_syntax(machine, at, (mcus // columns, columns))
    local_syntax = np.pad(local_syntax, [(0, 0), (0, len(memory.sizes))])
    count_syntax = np.zeros((mcus + 1, local_syntax.shape[1]), np.int16)
    count_syntax[:, 3], count_syntax[:, 4] = np.divmod(np.minimum(number, mcus - 1), columns)
    advance, first = np.array(rules.advance, np.int32), at.in_prefix if prefix else 0
    table = Table(tuple(layers), away, rules.cost(tail), advance, local_syntax, count_syntax, sizes, first)
    return replace(table, sizes=sizes + memory.sizes, memory=replace(memory, plain=table))


def scan_layers(readings: list[tuple[np.ndarray, int]], at: Layout) -> list[np.ndarray]:
    """What bytes do inside MCUs, by two readings of a byte in which one ends: (states of `nibbles`, rule)."""
    end = at.end
    rule, local = np.zeros(2 * end + 2, np.int32), np.zeros(2 * end + 2, np.int32)  # of each state of `nibbles`
    rule[:end], local[:end] = ALWAYS, np.arange(end)
    rule[end], local[end] = readings[0][1], at.over
    rule[end + 1 : -1], local[end + 1 : -1] = readings[-1][1], np.arange(end)
    layers, entry, first = [], rule * at.unit + local, 0
    for half, _ in readings:
        entry[-1], entry[:first] = NEVER, NEVER  # the second layer tells only what the first has not
        layers.append(np.zeros((at.size, 258), np.int32))
        layers[-1][:end, :256] = entry[half][half[:end]].reshape(end, 256)
        stuffed = np.zeros_like(entry)
        stuffed[at.after_ff] = np.where(entry[at.after_ff] > 0, rule[at.after_ff] * at.unit + at.waiting, NEVER)
        layers[-1][:end, 0xFF] = stuffed[half[half[:end, 15], 15]]
        first = end + 1
    layers[0][at.waiting, 0] = ALWAYS * at.unit + local[at.after_ff]
    return layers


def scan_rest(inside: np.ndarray, at: Layout, mcus: int, interval: int, suffix: int) -> tuple[np.ndarray, np.ndarray]:
    """The fewest tokens from each local state to the end of its MCU, and of what comes behind each MCU; `inside` is
    what `bytes_to_end` found."""
    number, away = np.arange(mcus + 1), np.full(at.size, FAR, np.int32)
    away[: at.end], away[at.waiting] = inside[: at.end], 1 + np.append(inside, inside[: at.end])[at.after_ff]
    away[at.in_prefix : at.over] = np.arange(at.prefix, 0, -1) + inside[0]
    away[at.over], away[at.marker] = 0, 1 + inside[0]
    markers = -(-mcus // interval) - 1 - np.minimum(number, mcus - 1) // interval  # that are still to come
    tail = np.maximum(mcus - 1 - number, 0) * inside[0] + 2 * markers + suffix + 1
    tail[mcus] = 2 - away[at.marker]  # there the second byte of the suffix and the end are left
    away[at.closed] = 1 - tail[mcus]
    away[at.ended] = -tail[mcus if suffix else mcus - 1]
    return away, tail


def scan_syntax(machine: Automaton, at: Layout, grid: tuple[int, int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """The syntax positions of the local states of `scan` (S, 5), and how many values each has: block, coefficient,
    node or bits left, and row and column of the MCU, which the count adds.

    Trees share no nodes, so that a number says which of them is read.  Before a stuffed 00 it says just that, in the
    prefix how far it is read; what follows the MCUs has blocks of its own.
    """
    end, width = machine.end, machine.width
    blocks = end // (65 * width)
    after_ff = np.where(at.after_ff > end, at.after_ff - end - 1, at.after_ff)
    inside = np.concatenate([np.arange(end), after_ff])
    block, coefficient, place = inside // (65 * width), inside // width % 65, inside % width
    which = 2 * (coefficient > 0) + (block >= blocks - 2)
    place = np.where(np.arange(len(inside)) < end, which * width + place, 4 * width)
    syntax = np.zeros((at.size, 5), np.int16)
    syntax[: len(inside), :3] = np.stack([block, coefficient, place], 1)
    syntax[len(inside) :, 0] = [*[blocks] * at.prefix, *range(blocks + 1, blocks + 5)]
    syntax[at.in_prefix : at.over, 2] = np.arange(at.prefix)
    return syntax, (blocks + 5, 65, 4 * width + 1, *grid)


# --- what was decoded -----------------------------------------------------------------------------------------------

NEAR = ((0, -1), (-1, 0), (-1, 1))  # rows and columns from a block to others: left, above, and right of that
STEPS = 32  # differences of DC that are told as they are; of larger ones ...
FINER = 8  # ... so many to every doubling
UNASKED = 8  # bytes of a token that are read on a GPU without asking whether there are any, which takes longer


def levels() -> np.ndarray:
    """What is told of a difference from -4095 to 4095: from 1 on, where 0 is for none."""
    size = np.arange(4096)
    large = STEPS + (FINER * np.log2(np.maximum(size, STEPS) / STEPS)).astype(int)
    level = np.where(size < STEPS, size, large)
    return np.concatenate([-level[:0:-1], level]) + level[-1] + 1


@dataclass(frozen=True, eq=False)
class Decoded(Memory):
    """The DC coefficients of a scan, in the order of its blocks, and what they tell of the one that is due and of the
    present one: how far zero and the DC of blocks near by, of the same component, lie from it.  While AC is read the
    next block's is due, for its first bits often share a byte with the last of AC; else both are the same.

    Until a DC is read, the DC to which its difference will be added stands in for it, and each bit of the difference
    adds its worth as it is read.  So what is told is what the bits still to come must be worth for both to be equal.

    Bytes are read four bits at a time, by states of `nibbles` with the next MCU behind each.  No four bits hold the
    ends of two differences, between which AC takes two or more.

    A token after which some DC cannot stay within its bounds is not legal.
    """

    end: int  # the last of the states of an MCU, behind which come those of the next
    closes: Array  # (counts,) whether nothing but ones to the end of a byte follow this MCU
    after: Array  # (states * 16, 3) the state after four bits, and what they add to the DC due before them and then
    due: Array  # (states, 7) the block whose DC is due, of the MCU or beyond it; the least and the largest that it can
    # be, and from where to where it may stand meanwhile, if a difference is not to be negative, and if it is
    inside: Array  # (S,) the state at each local one of the table; the last, which leads nowhere, outside of MCUs
    place: Array  # (S,) twice the block that is read at each local state, and one if it is its AC; far outside of MCUs
    blocks: int  # of an MCU
    before: Array  # (n + 1,) the block to whose DC the difference is added: n, one behind all, which is zero, for none
    near: Array  # (2 * n, 2, K) what is told at each place: slot n, which is zero, and blocks; slot n + 1 for none
    base: Array  # (2 * n, 2) of the block that is due, and of the present one
    first: Array  # (n + 2,) what the slots hold at first: zero, but for the last, which is far
    level: Array  # (8192,) what is told of a difference, which if negative counts from the end
    spelling: Array  # (vocab, longest) bytes of each token, -1 behind them
    plain: Table | None = None  # of bytes
    trusts: bool = False  # that the tokens which are read are legal, for an exact mask has left no others

    sizes = property(lambda self: (int(self.level.max()) + 1,) * self.near[0].size)
    waits = property(lambda self: self.spelling.shape[1] > UNASKED)

    def to(self, device: object) -> "Decoded":
        import torch

        arrays = ("after", "due", "inside", "place", "before", "near", "base", "first", "level", "spelling")
        moved = {name: torch.from_numpy(getattr(self, name)).to(device).long() for name in arrays}
        closes = torch.from_numpy(self.closes).to(device)
        return replace(self, plain=self.plain.tensors(device), trusts=True, closes=closes, **moved)

    def with_pairs(self, merges: Sequence[tuple[int, int]]) -> "Decoded":
        spelled = expansions(merges)
        spelling = np.full((len(spelled) + 2, max(map(len, spelled))), -1, np.int32)
        for row, each in zip(spelling, spelled, strict=False):
            row[: len(each)] = list(each)
        return replace(self, spelling=spelling)

    def begin(self, local: Array) -> State:
        return self.look(State(local, local * 0, None, local[:, None] * 0 + self.first))

    def allowed(self, states: State, legal: Array) -> Array:
        rows, tokens = self.rows(states.local)[:, None], self.rows(self.spelling[:, 0])
        rows, tokens = (rows + tokens * 0).reshape(-1), (rows * 0 + tokens).reshape(-1)
        each = State(states.local[rows], states.count[rows], None, states.values[rows])
        return self.take(each, tokens, legal.reshape(-1), []).reshape(legal.shape)

    def read(self, before: State, after: State, tokens: Array, legal: Array) -> tuple[State, Array]:
        if self.trusts:
            self.take(before, tokens, legal, None)
            return self.look(State(after.local, after.count, None, before.values)), legal
        changes, row = [], self.rows(before.local)
        kept = self.take(before, tokens, legal, changes)
        if (refused := legal & ~kept).any():
            for slots, were in reversed(changes):
                before.values[row, slots] += (were - before.values[row, slots]) * refused
        local = before.local + (after.local - before.local) * kept
        count = before.count + (after.count - before.count) * kept
        return self.look(State(local, count, None, before.values)), kept

    def take(self, place: State, tokens: Array, legal: Array, changes: list | None) -> Array:
        """Write down what some tokens are worth, as far as they are legal, and give whether they are (B,): unless None,
        `changes` holds what was there before, and bounds are asked."""
        row, spelled = self.rows(place.local), self.spelling[tokens]
        for number in range(spelled.shape[1]):
            byte = spelled[:, number]
            reads = legal & (byte >= 0)
            if number >= (UNASKED if self.trusts else 1) and not reads.any():
                break
            legal = self.read_byte(place, row, byte, reads, changes) & legal
            if number + 1 < spelled.shape[1]:
                place, *_ = self.plain.step(place, byte)
        return legal

    def read_byte(self, place: State, row: Array, byte: Array, reads: Array, changes: list | None) -> Array | bool:
        """Add what the bits of a byte are worth to the values, where it `reads` any."""
        values, nowhere, legal = place.values, len(self.due) - 1, True
        state, first = nowhere + (self.inside[place.local] - nowhere) * reads, place.count * self.blocks
        block, least, most, *_ = self.due[state].T
        for half in (byte >> 4 & 15, byte & 15):
            state, gain, ahead = self.after[state * 16 + half].T
            here, (block, *bounds) = first + block, self.due[state].T
            there = first + block
            moves = there > here
            were = values[row, here]
            values[row, here] = now = were + gain
            meanwhile = values[row, there]
            values[row, there] = then = meanwhile + ahead + moves * values[row, self.before[there]]
            if changes is not None:
                changes += [(here, were), (there, meanwhile)]
                legal = ((least <= now) & (now <= most) | ~moves) & legal
                least, most, *open_ = bounds
                kept = [(low <= then) & (then <= high) for low, high in (open_[:2], open_[2:])]
                legal = (kept[0] | kept[1] | self.closes[place.count] & (state > self.end)) & legal
        return legal

    def look(self, state: State) -> State:
        """A state with what is told there."""
        place = (state.count * (2 * self.blocks) + self.place[state.local]).clip(max=len(self.near) - 1)
        row = self.rows(state.local)[:, None]
        base = state.values[row, self.base[place]][..., None]
        apart = state.values[row[..., None], self.near[place]] - base
        told = self.level[apart.clip(-4096, 4095)].reshape(len(place), -1)
        return State(state.local, state.count, told, state.values)

    def rows(self, local: Array) -> Array:
        return (local * 0 + 1).cumsum(0) - 1


def decoded(
    machine: Automaton, dc: list[tuple[int, int]], at: Layout, grid: tuple[int, int], interval: int, closes: np.ndarray
) -> Decoded:
    """The memory of `scan`."""
    end, blocks = machine.end, machine.end // (65 * machine.width)
    block, coefficient, part = np.unravel_index(np.arange(end), (blocks, 65, machine.width))
    in_ac = (coefficient > 1) | (coefficient == 1) & (part < machine.nodes)
    nowhere, beyond = 2 * end + 1, np.concatenate([block + in_ac, [blocks], blocks + block + in_ac, [0]])
    after, gain = into_the_next(machine), np.zeros((2, 2 * end + 2, 2), np.int16)
    gain[0, :end] = gain[0, end + 1 : -1] = worth(machine)
    for _ in range(2):  # two bits, then four
        moved = (beyond[after] > beyond[:, None])[..., None]
        here = gain[0][..., None] + np.where(moved, 0, gain[0][after])
        ahead = gain[1][..., None] + np.where(moved, gain[0][after], gain[1][after])
        after = after[after].reshape(len(after), -1)
        gain = np.stack([here, ahead]).reshape(2, *after.shape) * (after >= 0)
    inside = np.full(at.size, nowhere, np.int32)
    inside[:end] = np.arange(end)
    before, near = neighbours(blocks, grid, interval)
    near, base = map(due_and_present, (near, np.arange(len(near))))
    first, level = np.zeros(len(before) + 1, np.int32), np.roll(np.append(0, levels()), -4096).astype(np.int16)
    first[-1] = -(1 << 20)
    place = np.full(at.size, len(near), np.int32)
    place[:end] = 2 * block + in_ac
    place[at.waiting] = place[np.where(at.after_ff > end, at.after_ff - end - 1, at.after_ff)]
    after = np.stack([np.where(after < 0, nowhere, after), *gain], -1).reshape(-1, 3).astype(np.int32)
    spelling = np.append(np.arange(256), [-1, -1])[:, None].astype(np.int32)
    due = np.stack([beyond, *kept_open(machine, dc, beyond % blocks)], -1).astype(np.int32)
    return Decoded(end, closes, after, due, inside, place, blocks, before, near, base, first, level, spelling)


def kept_open(machine: Automaton, dc: list[tuple[int, int]], due: np.ndarray) -> Iterator[np.ndarray]:
    """What Decoded.due says of bounds, from the number of the block that is due at each state."""
    far, (code, size, left) = 1 << 16, parts_of(machine)
    least, rest = np.minimum(least_differences(machine)[:-1], far), (1 << left) - 1
    most = np.where(code, far, (1 << size) - 1)
    least, most = np.stack([least, -most]), np.stack([most + rest, rest - least])  # not negative, negative
    least, most = (np.concatenate([each, [[0], [0]], each, [[0], [0]]], 1) for each in (least, most))
    bounds = np.array(dc).T[:, (due >= due.max() - 1).astype(int)]
    bounds[:, -1] = -far, far
    yield from bounds
    for low, high in zip(least, most, strict=True):
        yield bounds[0] - high
        yield bounds[1] - low


def due_and_present(of: np.ndarray) -> np.ndarray:
    """What each block has (n, ...), for its DC and its AC in turn (2 * n, 2, ...): of the block that is due, then of
    the present one."""
    following = np.append(of[1:], of[-1:], 0)
    pairs = np.stack([np.stack([of, of], 1), np.stack([following, of], 1)], 1)
    return pairs.reshape(-1, *pairs.shape[2:])


def worth(machine: Automaton) -> np.ndarray:
    """(end, 2) what a 0 and a 1 add to the DC difference to which they belong (F.1.2.1): of `size` bits, those below
    2 ** (size - 1) stand for negative numbers, which begin at 1 - 2 ** size."""
    _, size, left = parts_of(machine)
    return np.stack([np.where(size, 1 - (1 << size), 0), (1 << size + left) >> 1], 1)


def neighbours(blocks: int, grid: tuple[int, int], interval: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each block of a scan, those of two MCUs behind the last included, the number of the one before it of its
    component (n + 1,), their count n where there is none; and (n, K) that count and the numbers of those in the
    directions of NEAR, as far as they come before it, n + 1 for none."""
    scale, (rows, columns) = round((blocks - 2) ** 0.5), grid
    count = (rows * columns + 2) * blocks
    none = count + 1
    before, near = np.full(count + 1, count, np.int32), np.full((count, 1 + len(NEAR)), none)
    near[: rows * columns * blocks, 0], places = count, {}
    for number in range(rows * columns * blocks):
        mcu, block = divmod(number, blocks)
        (y, x), luma = divmod(mcu, columns), block < blocks - 2
        place = (0, y * scale + block // scale, x * scale + block % scale) if luma else (block, y, x)
        if 0 < block < blocks - 2:
            before[number] = number - 1
        elif mcu % interval:
            before[number] = (mcu - 1) * blocks + (block or blocks - 3)
        near[number, 1:] = [places.get((place[0], place[1] + down, place[2] + right), none) for down, right in NEAR]
        places[place] = number
    return before, near
