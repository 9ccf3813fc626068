"""What several processes need to train as one: gathers with gradient, global means, shared noise.

With one process each function is the plain local thing, so objectives are written once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """Number of processes training together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, [world_size * B, ...], with gradient to every process's own rows.

    A loss computed on the result by every process has, after the averaging of gradients that
    DistributedDataParallel does, exactly the gradient of one process on the joint batch.
    """
    if world_size() == 1:
        return x
    if not x.is_floating_point() or not x.requires_grad:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    return _Gather.apply(x)


class _Gather(torch.autograd.Function):
    """The rows of all processes; a row's gradient is the sum over what all did with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather_padded(x: Tensor, dim: int = 1) -> Tensor:
    """:func:`gather` of tensors whose size along ``dim`` differs, padded with zeros at the end."""
    if world_size() == 1:
        return x
    longest = torch.tensor(x.shape[dim], device=x.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    missing = int(longest) - x.shape[dim]
    if missing:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])
    return gather(x)


def global_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """This process's share of sum / count over all processes; the shares average to the mean.

    ``total`` is a scalar sum of this process; averaging over processes is what gradients and logs
    do, hence the factor ``world_size``.
    """
    counts = torch.as_tensor(count, dtype=torch.float32, device=total.device).clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return total * world_size() / counts.clamp(min=1)


def seed_modules(seed: int, step: int) -> None:
    """Begin anew what modules draw by themselves, such as dropout; as :class:`Noise`, by a step.

    Every process draws other numbers.
    """
    mixed = np.random.SeedSequence((seed, step, 1 + rank())).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed[0]))


class Noise:
    """Random numbers of one step, drawn for the global batch: each process takes its own rows.

    So a row's masks and negatives do not depend on how many processes share the batch. Numbers of
    another ``stream`` have nothing to do with these.
    """

    def __init__(self, seed: int, step: int, device: torch.device, stream: int = 0) -> None:
        # Mixed into one number: the CPU's generator looks at the low 32 bits only.
        entropy = (seed, step, 0, stream) if stream else (seed, step)
        mixed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        self.generator = torch.Generator(device).manual_seed(int(mixed[0]))
        self.device = device

    def rand(self, rows: int, *shape: int) -> Tensor:
        """Uniform [rows, *shape] in [0, 1): this process's rows of [world_size * rows, *shape]."""
        whole = torch.rand(
            (world_size() * rows, *shape), generator=self.generator, device=self.device
        )
        return whole[rank() * rows : (rank() + 1) * rows]
