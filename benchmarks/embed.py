"""Pictures a second from JPEG files to features, beside open_clip and sentence-transformers.

All three run an encoder of the size of ViT-S/16 at 224 pixels, of random weights, over the same
files on the same machine in turns; loading a model is not counted. The other two run as their
documentation shows, in an environment of their own (`.bench/venv`), made when it is missing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import material
import torch
from rows import Row, alternate, median_ratio

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.inference import autocast_dtype
from vicvlm_cli.settings import ModelConfig

PICTURES, REPEATS = 128, 3
HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".bench" / "venv"
PACKAGES = ("open_clip_torch", "sentence-transformers")
OTHERS = ("open_clip", "sentence-transformers", "open_clip in bf16")


def run() -> list[Row]:
    """Pictures a second, each of the others against ours."""
    python = environment()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = material.folder_of_pictures(root / "pictures", PICTURES, (500, 375), "test")
        paths = sorted(folder.glob("*.jpg"))
        model = load_model(material.checkpoint(root, ModelConfig(), weight=0.0))

        def ours() -> float:
            began = time.perf_counter()
            assert len(model.encode_images(paths)) == PICTURES
            return time.perf_counter() - began

        with others(python, folder, root) as ask:
            took: dict[str, list[float]] = {}

            def keep(which: str) -> None:
                took.setdefault(which, []).append(ours() if which == "ours" else ask(which))

            names = ("ours", *OTHERS)
            alternate({which: lambda w=which: keep(w) for which in names}, REPEATS, warmup=0)
    rate = {which: PICTURES / statistics.median(seconds) for which, seconds in took.items()}
    better = max(OTHERS[:2], key=lambda which: rate[which])
    precision = autocast_dtype(model.device) or torch.float32
    rows = []
    for which in OTHERS:
        _, spread = median_ratio(took[which], took["ours"])
        bar = ">= 1.3" if which == better else ""
        note = f"ViT-S/16 at 224, {PICTURES} JPEGs of 500 x 375; ours in {precision}"
        rows.append(
            Row(f"embed : {which}", rate["ours"], rate[which], "images/s", bar, note, spread)
        )
    return rows


def environment() -> Path:
    """The Python of the others' environment, which sees this one's packages: torch is not twice."""
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = ENVIRONMENT / "done"
    if not done.is_file():
        print(f"making {ENVIRONMENT} for {' and '.join(PACKAGES)}", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
        shared = Path(own.stdout.strip()) / "shared.pth"
        shared.write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        done.touch()
    return python


@contextmanager
def others(python: Path, folder: Path, scratch: Path) -> Iterator:
    """A function from a name to the seconds that it took, in a process that keeps its models."""
    command = [python, HERE / "embed_others.py", folder, scratch, str(torch.get_num_threads())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(which: str) -> float:
            assert process.stdin is not None and process.stdout is not None
            print(which, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"{which} failed; its words are above")
            seconds: float = json.loads(answer)
            return seconds

        try:
            yield ask
        finally:
            process.kill()
