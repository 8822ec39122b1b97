"""Muon, an optimizer of matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import sharded_as


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of a matrix U S V^T: its directions, all of the same size.

    Newton and Schulz's iteration with Jordan's coefficients, which bring every singular value to between 0.7 and 1.2.
    In float32 on a CPU, for few of them are fast in bf16.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide.to(torch.bfloat16 if wide.is_cuda else torch.float32)
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if matrix.shape[0] <= matrix.shape[1] else wide.T).to(matrix.dtype)


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
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                memory, share = self.state[weight], group["momentum"]
                if not memory:
                    memory["momentum"] = torch.zeros_like(weight)
                memory["momentum"].lerp_(weight.grad, 1 - share)
                ahead = weight.grad.lerp(memory["momentum"], share)  # Nesterov's
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
                change = sharded_as(weight, orthogonal(whole))
                weight.add_(change, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)
