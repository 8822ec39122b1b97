"""Muon, an optimizer of matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import sharded_as

AT_ONCE = 1 << 26  # numbers of the matrices that are gathered together, for memory's sake


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix U S V^T (N, rows, columns): its directions, all of the same size.

    Newton and Schulz's iteration with Jordan's coefficients, which bring every singular value to between 0.7 and 1.2.
    In float32 on a CPU, for few of them are fast in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    wide = wide.to(torch.bfloat16 if wide.is_cuda else torch.float32)
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if matrices.shape[-2] <= matrices.shape[-1] else wide.mT).to(matrices.dtype)


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(weight: Tensor, rows: Tensor) -> Tensor:
    """A matrix of which every process has the rows that it has of the weight."""
    if not isinstance(weight, DTensor) or weight.device_mesh.size() == 1:
        return rows
    size = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, **size).full_tensor()


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, so that rare directions are learned as fast as frequent ones.

    A step is scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that both share a
    learning rate.  Sharded matrices are gathered for it: every process makes the same step, and takes its rows of it.
    """

    def __init__(self, params: Iterable[Tensor | dict], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # matrices of one shape take one product
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for shape, weights in alike.items():
                count = max(1, AT_ONCE // shape.numel())
                for first in range(0, len(weights), count):
                    self.change(weights[first : first + count], group, 0.2 * max(shape) ** 0.5)

    def change(self, weights: list[Tensor], group: dict, scale: float) -> None:
        """Take the step of some weights of the same shape."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta, grads, values = (
            [own(tensor) for tensor in tensors]
            for tensors in ([self.state[weight]["momentum"] for weight in weights], [w.grad for w in weights], weights)
        )
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's
        changes = orthogonal(torch.stack([whole(*pair) for pair in zip(weights, ahead, strict=True)]))
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        parts = [own(sharded_as(*pair)) for pair in zip(weights, changes, strict=True)]
        torch._foreach_add_(values, parts, alpha=-group["lr"] * scale)
