"""The codewords of H.264's syntax elements, each element as a binary tree of those that may be there.

Clauses and tables are those of ITU-T H.264.  What the encoder never writes with h264.py's settings has no codeword
here: B slices, macroblocks cut into parts, raw samples (I_PCM), a quantizer that changes, and prediction from
macroblocks of other slices, of which there is one in each.
"""

from functools import cache

import numpy as np

REFS = 3  # frames back that a macroblock may be copied from
I_QP = -3  # the quantizer of intra frames less that of others: x264 divides the step by 1.4
MV_X = -8192, 8191  # quarter pixels (A.3.1)
MV_Y = {10: 256, 11: 512, 12: 512, 13: 512, 20: 512, 21: 1024, 22: 1024, 30: 1024}  # by level (table A-1) ...
MV_Y |= dict.fromkeys((31, 32, 40, 41, 42, 50, 51, 52), 2048)  # ... quarter pixels, both ways


class Node(list):
    """[what follows a 0, what follows a 1]: a Node, the value of a whole codeword, or None where none is legal."""

    __slots__ = ("id", "name", "near", "away", "read")
    # its number; the tree's name; the bit that leads to the nearest end of the macroblock, and how far (bits) that is;
    # by byte what a whole byte leads to, and the bits that are left of it, the last one first

    def byte(self, byte: int) -> tuple[object, list[int]]:
        """Where a whole byte leads, and the bits left of it, the last first; kept in `read`."""
        node, bits = self, [byte >> shift & 1 for shift in range(8)]
        while bits and type(node) is Node:
            node = node[bits.pop()]
        self.read[byte] = node, bits
        return node, bits

    def open(self, bits: int = 8) -> np.ndarray:
        """(2 ** bits,) whether the next bits may be these."""
        if not bits:
            return np.ones(1, bool)
        half = 1 << bits - 1
        ways = [each.open(bits - 1) if type(each) is Node else np.full(half, each is not None) for each in self]
        return np.concatenate(ways)


NODES: dict[tuple[str, object], int] = {}  # of all trees, in the order in which `number_nodes` makes them


def tree(name, codes, after=lambda value: 0, label=lambda prefix: prefix):
    """The tree of {codeword: value}; `after` is how many bits more a macroblock takes after a value, about.  `label`
    names a node by the bits that lead to it: nodes of one name and label share a number, which the model is told."""

    def grow(prefix, codes):
        if prefix in codes or not codes:
            return codes.get(prefix)
        node, at = Node(), len(prefix)
        node += [grow(prefix + bit, {code: value for code, value in codes.items() if code[at] == bit}) for bit in "01"]
        node.name, node.id, node.read = name, NODES.setdefault((name, label(prefix)), len(NODES)), {}
        ways = [
            (1 + (child.away if type(child) is Node else after(child)), bit)
            for bit, child in enumerate(node)
            if child is not None
        ]
        node.away, node.near = min(ways)
        return node

    return grow("", codes)


def ue(value):  # 9.1
    return "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"


def se(value):  # 9.1.1
    return ue(2 * value - 1 if value > 0 else -2 * value)


def rows(lengths, values):
    """A {codeword: column} for each row of codewords, given as their lengths and values, a digit (base 36) each."""
    for row in zip(lengths.split(), values.split(), strict=True):
        yield {f"{int(v, 36):0{int(n, 36)}b}": column for column, (n, v) in enumerate(zip(*row, strict=True))}


COEFF_TOKEN = [  # table 9-5: a row for each total of coefficients, a column for each number of trailing ones
    (
        "1 62 863 9875 a986 ba97 dba8 ddb9 ddda eedb eeed ffee fffe gfff gggf gggg gggg",
        "1 51 741 7653 7653 7654 f654 be54 8ad4 fe94 badc fe9c bad8 f19c bed8 7a9c 4658",
    ),
    (
        "2 62 653 7664 8664 8775 9886 b996 bbb7 cbb9 cccb cccb dddc dddd dedd eeed eeee",
        "3 b2 773 7a95 7654 4656 7658 f654 bed4 fa94 bedc 8a98 fedc ba9c 7b68 98a1 7654",
    ),
    (
        "4 64 654 6554 7554 7554 7664 7664 8775 8876 9887 9988 9998 a999 aaaa aaaa aaaa",
        "f fe bfd 8cec fabb b89a 9ed9 8a98 fedd beac fadc be9c 8ad8 d79c 9cba 5876 1432",
    ),
    None,  # six bits
    ("2 61 663 6776 6887", "1 71 461 3325 2320"),
]
TOTAL_ZEROS = (  # tables 9-7 and 9-8: a row for each total of coefficients from 1
    "1334455667788999 333334444556666 43334433455656 5344333434555 444333334545 65333333436 6533323436 645322336 "
    "66422325 5532224 443313 44213 3312 221 11",
    "1323232323232321 765435432323210 57654343232110 3754654332210 543765432110 11765432110 1154332110 111332210 "
    "10132111 1013211 011213 01111 0111 011 01",
)
TOTAL_ZEROS_DC = "1233 122 11", "1110 110 10"  # table 9-9 (a)
RUN_BEFORE = (  # table 9-10: a row for each number of zeros left from 1
    "11 122 2222 22233 223333 2333333 3333333456789ab",
    "10 110 3210 32110 323210 3013254 765432111111111",
)


@cache
def coeff_token(table, most):
    """(coefficients, trailing ones) of a block of at most so many, by one of the tables that its neighbours select."""
    if table == 3:
        codes = {f"{4 * n - 4 + ones:06b}": (n, ones) for n in range(1, 17) for ones in range(min(3, n) + 1)}
        codes["000011"] = 0, 0
    else:
        codes = {code: (n, ones) for n, row in enumerate(rows(*COEFF_TOKEN[table])) for code, ones in row.items()}
    codes = {code: value for code, value in codes.items() if value[0] <= most}
    return tree(f"coeff_token{table}", codes, lambda value: 8 * value[0])


@cache
def total_zeros(total, most):
    """Zeros before the last of `total` coefficients, in a block of at most `most` (tables 9-7 to 9-9)."""
    name, tables = ("total_zeros_dc", TOTAL_ZEROS_DC) if most == 4 else ("total_zeros", TOTAL_ZEROS)
    codes = [*rows(*tables)][total - 1]
    return tree(f"{name}{total}", {code: zeros for code, zeros in codes.items() if zeros <= most - total})


@cache
def run_before(zeros):
    """Zeros right before a coefficient, of so many that are left (table 9-10)."""
    codes = [*rows(*RUN_BEFORE)][min(zeros, 7) - 1]
    return tree(f"run_before{min(zeros, 7)}", {code: run for code, run in codes.items() if run <= zeros})


def fixed(name, size):
    """Numbers of `size` bits."""
    return tree(name, {f"{value:0{size}b}": value for value in range(1 << size)}, label=len) if size else 0


PREFIX = tree("level_prefix", {"0" * n + "1": n for n in range(16)})  # above 15 only in High profiles, 9.2.2.1
SUFFIX = [fixed("level_suffix", size) for size in range(13)]
SIGNS = [fixed("trailing_ones_sign_flag", size) for size in range(4)]
STOP = tree("rbsp_stop_one_bit", {"1": 1})
SKIP = tree("mb_skip_run", {ue(0): 0, ue(1): 1}, lambda run: 0 if run else 8)
QP_DELTA = tree("mb_qp_delta", {"1": 0})  # the quantizer is constant
CHROMA_MODE = tree("intra_chroma_pred_mode", {"1": 0})  # DC: all others need a neighbour
CBP_ORDER = {  # table 9-4: chroma << 4 | luma
    "intra": "47 31 15 0 23 27 29 30 7 11 13 14 39 43 45 46 16 3 5 10 12 19 21 26 28 35 37 42 44 1 2 4 8 17 18 20 24 6 "
    "9 22 25 32 33 34 36 40 38 41",
    "inter": "0 16 1 2 4 8 32 3 5 10 12 15 47 7 11 13 14 6 9 31 35 37 42 44 33 34 36 40 39 43 45 46 17 18 20 24 19 21 "
    "26 28 23 27 29 30 22 25 38 41",
}
CBP = {
    kind: tree(
        f"coded_block_pattern_{kind}",
        {ue(i): int(value) for i, value in enumerate(values.split())},
        lambda value: 4 * (value & 15).bit_count() + 8 * (value >> 4),
    )
    for kind, values in CBP_ORDER.items()
}
REF_IDX = [None, 0, tree("ref_idx1", {"1": 0, "0": 1})]  # by how many there are (9.1, te(v))
REF_IDX += [tree("ref_idx", {ue(i): i for i in range(n)}) for n in range(3, 17)]  # more than REFS are never read, but
# the numbers of the nodes behind them, which data and models hold, depend on these


@cache
def mb_type(kind):
    """Tables 7-11 and 7-13: (form, coded block pattern, None where it follows); 16x16 is predicted by its mean (DC)."""
    types = {0: ("I4x4", None)}
    types |= {3 + 4 * chroma + 12 * luma: ("I16x16", 16 * chroma + 15 * luma) for chroma in range(3) for luma in (0, 1)}
    if kind == "P":
        types = {0: ("P", None)} | {5 + code: value for code, value in types.items()}
    after = lambda value: 50 if value[0] == "I4x4" else value[1] or 0  # noqa: E731
    return tree(f"mb_type_{kind}", {ue(code): value for code, value in types.items()}, after)


@cache
def mvd(name, least, most):
    """A difference of motion vectors, se(v), within bounds, in quarter pixels."""

    def shape(prefix):  # zeros, and bits after them
        return len(prefix) - len(prefix.lstrip("0")), len(prefix.lstrip("0"))

    return tree(name, {se(value): value for value in range(least, most + 1)}, label=shape)


NEEDS = "B", "A", "", "B", "AB", "AB", "AB", "B", "A"  # the neighbours, left and above, of each mode (8.3.1.2)


@cache
def intra_mode(predicted, left, above):
    """prev_intra4x4_pred_mode_flag, rem_intra4x4_pred_mode (8.3.1.1)"""
    modes = {"1": predicted} | {f"0{rem:03b}": rem + (rem >= predicted) for rem in range(8)}
    legal = {code: mode for code, mode in modes.items() if set(NEEDS[mode]) <= set("A" * left + "B" * above)}
    return tree(f"intra4x4_pred_mode{int(left)}{int(above)}", legal)


IDR, OTHER = b"\0\0\1\x65", b"\0\0\1\x41"  # start codes and NAL unit headers (7.3.1); nal_ref_idc is 3, 2


@cache
def start(nals):
    """A start code, of 4 bytes where an access unit begins (B.1.2), but for the first, which follows what is left
    out."""
    return tree("start code", {"".join(f"{byte:08b}" for byte in nal): nal for nal in nals}, label=len)


@cache
def header(kinds, macroblock, number, idr, refs):  # 7.3.3
    """All of a slice header but the kind of slice is known before: (codeword of the whole: kind)."""
    codes = {}
    for kind in kinds:
        bits = ue(macroblock) + ue(5 if kind == "P" else 7) + ue(0) + f"{number % 16:04b}" + ue(idr) * (kind == "IDR")
        if kind == "P":  # num_ref_idx_active_override, ref_pic_list_modification_flag
            bits += ("0" if refs == REFS else "1" + ue(refs - 1)) + "0"
        bits += "00" if kind == "IDR" else "0"  # dec_ref_pic_marking
        codes[bits + se(0 if kind == "P" else I_QP) + ue(0) + se(0) + se(0)] = kind  # slice_qp_delta, deblocking filter
    return tree("slice_header", codes, label=len)


def number_nodes():
    """Make all trees in one order, for a node must have the same number in every run."""
    for most in (16, 15, 4):
        for table in (4,) if most == 4 else range(4):
            coeff_token(table, most)
        for total in range(1, most):
            total_zeros(total, most)
    for zeros in range(1, 16):
        run_before(zeros)
    for kind in "IP":
        mb_type(kind)
    for left in (False, True):
        for above in (False, True):
            for predicted in range(9):
                intra_mode(predicted, left, above)
    for name in ("mvd_x", "mvd_y"):
        for zeros in range(16):
            for more in range(zeros + 1 + (zeros > 0)):
                NODES.setdefault((name, (zeros, more)), len(NODES))
    for length in range(8 * len(OTHER) + 8):
        NODES.setdefault(("start code", length), len(NODES))
    for length in range(80):
        NODES.setdefault(("slice_header", length), len(NODES))


number_nodes()
