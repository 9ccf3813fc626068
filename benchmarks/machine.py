"""Which machine it is."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As its maker calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "ignore").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def this_machine() -> str:
    """The CPU, and what it computes in: virtual machines of one name differ in that."""
    from vicvlm_cli.device import supports_bf16  # imports torch

    return f"{cpu_name()}, {'bfloat16' if supports_bf16('cpu') else 'float32'}"
