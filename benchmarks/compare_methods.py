"""Methods side by side: the same data, encoders and schedule, each for the same time.

    python benchmarks/compare_methods.py run DATA --out benchmarks/results/methods --seeds 3
    python benchmarks/compare_methods.py report benchmarks/results/methods --plot methods.png

A run is a `vicvlm pretrain`, `finetune` and `evaluate`, kept as one JSON file; what is there is not
run again, and with `--piece 9` no call takes longer than about nine minutes, and the same call goes
on. Time is a training's own CPU time on one thread, without its validations, so that several run
side by side; on a busy machine a run sees a few per cent fewer pairs. Validations along the way
give recall against time and against pairs from one and the same run.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from comparison import draw, final_table, pairs_table, read_runs, time_table  # beside this file
from trainings import Run, Unfinished, advance

app = typer.Typer(no_args_is_help=True, add_completion=False)

VICREG = {"variance": 0.02, "covariance": 0.002, "invariance": 0.02}
ADDED = {"itm": 0.5, "mlm": 0.1, "mim": 0.1, "joint_mim": 0.1, **VICREG}
# All that VicVLM has, on from the middle of the run, VICReg on the multimodal features: the preset
# for drawn scenes as it was.
MULTIMODAL = (
    'pretrain.options.vicreg="multimodal"',
    *(
        f"pretrain.losses.{name}={{weight = {weight}, start = 0.5, ramp = 0.1, "
        f"every = {4 if name == 'itm' else 2}}}"
        for name, weight in ADDED.items()
    ),
)
MATCHING = ("finetune.losses.itm.weight=1",)


class Method(NamedTuple):
    """What `vicvlm pretrain` is told, and what `vicvlm finetune` is; all else is the preset's.

    ``all_pairs``: what orders pairs leaves the features that make a shortlist untrained, and is
    cheap enough to go without one. ``often``: validations for one of VicVLM's, more where pairs
    are dear, so that there are some along the way, and of ITC alone, whose curve the others are
    read against.
    """

    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    taught: bool = False
    all_pairs: bool = False
    often: int = 1


def _named(name: str, *more: str, often: int = 1) -> Method:
    return Method((f"pretrain.objective={name}", *more), often=often)


def _scan(*more: str) -> Method:
    method = _named("scan", "pretrain.rerank_top_k=128", *more)
    return method._replace(finetune=("finetune.rerank_top_k=128",), all_pairs=True, often=4)


def _multimodal(*more: str) -> Method:
    return Method((*MULTIMODAL, *more), MATCHING)


SMALLER = "-batch-64"  # behind a method's name: its row of recall.py with smaller batches
METHODS: dict[str, Method] = {
    "itc": Method(tuple(f"pretrain.losses.{name}.weight=0" for name in ADDED), often=4),
    "vicvlm": Method(),
    "vicvlm-multimodal": _multimodal(),
    "vicvlm-multimodal-pixel": _multimodal("pretrain.options.target=pixel"),
    # Without what makes it cheap: every loss on all rows of every step.
    "vicvlm-multimodal-all-rows": _multimodal(
        "pretrain.options.masked_stride=1",
        *(f"pretrain.losses.{name}.every=1" for name in ADDED),
    ),
    # Hidden patches stay in the image encoder as mask tokens.
    "vicvlm-multimodal-encode-hidden": _multimodal("pretrain.options.drop_hidden=false"),
    "clip": _named("clip"),
    "siglip": _named("clip", "pretrain.options.loss=sigmoid"),
    "vsepp": _named("vsepp"),
    "scan": _scan(),
    "scan-i2t": _scan("model.fusion_options.direction=i2t"),
    "mamo": _named("mamo", often=8),
    "mamo-seed": _named("mamo", "pretrain.options.variant=seed", often=8),
    "maskvlm": _named("maskvlm", often=8),
    "albef": _named("albef", often=4),
    "albef-queue": _named("albef", "pretrain.options.queue_steps=0", often=4),  # from the start
    "vilt": _named("vilt", often=4),
    "s_smke": _named("s_smke", often=8)._replace(taught=True),
}


@app.command()
def run(
    data: Annotated[Path, typer.Argument(help="Prepared data set.")],
    out: Annotated[Path, typer.Option(help="Folder of the finished runs.")],
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(METHODS),
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 1,
    minutes: Annotated[float, typer.Option(help="CPU time of a pretraining.")] = 5.0,
    tune: Annotated[float, typer.Option(help="CPU time of a fine-tuning; 0: none.")] = 1.0,
    validate: Annotated[
        float, typer.Option(help="Epochs between validations; fewer of dear methods and itc.")
    ] = 1.0,
    split: Annotated[str, typer.Option(help="Split of the final figures.")] = "test",
    top_k: Annotated[int, typer.Option(help="Candidates ordered by pair scores.")] = 32,
    preset: Annotated[str | None, typer.Option(help="Of all runs. [default: the data's]")] = None,
    teacher: Annotated[str, typer.Option(help="s_smke: any timm model, by name or folder.")] = "",
    teacher_weights: Annotated[
        str, typer.Option(help="s_smke: a local file, or hub. [default: the folder's, or hub]")
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Further settings of all pretrainings.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, a core each.")] = 1,
    piece: Annotated[float, typer.Option(help="Minutes of this call; 0: to the end.")] = 0.0,
) -> None:
    """Train, fine-tune, evaluate and count the operations of what has not been done yet."""
    from flops import note_gflop  # imports torch, which a report does without

    until = time.monotonic() + 60 * piece if piece else math.inf
    names = methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise typer.BadParameter(f"there is no {', '.join(unknown)}: {', '.join(METHODS)}")
    taught = (f"pretrain.options.teacher={json.dumps(teacher)}",)
    taught += (f"pretrain.options.teacher_weights={json.dumps(teacher_weights)}",)
    if not teacher:
        left_out = [name for name in names if METHODS[name].taught]
        names = [name for name in names if name not in left_out]
        for name in left_out:
            print(f"{name} is left out: it learns from a teacher, name a timm model or its folder")
            print("with --teacher")
    wanted = [
        Run(
            name=name,
            seed=seed,
            data=data,
            minutes=minutes,
            tune=tune,
            pretrain=(*method.pretrain, *(taught if method.taught else ()), *(settings or ())),
            finetune=method.finetune,
            options=("--preset", preset) if preset else (),
            split=split,
            top_k=top_k,
            validate_every=validate / method.often,
            all_pairs=method.all_pairs,
        )
        for seed in range(seeds)
        for name, method in ((name, METHODS[name]) for name in names)
    ]

    def one(run: Run) -> None:
        if time.monotonic() > until:
            return
        try:
            advance(run, out / "runs", until, out)
            print(f"{run.key}: done", flush=True)
        except Unfinished:
            print(f"{run.key}: the same call goes on from here", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, wanted))
    for each in wanted[: len(names)]:
        if time.monotonic() < until:
            note_gflop(out / "flops" / f"{each.name}.json", data, preset, each.pretrain)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of the finished runs.")],
    plot: Annotated[Path | None, typer.Option(help="Draw recall against time and pairs.")] = None,
    flops: Annotated[
        Path | None, typer.Option(help="Folder of operations. [default: OUT/flops]")
    ] = None,
) -> None:
    """Tables in Markdown: final figures, their cost, recall at equal time and at equal pairs."""
    names = [row for name in METHODS for row in (name, name + SMALLER)]
    runs = {name: found for name, found in read_runs(out, names).items() if name in names}
    if not runs:
        raise typer.BadParameter(f"there are no finished runs in {out}")
    print(final_table(runs, flops or out / "flops"))
    print("\nMean of both R@1 on validation in pretraining, by the method's own way of scoring.")
    print(f"\n{time_table(runs)}")
    if "itc" in runs:
        print(f"\n{pairs_table(runs)}")
    if plot is not None:
        draw(runs, plot)


if __name__ == "__main__":
    app()
