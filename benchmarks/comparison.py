"""Finished runs of several methods as Markdown tables and curves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Result = dict[str, Any]
WAYS = ("image_retrieval", "text_retrieval")
KS = ("r1", "r5", "r10")
SHARES = (0.25, 0.5, 1.0)  # of the time


def read_runs(folder: Path, order: Iterable[str]) -> dict[str, list[Result]]:
    """The runs in ``folder`` by name: those in ``order`` first."""
    found: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("*.json")):
        one: Result = json.loads(file.read_text("utf-8"))
        found.setdefault(one["name"], []).append(one)
    known = [name for name in order if name in found]
    return {name: found[name] for name in dict.fromkeys([*known, *sorted(found)])}


def final_table(runs: dict[str, list[Result]], flops: Path) -> str:
    """Recall on the final split both ways, and what training cost; ``*``: only a shortlist."""
    known = [r["evaluate"].get("banked") for results in runs.values() for r in results]
    banked = ("banked",) if any(known) else ()
    titles = [
        "method",
        "runs",
        "features alone: text to image R@1 / 5 / 10",
        "image to text R@1 / 5 / 10",
        *(title for _ in banked for title in ("query bank: text to image", "image to text")),
        "pair scores: text to image",
        "image to text",
        "pairs",
        "pairs/s",
        "GFLOP a pair",
        "peak MB",
    ]
    rows = []
    for name, results in runs.items():
        shortlist = alone(results[0]["evaluate"])
        cells = [name, str(len(results))]
        for kind in ("dual", *banked, "reranked"):
            mark = "*" * (shortlist and kind == "dual")
            cells += [recalls(results, kind, way) + mark for way in WAYS]
        cells.append(f"{mean(r['pretrain']['pairs'] for r in results):,.0f}")
        cells.append(f"{mean(r['pretrain']['pairs_per_second'] for r in results):.0f}")
        cells.append(noted_gflop(flops / f"{name}.json", results))
        cells.append(f"{max(r['pretrain']['peak_mb'] for r in results):,}")
        rows.append(cells)
    text = table(titles, rows)
    if any(alone(results[0]["evaluate"]) for results in runs.values()):
        text += "\n\n\\* the shortlist, which is no way of the method's own to score"
    return text


def recalls(results: list[Result], kind: str, way: str) -> str:
    """R@1 / 5 / 10 of one way; ``kind``: a table of `vicvlm evaluate`, a dash if one lacks it."""
    tables = [r["evaluate"].get(kind) for r in results]
    return " / ".join(spread([t[way][k] for t in tables]) for k in KS) if all(tables) else "-"


def rsum(results: list[Result], kind: str) -> str:
    """The sum of the six recalls, or a dash; arguments as :func:`recalls`."""
    tables = [r["evaluate"].get(kind) for r in results]
    if not all(tables):
        return "-"
    return spread([sum(t[way][k] for way in WAYS for k in KS) for t in tables])


def difference_table(first: list[Result], second: list[Result]) -> str:
    """Means of ``first`` less those of ``second``, two runs or more each, with standard errors."""
    rows = []
    for kind in ("dual", "banked", "reranked"):
        tables = [[r["evaluate"].get(kind) for r in results] for results in (first, second)]
        if not all(map(all, tables)):
            continue
        for way in WAYS:
            cells = [f"{kind}, {way.replace('_', ' ')}"]
            for ks in (*((k,) for k in KS), KS):
                values = [[sum(t[way][k] for k in ks) for t in each] for each in tables]
                cells.append(_difference(values))
            rows.append(cells)
        # Not the sum of both ways' errors: what a run is good at, it is good at both ways.
        values = [[sum(t[way][k] for way in WAYS for k in KS) for t in each] for each in tables]
        rows.append([f"{kind}, RSUM", "", "", "", _difference(values)])
    return table(["difference of means", "R@1", "R@5", "R@10", "sum of the three"], rows)


def _difference(values: list[list[float]]) -> str:
    error = math.hypot(*(stdev(v) / math.sqrt(len(v)) for v in values))
    return f"{mean(values[0]) - mean(values[1]):.1f} ± {error:.1f}"


def noted_gflop(file: Path, results: list[Result]) -> str:
    """What :func:`flops.note_gflop` kept in ``file``, for the pairs of ``results``; a dash if none.

    Pairs that were seen while blocks were frozen count as such; losses that come and go with the
    schedule by their mean over the whole run, in both kinds.
    """
    if not file.exists():
        return "-"
    costs: dict[str, float] = json.loads(file.read_text("utf-8"))
    whole = costs["gflop_per_pair"]
    runs = [r["pretrain"] for r in results]
    frozen = mean(run.get("frozen_pairs", 0) / run["pairs"] for run in runs)
    return f"{whole + frozen * (costs.get('frozen', whole) - whole):.3g}"


def time_table(runs: dict[str, list[Result]]) -> str:
    """Mean of both R@1 after shares of the time; a dash where a run was not validated by then."""
    titles = [f"after {100 * share:.0f} % of the time" for share in SHARES]
    rows = [
        [name, *(_means([at(run, "time", 100 * share) for run in results]) for share in SHARES)]
        for name, results in runs.items()
    ]
    return table(["method", *titles], rows)


def pairs_table(runs: dict[str, list[Result]]) -> str:
    """Each method at the end of its run, beside ITC alone when that had seen as many pairs.

    A dash where ITC had not been validated by then. It is in the middle of its schedule there.
    """
    control = runs["itc"]
    rows = []
    for name, results in runs.items():
        if name == "itc":
            continue
        ends = [curve(run, "pairs")[-1] for run in results]
        pairs = mean(place for place, _ in ends)
        then = _means([at(run, "pairs", pairs) for run in control])
        rows.append([name, f"{pairs:,.0f}", spread([value for _, value in ends]), then])
    return table(["method", "pairs", "at its end", "ITC alone after as many"], rows)


def _means(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else "-"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: list[float]) -> str:
    """Mean, and its standard error where there are several."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values) / math.sqrt(len(values)):.1f}"


def alone(evaluation: Result) -> bool:
    """Whether pair scores alone order the candidates, so that the features are a shortlist."""
    return bool((evaluation.get("pair_score") or {}).get("alone"))


def curve(run: Result, against: str) -> list[tuple[float, float]]:
    """(time or pairs, mean of both R@1) of the validations of a pretraining.

    Time is in percent of the run's own: the same budget is of more seconds on a slower machine.
    """
    points = []
    validation = run["pretrain"]["validation"]
    for row in validation:
        metrics = (row["reranked"] if alone(row) else None) or row["dual"]
        place = row["pairs"]
        if against == "time":
            place = 100 * row["seconds"] / validation[-1]["seconds"]
        points.append((place, mean(metrics[way]["r1"] for way in WAYS)))
    return points


def at(run: Result, against: str, place: float) -> float | None:
    """The curve of a run at ``place``, between two validations; None before the first."""
    points = curve(run, against)
    if place < points[0][0]:
        return None
    for (x, y), (x1, y1) in itertools.pairwise(points):
        if place <= x1:
            return y + (y1 - y) * (place - x) / max(x1 - x, 1e-9)
    return points[-1][1]


def draw(runs: dict[str, list[Result]], path: Path) -> None:
    """Recall against minutes and against pairs, a line a run."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    colours = plt.get_cmap("tab20").colors
    for axis, against, unit in zip(axes, ("time", "pairs"), (1, 1000), strict=True):
        for number, (name, results) in enumerate(runs.items()):
            for i, run in enumerate(results):
                points = [(x / unit, y) for x, y in curve(run, against)]
                axis.plot(
                    *zip(*points, strict=True),
                    color=colours[number % len(colours)],
                    label=name if i == 0 else None,
                    marker=".",
                )
        axis.set_xlabel("% of the CPU time" if against == "time" else "thousand pairs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean of both R@1 on validation")
    axes[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
