"""Methods side by side: the same data, encoders and schedule, each for the same wall time.

    python benchmarks/compare_methods.py run DATA --out benchmarks/runs/scenes --seeds 3
    python benchmarks/compare_methods.py report benchmarks/runs/scenes

Every run is a `vicvlm pretrain`, `finetune` and `evaluate` in processes of their own, kept as one
JSON file; what is there already is not run again, so that a stopped comparison goes on where it
was. `--stop-after` starts no further run once so many minutes have gone. Validations along the way
give recall against time and against pairs from one and the same run.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)

VICREG = ("variance", "covariance", "invariance")
VICVLM = ("itm", "mlm", "mim", "joint_mim", *VICREG)
# What `vicvlm pretrain` is told, and what `vicvlm finetune` is; all else is the preset's.
METHODS: dict[str, tuple[list[str], list[str]]] = {
    "itc": (
        [f"pretrain.losses.{name}.weight=0" for name in VICVLM],
        ["finetune.losses.itm.weight=0"],
    ),
    "vicvlm": ([], []),
    "vicvlm-pixel": (["pretrain.options.target=pixel"], []),
    "clip": (["pretrain.objective=clip"], []),
    "siglip": (
        [
            "pretrain.objective=clip",
            "pretrain.options.loss=sigmoid",
            "finetune.options.loss=sigmoid",
        ],
        [],
    ),
    "vsepp": (["pretrain.objective=vsepp"], []),
    "mamo": (["pretrain.objective=mamo"], []),
    "mamo-seed": (["pretrain.objective=mamo", "pretrain.options.variant=seed"], []),
    "maskvlm": (["pretrain.objective=maskvlm"], []),
    "albef": (["pretrain.objective=albef"], []),
}
MANY_EPOCHS = 1000  # the wall time ends a run, not the epochs


@app.command()
def run(
    data: Annotated[Path, typer.Argument(help="Prepared data set.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs.")],
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 1,
    minutes: Annotated[float, typer.Option(help="Pretraining of one run.")] = 2.5,
    tune: Annotated[float, typer.Option(help="Minutes of fine-tuning of one run.")] = 0.5,
    validate: Annotated[float, typer.Option(help="Epochs between validations.")] = 1.0,
    split: Annotated[str, typer.Option(help="Split of the final figures.")] = "test",
    top_k: Annotated[int, typer.Option(help="Candidates re-ranked at the end.")] = 32,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of all pretrainings.")
    ] = None,
    stop_after: Annotated[float, typer.Option(help="Minutes; 0: run everything.")] = 0.0,
) -> None:
    """Train, fine-tune and evaluate what has not been run yet."""
    names = methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}: {', '.join(METHODS)}")
    began = time.monotonic()
    for seed in range(seeds):
        for name in names:
            if stop_after and time.monotonic() - began > 60 * stop_after:
                print("time is over: the same command goes on from here")
                return
            file = out / f"{name}-{seed}.json"
            if file.exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            before, after = METHODS[name]
            folder = out / f"{name}-{seed}"
            for part in ("pre", "fine"):  # of a run that was stopped
                shutil.rmtree(folder / part, ignore_errors=True)
            common = [f"{{kind}}.seed={seed}", f"{{kind}}.epochs={MANY_EPOCHS}"]
            first = [s.format(kind="pretrain") for s in common]
            second = [s.format(kind="finetune") for s in common]
            first += [f"pretrain.validate_every={validate}", *before, *(settings or ())]
            pretrained = vicvlm(
                *("pretrain", "--data", data, "--output", folder / "pre", "--json"),
                *("--max-minutes", minutes),
                settings=first,
            )
            tuned = vicvlm(
                *("finetune", folder / "pre", "--data", data, "--output", folder / "fine"),
                *("--json", "--max-minutes", tune),
                settings=[*second, "finetune.validate_every=0", *after],
            )
            figures = vicvlm(
                *("evaluate", folder / "fine", "--data", data, "--split", split, "--json"),
                *("--top-k", top_k),
            )
            row = {
                "method": name,
                "seed": seed,
                "pretrain": pretrained,
                "finetune": tuned,
                "evaluate": figures,
            }
            part = file.with_suffix(".part")
            part.write_text(json.dumps(row, indent=1) + "\n", "utf-8")
            os.replace(part, file)


def vicvlm(*words: Any, settings: Iterable[str] = ()) -> dict[str, Any]:
    """What a command prints as JSON, with ``command`` and ``peak_mb``, its peak memory."""
    command = [sys.executable, "-m", "vicvlm_cli", *map(str, words)]
    for setting in settings:
        command += ["--set", setting]
    # A benchmark leaves alone what the user's own commands remember.
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "VICVLM_STATE": str(Path(folder) / "state.json")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(f"failed: {shlex.join(command)}")
    result: dict[str, Any] = json.loads(text)
    return {
        **result,
        "command": shlex.join(["vicvlm", *command[3:]]),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of the runs.")],
    plot: Annotated[Path | None, typer.Option(help="Draw recall against time and pairs.")] = None,
) -> None:
    """Tables in Markdown: final figures, and recall at equal time and at equal pairs."""
    rows = [json.loads(file.read_text("utf-8")) for file in sorted(out.glob("*.json"))]
    if not rows:
        raise typer.BadParameter(f"there are no finished runs in {out}")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    order = [name for name in METHODS if name in by_method]
    print(
        "| method | runs | dual: text to image R@1 / 5 / 10 | image to text R@1 / 5 / 10 ", end=""
    )
    print("| re-ranked: text to image | image to text | pairs/s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in order:
        runs = by_method[name]
        cells = [name, str(len(runs))]
        for kind in ("dual", "reranked"):
            for way in ("image_retrieval", "text_retrieval"):
                if runs[0]["evaluate"].get(kind) is None:
                    cells.append("-")
                    continue
                figures = [run["evaluate"][kind][way] for run in runs]
                cells.append(
                    " / ".join(spread([f[k] for f in figures]) for k in ("r1", "r5", "r10"))
                )
        cells.append(f"{mean(run['pretrain']['pairs_per_second'] for run in runs):.0f}")
        cells.append(f"{max(run['pretrain']['peak_mb'] for run in runs):,}")
        print("| " + " | ".join(cells) + " |")
    shared = min(run["pretrain"]["pairs"] for run in rows)
    print(f"\nMean of both R@1 on validation in pretraining, dual encoder, at {shared:,} pairs:\n")
    print("| method | R@1 |\n|---|---|")
    for name in order:
        print(f"| {name} | {spread([at(run, 'pairs', shared) for run in by_method[name]])} |")
    if plot is not None:
        draw(by_method, order, plot)


def spread(values: list[float]) -> str:
    """Mean, and its standard error where there are several."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values) / math.sqrt(len(values)):.1f}"


def curve(run: dict[str, Any], against: str) -> list[tuple[float, float]]:
    """(seconds or pairs, mean of both R@1) of the validations of a pretraining."""
    points = []
    for row in run["pretrain"]["validation"]:
        ways = [row["dual"][f"{way}_retrieval"]["r1"] for way in ("image", "text")]
        points.append((row[against], sum(ways) / 2))
    return points


def at(run: dict[str, Any], against: str, place: float) -> float:
    """The curve of a run at ``place``, on a straight line between two validations."""
    points = [(0.0, 0.0), *curve(run, against)]
    for (x, y), (x1, y1) in zip(points, points[1:], strict=False):
        if place <= x1:
            return y + (y1 - y) * (place - x) / max(x1 - x, 1e-9)
    return points[-1][1]


def draw(by_method: dict[str, list[dict[str, Any]]], order: list[str], path: Path) -> None:
    """Recall against minutes and against pairs, a line a run."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise typer.BadParameter("--plot needs matplotlib: pip install matplotlib") from None

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, against, unit in zip(axes, ("seconds", "pairs"), (60, 1000), strict=True):
        for number, name in enumerate(order):
            for i, run in enumerate(by_method[name]):
                points = [(x / unit, y) for x, y in curve(run, against)]
                label = name if i == 0 else None
                axis.plot(*zip(*points, strict=True), color=f"C{number}", label=label, marker=".")
        axis.set_xlabel("minutes" if against == "seconds" else "thousand pairs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean of both R@1 on validation")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    app()
