"""Which device to compute on, and whether bfloat16 pays there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch


def best_device() -> torch.device:
    """The GPU if there is one (CUDA, then Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def supports_bf16(device: torch.device | str) -> bool:
    """Whether autocast to bfloat16 is faster than float32 on `device`.

    CUDA: compute capability 8.0 on (older cards emulate it). CPU: only with instructions for it
    (AVX512-BF16 or AMX); without them bfloat16 is several times slower than float32.
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
    return "avx512_bf16" in flags or "amx_bf16" in flags
