"""Many processes as one: torchrun's, and FSDP2, which splits the weights over them.  Alone on a CPU, none happens."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend

from model import Llama

# All kernels of attention but cuDNN's, which is built anew for each length: that pays in training alone.
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PATIENCE = timedelta(hours=1)  # of a process for the others: large checkpoints take a while


def best_device() -> torch.device:
    """This process's GPU where there is one, else a Mac's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device: torch.device) -> torch.dtype:
    """What to compute in: bf16 where a GPU has it, else float32, which most CPUs are faster in."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32


def at_once(model: Llama, length: int) -> int:
    """How many files of so many tokens: their keys and values fill no more than a quarter of a GPU, or 4 GB."""
    config, device = model.config, model.lm_head.weight.device
    budget = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 4 << 30
    numbers = 2 * config.layers * config.kv_heads * (config.dim // config.heads) * length
    return max(1, min(64, budget // (numbers * precision(device).itemsize)))


def join() -> torch.device:
    """Join the processes that torchrun started; one GPU is a world of one, one CPU or one Mac needs none."""
    device = best_device()
    if device.type == "mps" and "RANK" in os.environ:  # weights cannot be sharded there
        device = torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    elif device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: object, group: dist.ProcessGroup | None = None) -> list:
    """What each process has, in their order."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value, group=group)
    return values


def add_up(value: Tensor) -> Tensor:
    """The sum over all processes, written into the tensor itself."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def sync_gradients(model: Llama, now: bool) -> None:
    if dist.is_initialized():
        model.set_requires_gradient_sync(now)


@contextmanager
def gathered(model: Llama, device: torch.device) -> Iterator[None]:
    """Keep every block whole, for many short passes, where all of them fill no more than half a GPU."""
    size = sum(weight.numel() for weight in model.parameters()) * precision(device).itemsize
    fits = device.type != "cuda" or size <= torch.cuda.get_device_properties(device).total_memory // 2
    blocks = model.layers if dist.is_initialized() and fits else []
    for block in blocks:
        block.set_reshard_after_forward(False)
    yield
    for block in blocks:
        block.set_reshard_after_forward(True)
        block.reshard()


def shard(model: Llama, device: torch.device) -> None:
    """FSDP2: split every weight over the processes, block by block; compute in bf16 where there is a GPU for it, keep
    the weights, their gradients' sums and their moments in float32."""
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(precision(device), torch.float32, cast_forward_inputs=False)
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if world() > 1:  # plain sums: averages are not to be had from every version of gloo
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
