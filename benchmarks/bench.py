"""What costs what, each figure beside what it is compared with, both measured in the same run.

    python benchmarks/bench.py                 # every row
    python benchmarks/bench.py step --out benchmarks/results
    python benchmarks/bench.py --list

Each name is a module beside this file with a function ``run() -> list[Row]``. A row that misses its
bar is said so, and the exit status is then 1. How to read the rows: docs/performance.md.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import cpu_name  # beside this file
from rows import Row

MODULES: dict[str, str] = {  # name: module
    name: name for name in ("step", "loader", "evaluate", "embed", "scaling")
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all without.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for NAME.json.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say which there are.")] = False,
) -> None:
    """Measure, print the rows, keep them as JSON."""
    if only_list:
        print("\n".join(MODULES))
        return
    if unknown := [name for name in names or () if name not in MODULES]:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}: {', '.join(MODULES)}")
    missed = 0
    for name in names or MODULES:
        rows: list[Row] = importlib.import_module(MODULES[name]).run()
        print(f"\n{name}\n{table(rows)}", flush=True)
        missed += sum(row.passed is False for row in rows)
        if out is not None:
            keep(out / f"{name}.json", rows)
    sys.exit(1 if missed else 0)


def table(rows: Sequence[Row]) -> str:
    """Rows in aligned columns."""
    cells = [("what", "value", "against", "ratio", "bar", "")]
    for row in rows:
        word = {True: "reached", False: "MISSED", None: ""}[row.passed]
        cells.append(
            (row.name, f"{row.value:,.4g} {row.unit}", f"{row.against:,.4g}", f"{row.ratio:.2f}")
            + (row.bar, word)
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def keep(file: Path, rows: Sequence[Row]) -> None:
    """Write the rows and what they were measured on, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), "rows": [asdict(row) for row in rows]}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    os.replace(part, file)


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    typer.run(main)
