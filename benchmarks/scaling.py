"""Cost against size: prepare, embed and evaluate over 1, 4 and 16 times as many pictures.

Each is run in a process of its own, which says how long the work took and how much memory it had at
its peak, imports not counted in the first. Time a picture must not grow, nor memory but for what a
gallery holds: its features, n x P x 4 bytes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import material
from rows import Row

from vicvlm_cli.config import ModelConfig
from vicvlm_cli.report.progress import Progress

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
                # A first run of the smallest warms the machine's caches of files.
                for _ in range(2 if times == 1 else 1):
                    row = measure(command, root, number)
                found.setdefault(command, []).append({"n": number, **row})
        for command, sizes in found.items():
            first, middle, last = sizes
            rows.append(
                Row(
                    f"{command} : time a picture, 16 times against 4",
                    *(1000 * row["seconds"] / row["n"] for row in (last, middle)),
                    unit="ms",
                    bar="<= 1.3",
                    note=f"{first['n']}, {middle['n']} and {last['n']} pictures took "
                    + ", ".join(f"{row['seconds']:.2f}" for row in sizes)
                    + " s",
                )
            )
            features = 4 * MODEL.projection_dim * (last["n"] - first["n"]) / 2**20
            rows.append(
                Row(
                    f"{command} : peak memory, 16 times against 1",
                    last["peak_mb"] - (features if command == "embed" else 0.0),
                    first["peak_mb"],
                    unit="MB",
                    bar="<= 1.1",
                    note="without the gallery's features" if command == "embed" else "",
                )
            )
    return rows


def measure(command: str, root: Path, number: int) -> dict[str, float]:
    """Runs this file as a program; what it says."""
    words = [sys.executable, __file__, command, str(root), str(number)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout)
    return row


def main(command: str, root: Path, number: int) -> None:
    """One measurement: seconds of the workflow, and this process's peak memory."""
    from vicvlm_cli.workflows.embed import embed
    from vicvlm_cli.workflows.evaluate import evaluate
    from vicvlm_cli.workflows.prepare import prepare

    raw, data = root / f"raw-{number}", root / f"data-{number}"
    checkpoint = root / "model.safetensors"
    began = time.perf_counter()
    if command == "prepare":
        path = data.with_name(f"{data.name}.{os.getpid()}") if data.exists() else data
        prepare("folder", raw, output=path, image_side=48, progress=QUIET)
    elif command == "embed":
        embed(raw, checkpoint, output=root / f"gallery-{number}", progress=QUIET)
    else:
        evaluate(checkpoint, data, top_k=TOP_K, progress=QUIET)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
