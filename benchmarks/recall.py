"""Which losses and levers earn their place: one row of docs/results.md by one command.

    python benchmarks/recall.py list
    python benchmarks/recall.py speed DATA --weights FILE
    python benchmarks/recall.py run DATA --weights FILE --budget L --row itc --row vicvlm
    python benchmarks/recall.py report

DATA is a prepared Flickr8k, FILE the ImageNet weights of deit_tiny_patch16_224. Each budget is CPU
time of pretraining and fine-tuning together. What a core does in a minute differs by two between
machines, so `speed` measures it first: L is as long as ITC alone takes on this machine for 88,000
pairs, which is about 55 minutes of one core where there is nothing faster than AVX2, and about 30
where bfloat16 is fast; S is half of it, XS, for a first look, a fifth, T, for the text side alone,
a twelfth. Finished rows are kept as small JSON files in benchmarks/results/recall and not run
again: `--out FOLDER` keeps them elsewhere, and so measures anew. With `--piece 9` no call takes
longer than about nine minutes and the last evaluation, and the same call goes on.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from compare_methods import METHODS, SMALLER, Method
from comparison import (
    WAYS,
    Result,
    difference_table,
    noted_gflop,
    read_runs,
    recalls,
    rsum,
    table,
)
from machine import this_machine
from recall_rows import ALONE, BASES, ROWS, TEACHER, TOP_K
from speed import minutes_of_itc  # beside this file, as the others
from trainings import Run, Unfinished, advance, write_whole

app = typer.Typer(no_args_is_help=True, add_completion=False)

VALIDATE_EVERY = 4.0  # epochs, of a row whose method is not to be validated more often
SHARES = {"T": 1 / 12, "XS": 1 / 5, "S": 1 / 2, "L": 1.0}
RESULTS = Path(__file__).parent / "results" / "recall"
PRESET = "vicvlm-tiny-photos"
WORK = Path("runs") / "recall"
SPEED = WORK / "speed.json"


@app.command(name="list")
def names() -> None:
    """Say which rows there are."""
    for name, settings in ROWS.items():
        print(name, *(f"--set {setting}" for setting in settings))


@app.command()
def speed(
    data: Annotated[Path, typer.Argument(help="Prepared data set.")],
    weights: Annotated[Path, typer.Option(help="ImageNet weights of the image encoder.")],
    jobs: Annotated[int, typer.Option(help="As many side by side as rows will be.")] = 2,
) -> None:
    """Measure how long ITC alone takes on this machine, by two short trainings: 5 to 9 minutes."""
    words = ("--data", str(data), "--preset", PRESET, "--image-weights", str(weights))
    minutes = minutes_of_itc(words, ALONE, jobs)
    WORK.mkdir(parents=True, exist_ok=True)
    write_whole(SPEED, {"minutes": round(minutes, 1), "machine": this_machine()})
    print(f"L is {minutes:.1f} minutes of one core on this machine (in {SPEED})")


@app.command()
def run(
    data: Annotated[Path, typer.Argument(help="Prepared data set.")],
    row: Annotated[list[str], typer.Option(help="Which; repeatable, NAME or NAME:SEED.")],
    weights: Annotated[Path, typer.Option(help="ImageNet weights of the image encoder.")],
    budget: Annotated[str, typer.Option(help="T, XS, S or L.")] = "L",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another configuration, named by --row.")
    ] = None,
    base: Annotated[
        str, typer.Option(help=f"Lay rows over an earlier preset: {', '.join(BASES)}.")
    ] = "",
    jobs: Annotated[int, typer.Option(help="Runs side by side.")] = 2,
    threads: Annotated[
        int, typer.Option(help="Cores a run, for what leaves no memory to one beside it.")
    ] = 1,
    piece: Annotated[float, typer.Option(help="Minutes of this call; 0: to the end.")] = 0.0,
    out: Annotated[
        Path, typer.Option(help="Folder of the finished rows of all budgets.")
    ] = RESULTS,
) -> None:
    """Train and measure what has not been measured yet."""
    from flops import note_gflop  # imports torch, which a report does without

    until = time.monotonic() + 60 * piece if piece else math.inf
    if budget not in SHARES:
        raise typer.BadParameter(f"there is no budget {budget}: {', '.join(SHARES)}")
    measured = json.loads(SPEED.read_text("utf-8")) if SPEED.exists() else {}
    if measured.get("machine") != this_machine():
        raise typer.BadParameter(
            f"measure this machine first: python benchmarks/recall.py speed {data} "
            f"--weights {weights}"
        )
    minutes = round(SHARES[budget] * measured["minutes"], 1)
    if base and base not in BASES:
        raise typer.BadParameter(f"there is no base {base}: {', '.join(BASES)}")
    place = f"{budget}-{base}" if base else budget
    taught = (f"pretrain.options.teacher={TEACHER}", f"pretrain.options.teacher_weights={weights}")
    runs = []
    for word in row:
        name, _, seed = word.partition(":")
        if name not in ROWS and not settings:
            raise typer.BadParameter(f"there is no row {name}: python benchmarks/recall.py list")
        if name in ROWS and settings:
            raise typer.BadParameter(
                f"--set makes another row of {name}: give it a name of its own"
            )
        chosen = (*BASES.get(base, ()), *ROWS.get(name, ALONE), *(settings or ()))
        method_name = name.removesuffix(SMALLER)
        method = METHODS.get(method_name, Method())
        if method.taught:
            chosen += taught
        runs.append(
            Run(
                name=name,
                seed=int(seed or 0),
                data=data,
                minutes=minutes,
                tune=0.0,
                validate_every=VALIDATE_EVERY / method.often,
                threads=threads,
                top_k=TOP_K.get(method_name, Run.top_k),
                all_pairs=method.all_pairs,
                pretrain=chosen,
                options=("--preset", PRESET, "--image-weights", str(weights)),
            )
        )

    # What is measured anew is trained anew, too.
    work = WORK if out == RESULTS else out / "runs"

    def one(run: Run) -> None:
        file = out / place / f"{run.key}.json"
        if file.exists():
            print(f"{run.key}: measured already, in {file}; --out FOLDER measures anew", flush=True)
            return
        try:
            advance(run, work / f"{place}-{minutes}", until, out / place)
            print(f"{run.key}: done, in {file}", flush=True)
        except Unfinished:
            print(f"{run.key}: the same call goes on from here", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))
    for each in runs:
        if time.monotonic() < until:
            counted = (*each.pretrain, 'model.image_weights=""')
            note_gflop(_flops(out, bool(base), each.name), data, PRESET, counted)


@app.command()
def report(
    budget: Annotated[str, typer.Option(help="L, or another folder of finished rows.")] = "L",
    row: Annotated[str, typer.Option(help="With --less: this row's means less another's.")] = "",
    less: Annotated[str, typer.Option(help="The other row.")] = "",
    out: Annotated[
        Path, typer.Option(help="Folder of the finished rows of all budgets.")
    ] = RESULTS,
) -> None:
    """The table of a budget, in Markdown; or how far two of its rows are apart."""
    runs = read_runs(out / budget, ROWS)
    if not runs:
        raise typer.BadParameter(f"there are no finished rows of {budget}")
    if row or less:
        if missing := [name for name in (row, less) if len(runs.get(name, ())) < 2]:
            raise typer.BadParameter(f"it takes two finished seeds of {' and of '.join(missing)}")
        print(difference_table(runs[row], runs[less]))
        return
    rows = []
    earlier = any(part not in (*SHARES, "float32") for part in budget.split("-"))
    for name, results in runs.items():
        cells = [name, str(len(results)), _spent(results)]
        cells.append(f"{mean(r['pretrain']['pairs'] for r in results):,.0f}")
        cells.append(noted_gflop(_flops(out, earlier, name), results))
        for kind in ("dual", "banked", "reranked"):
            cells += [*(recalls(results, kind, way) for way in WAYS), rsum(results, kind)]
        rows.append(cells)
    print(table(TITLES, rows))
    print(f"\n{sum(map(len, runs.values()))} runs of {len(runs)} configurations.")


def _spent(results: list[Result]) -> str:
    """Minutes of CPU time; from the fastest to the slowest machine where there were several."""
    minutes = sorted(round(r["pretrain"]["seconds"] / 60) for r in results)
    return f"{minutes[0]}" if minutes[0] == minutes[-1] else f"{minutes[0]} to {minutes[-1]}"


def _flops(out: Path, earlier: bool, name: str) -> Path:
    """Operations of a pair do not depend on the budget; earlier presets had smaller pictures."""
    return out / ("flops-small" if earlier else "flops") / f"{name}.json"


TITLES = [
    *("row", "seeds", "minutes", "pairs", "GFLOP a pair"),
    *("dual: text to image R@1 / 5 / 10", "image to text R@1 / 5 / 10", "RSUM"),
    *("query bank: text to image", "image to text", "RSUM"),
    *("re-ranked: text to image", "image to text", "RSUM"),
]


if __name__ == "__main__":
    app()
