"""Six thin commands: find the defaults, call one workflow, show its result.

Nothing here imports torch before a command runs, so ``--help`` is instant. The options stand in
``options.py``; how a command speaks and fails, in ``console.py``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vicvlm_cli import __version__, remembered
from vicvlm_cli import options as o
from vicvlm_cli.console import (
    RANK,
    Commands,
    call,
    default,
    make_progress,
    remember,
    show,
    tell_unexpected,
)
from vicvlm_cli.errors import UsageError

if TYPE_CHECKING:
    from vicvlm_cli.report.progress import Progress

DISTRIBUTED = ("pretrain", "finetune")  # in a launch of several, the others run on rank 0 alone

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # A value for the absent --help spares Typer 0.29 an import of pydantic (0.3 s).
        "default_map": {"help": False},
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vicvlm {__version__}")
        raise typer.Exit


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Compact image-text retrieval models: train them, measure them, search pictures with them.

    To begin: vicvlm prepare scenes DIR
    """
    if RANK > 0 and ctx.invoked_subcommand not in DISTRIBUTED:
        raise typer.Exit


@app.command()
def prepare(
    source: o.Source,
    directory: o.RawFolder,
    output: o.PreparedFolder = None,
    image_side: o.ImageSide = 256,
    max_bad: o.MaxBad = 0.01,
    workers: o.Workers = None,
    seed: o.DataSeed = 0,
    split_scheme: o.SplitScheme = None,
    from_hub: o.HubName = None,
    train: o.TrainSize = None,
    val: o.ValSize = None,
    test: o.TestSize = None,
    as_json: o.AsJson = False,
) -> None:
    """Turn captioned pictures into a prepared data set."""
    from vicvlm_cli.report.tables import prepare_tables
    from vicvlm_cli.workflows import prepare as workflow

    progress = make_progress()
    sizes = dict(train=train, val=val, test=test)
    result = call(
        workflow.prepare,
        source,
        directory,
        output=output,
        image_side=image_side,
        max_bad=max_bad,
        workers=workers,
        seed=seed,
        split_scheme=split_scheme,
        from_hub=from_hub,
        sizes={name: size for name, size in sizes.items() if size is not None} or None,
        progress=progress,
    )
    if result.skipped_work:
        progress.say("it was prepared already, so there was nothing to do")
    for warning in result.warnings:
        progress.say(f"warning: {warning}")
    remember("data", result.path, progress)
    show(result, as_json, prepare_tables)


@app.command()
def pretrain(
    target: o.Target = None,
    objective: o.Objective = None,
    loss: o.Contrast = None,
    variant: o.Variant = None,
    teacher: o.Teacher = None,
    teacher_weights: o.TeacherWeights = None,
    data: o.DataPath = None,
    preset: o.Preset = None,
    config: o.ConfigFile = None,
    image_encoder: o.ImageEncoder = None,
    image_weights: o.ImageWeights = None,
    text_encoder: o.TextEncoder = None,
    epochs: o.Epochs = None,
    max_minutes: o.MaxMinutes = None,
    batch_size: o.PairBatch = None,
    contrastive_batch: o.ContrastBatch = None,
    lr: o.LearningRate = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    cache: o.Cache = None,
    settings: o.Settings = None,
    output: o.RunFolder = None,
    resume: o.Resume = None,
    track: o.Track = "none",
    profile: o.Profile = None,
    as_json: o.AsJson = False,
) -> None:
    """Train a model on a prepared data set, by default with VicVLM."""
    from vicvlm_cli.report.tables import training_tables
    from vicvlm_cli.workflows import train as workflow

    progress = make_progress()
    result = call(
        workflow.pretrain,
        default("data", data, "--data", progress),
        preset=preset,
        config_file=config,
        overrides=[
            *(settings or ()),
            *_overrides("model", image_encoder=image_encoder, image_weights=image_weights),
            *_overrides("model", text_encoder=text_encoder),
            *_overrides("pretrain", objective=objective, seed=seed, precision=precision),
            *_overrides("pretrain", epochs=epochs, max_minutes=max_minutes),
            *_overrides("pretrain", batch_size=batch_size, lr=lr),
            *_overrides("pretrain", contrastive_batch=contrastive_batch),
            *_overrides("data", cache=cache),
            *_overrides("pretrain.options", target=target, loss=loss, variant=variant),
            *_overrides("pretrain.options", teacher=teacher, teacher_weights=teacher_weights),
        ],
        output=output,
        resume=resume,
        track=track,
        profile=profile,
        progress=progress,
    )
    remember("checkpoint", result.checkpoint, progress)
    show(result, as_json, training_tables)


@app.command()
def finetune(
    checkpoint: o.CheckpointArgument = None,
    data: o.DataPath = None,
    epochs: o.Epochs = None,
    max_minutes: o.MaxMinutes = None,
    batch_size: o.PairBatch = None,
    contrastive_batch: o.ContrastBatch = None,
    lr: o.LearningRate = None,
    seed: o.Seed = None,
    precision: o.Precision = None,
    cache: o.Cache = None,
    settings: o.Settings = None,
    output: o.RunFolder = None,
    resume: o.Resume = None,
    track: o.Track = "none",
    profile: o.Profile = None,
    as_json: o.AsJson = False,
) -> None:
    """Fine-tune a checkpoint for retrieval, keeping the best."""
    from vicvlm_cli.report.tables import training_tables
    from vicvlm_cli.workflows import train as workflow

    progress = make_progress()
    if resume is None:
        checkpoint = default("checkpoint", checkpoint, "CHECKPOINT", progress)
    elif checkpoint is not None:
        raise UsageError("--resume goes on from the run's own weights: leave out CHECKPOINT")
    result = call(
        workflow.finetune,
        checkpoint,
        default("data", data, "--data", progress),
        overrides=[
            *(settings or ()),
            *_overrides("finetune", epochs=epochs, max_minutes=max_minutes),
            *_overrides("finetune", contrastive_batch=contrastive_batch),
            *_overrides("finetune", batch_size=batch_size, lr=lr, seed=seed, precision=precision),
            *_overrides("data", cache=cache),
        ],
        output=output,
        resume=resume,
        track=track,
        profile=profile,
        progress=progress,
    )
    remember("checkpoint", result.checkpoint, progress)
    show(result, as_json, training_tables)


@app.command()
def evaluate(
    checkpoint: o.CheckpointArgument = None,
    data: o.DataPath = None,
    split: o.SplitName = "test",
    top_k: o.Candidates = 128,
    all_pairs: o.AllPairs = False,
    image_scale: o.ImageScale = None,
    views: o.Views = None,
    batch_size: o.EncodeBatch = 64,
    as_json: o.AsJson = False,
) -> None:
    """Measure recall, by features alone and by the model's own score of pairs."""
    from vicvlm_cli.report.tables import evaluation_tables
    from vicvlm_cli.workflows import evaluate as workflow

    progress = make_progress()
    checkpoint = default("checkpoint", checkpoint, "CHECKPOINT", progress)
    result = call(
        workflow.evaluate,
        checkpoint,
        default("data", data, "--data", progress),
        split=split,
        top_k=top_k,
        all_pairs=all_pairs,
        image_scale=image_scale,
        views=views,
        batch_size=batch_size,
        progress=progress,
    )
    remember("checkpoint", checkpoint, progress)
    show(result, as_json, evaluation_tables)


@app.command()
def embed(
    source: o.Pictures = None,
    checkpoint: o.CheckpointPath = None,
    split: o.SplitOrAll = None,
    output: o.GalleryFolder = None,
    views: o.Views = None,
    batch_size: o.EncodeBatch = 64,
    as_json: o.AsJson = False,
) -> None:
    """Embed pictures into a gallery, to search with retrieve."""
    from vicvlm_cli.report.tables import gallery_tables

    progress = make_progress()
    result = _embed(
        source,
        checkpoint,
        progress,
        split=split,
        output=output,
        views=views,
        batch_size=batch_size,
    )
    show(result, as_json, gallery_tables)


@app.command()
def retrieve(
    query: o.Query = None,
    image: o.QueryImage = None,
    gallery: o.GalleryPath = None,
    checkpoint: o.OwnCheckpoint = None,
    top_k: o.Hits = 10,
    rerank: o.Rerank = None,
    sheet: o.Sheet = None,
    as_json: o.AsJson = False,
) -> None:
    """Search a gallery by words or by a picture."""
    from vicvlm_cli.report.tables import hits_tables
    from vicvlm_cli.workflows import retrieve as workflow

    if (query is None) == (image is None):
        raise UsageError('give either words, as in vicvlm retrieve "a dog on a beach", or --image')
    progress = make_progress()
    if gallery is None and remembered.last("gallery") is None:
        workflow.check_query(query, image, rerank=rerank, sheet=sheet)
        progress.say("gallery: there is none yet, so one is made first, as by vicvlm embed")
        gallery = _embed(None, checkpoint, progress).path
    result = call(
        workflow.retrieve,
        default("gallery", gallery, "--gallery", progress),
        query=query,
        image=image,
        checkpoint=checkpoint,
        top_k=top_k,
        rerank=rerank,
        sheet=sheet,
        progress=progress,
    )
    show(result, as_json, hits_tables)
    if result.sheet_error is not None:
        raise result.sheet_error


def _embed(source: Path | None, checkpoint: Path | None, progress: Progress, **options: Any) -> Any:
    from vicvlm_cli.workflows import embed as workflow

    source = default("data", source, "SOURCE", progress)
    checkpoint = default("checkpoint", checkpoint, "--checkpoint", progress)
    result = call(workflow.embed, source, checkpoint, progress=progress, **options)
    remember("gallery", result.path, progress)
    return result


def _overrides(table: str, **options: Any) -> list[str]:
    """The options that were given as settings KEY=VALUE (a JSON value is a TOML value)."""
    given = {key: value for key, value in options.items() if value is not None}
    return [f"{table}.{k}={json.dumps(v, ensure_ascii=False)}" for k, v in given.items()]


def main() -> None:
    """The `vicvlm` command. An error that no one foresaw is told too, without a traceback."""
    try:
        app(prog_name="vicvlm")
    except Exception as error:
        if os.environ.get("VICVLM_DEBUG"):
            raise
        tell_unexpected(error)
        sys.exit(1)
