"""Frequent pairs of symbols, to become tokens: byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909)."""

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from codec import LARGEST_VOCAB, Codec, Tokenizer
from plumbing.command import UserError

LONGEST = 64  # symbols that one token may stand for: on plain grounds they would grow to whole rows of a picture


def learn_pairs(codec: Codec, documents: Sequence[np.ndarray], vocab: int) -> Tokenizer:
    """Merge the most frequent pair of neighbours (the smallest of equals) until there are `vocab` tokens or no pair
    is left.

    All pairs are counted once; a merge then changes the counts of its own neighbours only.  The heap holds a pair
    under every count that it had, of which only the present one is obeyed.
    """
    if not codec.symbols + 2 <= vocab <= LARGEST_VOCAB:
        raise UserError(f"vocab is {vocab}: choose {codec.symbols + 2} (no pairs) to {LARGEST_VOCAB:,}")
    mark, sizes, merges = LARGEST_VOCAB, [1] * codec.symbols, []  # between documents; symbols of each token
    stream = np.concatenate([np.append(document, mark).astype(np.uint16) for document in documents])
    counts, heap = Counter(), []

    def count(pairs: np.ndarray, sign: int) -> None:
        """Add or take off pairs, as numbers left * LARGEST_VOCAB * 2 + right."""
        for pair, number in zip(*map(np.ndarray.tolist, np.unique(pairs, return_counts=True)), strict=True):
            counts[pair] += sign * number
            left, right = divmod(pair, 2 * LARGEST_VOCAB)
            if mark not in (left, right) and sizes[left] + sizes[right] <= LONGEST:
                heapq.heappush(heap, (-counts[pair], pair))

    def pairs(*places: np.ndarray) -> np.ndarray:
        """Those that begin at some places of the stream, each once."""
        begins = np.zeros(len(stream), bool)
        for at in places:
            begins[at] = True
        at = np.flatnonzero(begins[:-1])  # the last has no right neighbour, nor has the one at -1
        return stream[at].astype(np.int64) * (2 * LARGEST_VOCAB) + stream[at + 1]

    count(pairs(np.arange(len(stream))), 1)
    for token in tqdm(range(codec.symbols, vocab - 2), "pairs", disable=None, leave=False):
        while heap and -heap[0][0] != counts[heap[0][1]]:
            heapq.heappop(heap)
        if not heap or heap[0][0] > -2:
            break
        left, right = divmod(heap[0][1], 2 * LARGEST_VOCAB)
        sizes.append(sizes[left] + sizes[right])
        merges.append((left, right))
        at = np.flatnonzero((stream[:-1] == left) & (stream[1:] == right))
        if left == right:  # of a run of them every second one, from its first
            begins = np.flatnonzero(np.diff(at, prepend=-2) != 1)
            at = at[(np.arange(len(at)) - np.repeat(begins, np.diff(begins, append=len(at)))) % 2 == 0]
        count(pairs(at - 1, at, at + 1), -1)
        stream[at] = token
        stream = np.delete(stream, at + 1)
        at = at - np.arange(len(at))  # where they are now
        count(pairs(at - 1, at), 1)
    return Tokenizer(codec, tuple(merges))
