"""Which device to compute on, whether bfloat16 pays there, and how the CPU's memory is reused."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

# Of oneDNN, and of ideep, through which torch calls it. A forward pass of a transformer needs a
# dozen kernels, however deep it is.
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KERNELS = 64


def best_device() -> torch.device:
    """The GPU if there is one (CUDA, then Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def supports_bf16(device: torch.device | str) -> bool:
    """Whether autocast to bfloat16 is faster than float32 on `device`.

    CUDA: compute capability 8.0 on (older cards emulate it). CPU: only with AMX, or with
    AVX512-BF16 on AMD's; without instructions for it bfloat16 is several times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _cpu_has_bf16()


@cache
def _cpu_has_bf16() -> bool:
    # torch.cpu's own probes are private and differ between releases; without /proc (macOS,
    # Windows) the safe answer is no.
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    # Intel's AVX512-BF16 without AMX, as on virtual machines that hide it, multiplies no faster
    # than float32, and a training step takes half as long again (docs/performance.md).
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)


def keep_freed_memory() -> bool:
    """Let the C library keep large blocks that are freed, for the next step's; whether it does.

    By default it gives blocks of many megabytes back at once, and the kernel clears each page again
    when the next step asks for it: 4 to 7 % of a training step on the CPU. The peak stays about
    what it is. Only with glibc; elsewhere nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def keep_few_kernels() -> None:
    """Let the CPU's compiled kernels be kept for few shapes; only before the first is made.

    In bfloat16 oneDNN compiles a kernel for every shape that a layer meets, a few hundred kB each,
    and it and torch's layer above it keep 1,024 of them apiece: hundreds of megabytes where batches
    come in many shapes. Where those of one shape follow each other, the latest are enough. Both
    read their bounds once in a process's life, so that a training after this in the same process,
    or in one that it starts, has them too. What the user has set stands.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS))
