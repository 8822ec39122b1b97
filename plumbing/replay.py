"""A step of sampling, recorded on a GPU as one graph and replayed, for its hundreds of kernels take longer to launch
than to run.  So every tensor stays where it is, and how far the files have come is a number on the GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grammar import Table
from model import Cache, Llama

STRIDE = 256  # places by which what attention looks at grows, for then the step is recorded anew


def can_record(model: Llama, grammar: object) -> bool:
    """Whether a step of sampling can be recorded: not where weights are gathered for it, where the grammar asks Python,
    or where heads share keys, for the attention that is fast then takes no mask."""
    weight, config = model.lm_head.weight, model.config
    alone = weight.is_cuda and not isinstance(weight, DTensor) and config.heads == config.kv_heads
    return alone and isinstance(grammar, Table) and not grammar.memory.waits


class Window(Cache):
    """A Cache that looks at more places than it has filled, and hides those."""

    def __init__(self, cache: Cache, device: torch.device):
        self.most, self.keys, self.values, self.length = cache.most, cache.keys, cache.values, 0  # now of the window
        self.filled = torch.full((1,), cache.length, device=device)

    def begin(self, count: int) -> Tensor:
        self.place = self.filled.clone()
        self.filled += count
        self.hidden = torch.where(torch.arange(self.length, device=self.place.device) <= self.place, 0.0, -torch.inf)
        return self.place

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.grow(k, v, self.length)
        for held, new in ((self.keys, k), (self.values, v)):
            held[layer].index_copy_(2, self.place, new)
        self.hidden = self.hidden.to(k.dtype)  # once, for the other layers find it so
        keys, values = (held[layer, :, :, : self.length] for held in (self.keys, self.values))
        return keys, values, self.hidden.expand(1, 1, 1, -1)


class Replay:
    """Calls a step that takes tensors and gives as many of the same shapes; from the second call on, its recording.

    The tensors of the first call's result are where those of all later ones lie.  `forget` when shapes change.
    """

    def __init__(self, step: Callable[..., tuple]):
        self.step, self.graph, self.held = step, None, None

    def forget(self) -> None:
        self.graph = self.held = None

    def __call__(self, *carry: Any) -> tuple:
        if self.held is None:
            self.held = self.step(*carry)
        else:
            self.graph = self.graph or self.record()
            self.graph.replay()
        return self.held

    def record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.once()
        return graph

    def once(self) -> None:
        """The step from what is held to what is held."""
        for old, new in zip(tensors(self.held), tensors(self.step(*self.held)), strict=True):
            if old is not new:
                old.copy_(new)


def tensors(carry: Any) -> Iterator[Tensor]:
    for each in carry:
        yield from [each] if isinstance(each, Tensor) else vars(each).values()
