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
