"""Cost against size: prepare, embed and evaluate over 1, 4 and 16 times as many pictures.

Each is run in a process of its own, which says how long the work took and how much memory it had at
its peak, imports not counted in the first. Time a picture must not grow, nor memory but for what a
gallery holds: its features, n x P x 4 bytes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import material
from rows import Row

from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import ModelConfig

SMALLEST, TIMES = 125, (1, 4, 16)
TOP_K = 16
MODEL = ModelConfig(
    image_encoder="vit_tiny_patch16_224",
    image_size=32,
    image_options={"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    text_layers=1,
    fusion_layers=1,
    text_width=64,
    text_heads=2,
    projection_dim=64,
    fusion="cross_attention",
)
QUIET = Progress(quiet=True)


def run() -> list[Row]:
    """Milliseconds a picture, and peak megabytes, at the largest size against the smallest."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        material.checkpoint(root, MODEL)
        found: dict[str, list[dict[str, float]]] = {}
        for times in TIMES:
            number = SMALLEST * times
            raw = root / f"raw-{number}"
            material.folder_of_pictures(raw, number, (96, 72), "test", seed=times)
            for command in ("prepare", "embed", "evaluate"):
                row = {"n": number, **measure(command, root, number)}
                found.setdefault(command, []).append(row)
        for command, (first, middle, last) in found.items():
            sizes = (first, middle, last)
            taken = ", ".join(f"{row['seconds']:.2f} s" for row in sizes)
            peaks = ", ".join(f"{row['peak_mb']:.0f} MB" for row in sizes)
            numbers = ", ".join(f"{row['n']:.0f}" for row in sizes) + " pictures"
            each = [1000 * row["seconds"] / row["n"] for row in (last, middle)]
            name = f"{command} : time a picture, 16 times as many against 4"
            rows.append(Row(name, *each, "ms", "<= 1.3", f"{numbers}: {taken}"))
            grown = 0.0
            if command == "embed":
                grown = 4 * MODEL.projection_dim * (last["n"] - middle["n"]) / 2**20
            name = f"{command} : peak memory, 16 times as many against 4"
            peak = (last["peak_mb"] - grown, middle["peak_mb"])
            rows.append(Row(name, *peak, "MB", "<= 1.1", f"{numbers}: {peaks}"))
    return rows


def measure(command: str, root: Path, number: int) -> dict[str, float]:
    """Runs this file as a program; what it says."""
    words = [sys.executable, __file__, command, str(root), str(number)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout)
    return row


def main(command: str, root: Path, number: int) -> None:
    """One measurement: seconds of the workflow, and this process's peak memory."""
    smallest = min(int(path.name.removeprefix("raw-")) for path in root.glob("raw-*"))
    work(command, root, smallest, root / f"warm-{command}-{number}")  # what is done only once
    began = time.perf_counter()
    work(command, root, number, root / f"{command}-{number}")
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": _peak_mb()}))


def work(command: str, root: Path, number: int, output: Path) -> None:
    """A command's workflow over ``number`` pictures."""
    from vicvlm_cli.workflows.embed import embed
    from vicvlm_cli.workflows.evaluate import evaluate
    from vicvlm_cli.workflows.prepare import prepare

    raw, checkpoint = root / f"raw-{number}", root / "model.safetensors"
    if command == "prepare":
        prepare("folder", raw, output=output, image_side=48, progress=QUIET)
    elif command == "embed":
        embed(raw, checkpoint, output=output, progress=QUIET)
    else:
        evaluate(checkpoint, root / f"prepare-{number}", top_k=TOP_K, progress=QUIET)


def _peak_mb() -> float:
    """Of this process since it began; what the kernel counts otherwise begins with its parent's."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
