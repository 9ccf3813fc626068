"""pretrain and finetune: from a prepared data set to a checkpoint, its losses and its recall."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from vicvlm_cli import config as configs
from vicvlm_cli.checkpoint import FILE_NAME, load_model
from vicvlm_cli.data.batches import Plan
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.device import keep_freed_memory
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.create import build_model, create_model
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.objectives import OBJECTIVES, create_objective, recipe_of
from vicvlm_cli.report.profile import Profile
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import Config, ModelConfig
from vicvlm_cli.workflows.launch import (
    LAUNCH_ON_CPUS,
    LOG,
    RESULT,
    held,
    join,
    make_accelerator,
    require_processes,
    run_folder,
    with_workers,
)
from vicvlm_cli.workflows.loop import parameter_groups, run_loop, total_steps
from vicvlm_cli.workflows.metrics import LossRow, Metrics, summary_dicts
from vicvlm_cli.workflows.profile import Recorder, trace_file
from vicvlm_cli.workflows.session import Job, Session
from vicvlm_cli.workflows.state import (
    Position,
    RunError,
    find_run_state,
    kept_step,
    load_run_state,
)
from vicvlm_cli.workflows.views import check_views, drop_views

PRESET_OF_SOURCE = {
    "scenes": "vicvlm-tiny",
    "flickr8k": "vicvlm-tiny-photos",
    "folder": "vicvlm-tiny-photos",
}
DEFAULT_PRESET = "vicvlm-small-flickr30k"


@dataclass
class TrainResult:
    """What a training gave. ``validation`` has a row for each validation, of one view of pictures.

    ``best``: what the weights kept reach by all views, the query bank and re-ranking.
    """

    checkpoint: Path
    run: Path
    losses: list[LossRow]
    validation: list[dict[str, Any]]
    best: dict[str, Any] | None
    steps: int
    pairs: int
    seconds: float
    rerank_weights: RerankWeights
    profile: Profile | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "checkpoint": str(self.checkpoint),
            "run": str(self.run),
            "losses": summary_dicts(self.losses),
            "rerank_weights": self.rerank_weights._asdict(),
            "profile": self.profile.to_dict() if self.profile else None,
            "pairs_per_second": round(self.pairs / max(self.seconds, 1e-9), 1),
        }


def pretrain(
    data: Path,
    *,
    preset: str | None = None,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: Path | None = None,
    track: str = "none",
    profile: Path | None = None,
    progress: Progress,
) -> TrainResult:
    """Train a new model on the ``train`` split of a prepared data set.

    Args:
        data: the prepared data set.
        preset: a built-in preset; None takes the one that suits the data set.
        config_file: TOML laid over the preset, and ``overrides`` (``key=value``) over that.
        output: folder of the run; None makes a new one under ``runs/``.
        resume: a run to go on with; its own settings count.
        track: ``none``, ``tensorboard`` or ``wandb``.
        profile: where the trace of a few steps goes, see :func:`trace_file`; None: none is made.

    Raises:
        UserError: data, configuration, weights, a run or a place of the trace that cannot be used.
    """
    join()
    trace = profile and trace_file(profile, "pretrain")
    dataset = PreparedDataset.open(data)
    if resume is not None:
        if preset or config_file or overrides or output:
            raise UsageError("--resume goes on with a run's own settings: give it alone")
        return _resume("pretrain", dataset, resume, track, trace, progress)
    if preset is None:
        preset = PRESET_OF_SOURCE.get(dataset.manifest.source, DEFAULT_PRESET)
        source = dataset.manifest.source
        progress.say(f"preset: {preset} (default for {source}; --preset to change)")
    config = configs.load_config(preset, config_file, overrides, recipe_of=recipe_of)
    with run_folder("pretrain", dataset, output, progress) as run:
        accelerator = make_accelerator(config.pretrain, track, run)
        split = dataset.split("train")
        if config.model.text_encoder:
            tokenizer = Tokenizer.load(config.model.text_encoder)
        else:
            captions = (caption for group in split.captions for caption in group)
            tokenizer = Tokenizer.train(captions, config.model.vocab_size)
        set_seed(config.pretrain.seed)
        model = create_model(config.model, tokenizer.vocab_size)
        job = Job("pretrain", config, model, tokenizer, dataset, run, Position())
        return _train(job, accelerator, trace, progress)


def finetune(
    checkpoint: Path,
    data: Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: Path | None = None,
    track: str = "none",
    profile: Path | None = None,
    progress: Progress,
) -> TrainResult:
    """Fine-tune a checkpoint for retrieval on the ``train`` split of a prepared data set.

    The checkpoint's own configuration is the start, ``overrides`` lie over it. The weights kept are
    those that are best on validation recall.

    Raises:
        UserError: a checkpoint, data, configuration, run or place of the trace that cannot be used.
    """
    join()
    trace = profile and trace_file(profile, "finetune")
    dataset = PreparedDataset.open(data)
    if resume is not None:
        if overrides or output:
            raise UsageError("--resume goes on with a run's own settings: give it alone")
        return _resume("finetune", dataset, resume, track, trace, progress)
    loaded = load_model(checkpoint, device="cpu")
    config = configs.load_config(base=loaded.info.config, overrides=overrides)
    if config.model != loaded.vlm.config:
        raise UsageError("a checkpoint's model cannot be changed: leave out --set model.…")
    with run_folder("finetune", dataset, output, progress) as run:
        accelerator = make_accelerator(config.finetune, track, run)
        set_seed(config.finetune.seed)
        job = Job("finetune", config, loaded.vlm, loaded.tokenizer, dataset, run, Position())
        return _train(job, accelerator, trace, progress)


def _resume(
    kind: str,
    dataset: PreparedDataset,
    run: Path,
    track: str,
    trace: Path | None,
    progress: Progress,
) -> TrainResult:
    state = find_run_state(run)
    if state is None:
        raise UserError(f"{run} cannot be resumed: {_why_not(run)}")
    description = json.loads((state / "run.json").read_text("utf-8"))
    if description["kind"] != kind:
        raise UserError(f"{run} is a {description['kind']} run: use vicvlm {description['kind']}")
    if description["split_hash"] != dataset.split("train").hash:
        raise UserError(
            f"{run} was trained on another data set than {dataset.path}: name that one with --data"
        )
    config = configs.from_dict(Config, description["config"])
    tokenizer = Tokenizer.from_json((state / "tokenizer.json").read_text("utf-8"))
    position = Position(**description["position"])
    train = config.pretrain if kind == "pretrain" else config.finetune
    if "num_processes" in description:  # states of earlier versions do not say
        require_processes(description["num_processes"], kind, run)
    accelerator = make_accelerator(train, track, run)
    set_seed(train.seed)
    model = build_model(configs.from_dict(ModelConfig, description["model"]))
    job = Job(kind, config, model, tokenizer, dataset, run, position, state)
    progress.say(f"resuming {run} at step {position.step}")
    with held(run):
        return _train(job, accelerator, trace, progress)


def _why_not(run: Path) -> str:
    """Why a run without a saved state does not go on, and what to do instead."""
    if (run / RESULT).is_file():
        return "it has finished; start a new run without --resume"
    if (run / FILE_NAME).is_file():
        return f"it has a {FILE_NAME} but no saved state; start a new run in another folder"
    what = "it has no saved state" if run.is_dir() else "there is no such folder"
    return f"{what}; give the command that begins it, with --output {run} and without --resume"


def _train(
    job: Job, accelerator: Accelerator, trace: Path | None, progress: Progress
) -> TrainResult:
    try:
        return _run_job(job, accelerator, trace, progress)
    except torch.OutOfMemoryError as error:
        pairs = job.train.contrastive_batch or job.train.batch_size
        caches = getattr(OBJECTIVES[job.train.objective], "CACHES_CONTRAST", False)
        contrast = f" (--contrastive-batch {pairs} keeps the size of the contrast)"
        step = kept_step(job.run)
        kept = f"; the state of step {step} is kept, for --resume {job.run} with more memory free"
        raise RunError(
            f"out of memory on {accelerator.device}: lower --batch-size, which is "
            f"{job.train.batch_size}{contrast if caches and job.train.accumulate == 1 else ''}"
            f"{'' if step is None else kept}"
        ) from error


def _run_job(
    job: Job, accelerator: Accelerator, trace: Path | None, progress: Progress
) -> TrainResult:
    config, data = job.train, job.config.data
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    split = job.dataset.split("train")
    plan = Plan(
        tuple(len(c) for c in split.captions),
        data.captions,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        data.more_captions,
    )
    data = with_workers(data, accelerator, job.model.config.image_size, plan, progress)
    check_views(job.model, config)
    job.model.image_encoder.freeze(config.frozen_blocks, for_good=not config.frozen_epochs)
    objective = create_objective(job.model, job.tokenizer, config, data.more_captions)
    groups = parameter_groups(objective, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    if job.state is not None:
        load_run_state(accelerator, job.state)
    set_seed(config.seed + job.position.step, device_specific=True)
    metrics = Metrics(accelerator, job.run / LOG, progress, job.position.losses)
    _say_what(job, accelerator, plan, progress)
    session = Session(job, accelerator, metrics, progress)
    if job.kind == "finetune" and config.select == "best" and job.state is None:
        session.validate()  # so that what is kept is never worse than what it came from
    recorder = Recorder(
        trace if accelerator.is_main_process else None, accelerator.device, progress
    )
    try:
        run_loop(
            accelerator,
            objective,
            optimizer,
            config=config,
            data=data,
            split=split,
            tokenizer=job.tokenizer,
            plan=plan,
            position=job.position,
            folder=job.run,
            metrics=metrics,
            validate=session.validate,
            save_state=session.save_state,
            recorder=recorder,
            progress=progress,
        )
    except BaseException:
        if accelerator.is_local_main_process and find_run_state(job.run) is None:
            drop_views(job.run)  # nothing goes on from here
        if accelerator.is_main_process and job.state is None and job.position.step == 0:
            # Of the weights that a fine-tuning starts from: another try may have the folder.
            for name in (FILE_NAME, LOG):
                (job.run / name).unlink(missing_ok=True)
        raise
    best = session.finish()
    accelerator.end_training()
    rows = job.position.validation
    result = TrainResult(
        checkpoint=session.checkpoint,
        run=job.run,
        losses=metrics.summary({name: loss.weight for name, loss in config.losses.items()}),
        validation=rows,
        best=best,
        steps=job.position.step,
        pairs=job.position.pairs,
        seconds=round(job.position.seconds, 1),
        rerank_weights=RerankWeights(**best["rerank_weights"]) if best else RerankWeights(),
        profile=recorder.profile,
    )
    if accelerator.is_main_process:
        try:
            _write_whole(job.run / RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
        except OSError as error:  # all that it says is returned, and the weights are kept
            progress.say(f"warning: {job.run / RESULT} was not written: {error.strerror}")
    return result


def _say_what(job: Job, accelerator: Accelerator, plan: Plan, progress: Progress) -> None:
    environ = os.environ
    asked = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    if asked and "WORLD_SIZE" not in environ and accelerator.num_processes == 1:
        progress.say(
            "warning: accelerate was asked for several processes but started one; on CPUs use "
            f"{LAUNCH_ON_CPUS} N -m vicvlm_cli …"
        )
    if job.dataset.manifest.partial:
        progress.say(f"warning: the data set is partial: {job.dataset.manifest.partial}")
    encoder = job.config.model  # a folder has weights of its own
    random = not encoder.image_weights and not Path(encoder.image_encoder).is_dir()
    if job.train.frozen_blocks and random and job.kind == "pretrain":
        progress.say(
            "warning: blocks of an image encoder with random weights are frozen; set "
            "pretrain.frozen_blocks, frozen_epochs and cached_views to 0, or name --image-weights"
        )
    size = sum(p.numel() for p in job.model.parameters()) / 1e6
    steps = total_steps(plan, job.train)
    processes = accelerator.num_processes
    progress.say(
        f"training {job.train.objective}: {size:.1f} M parameters, {steps:,} steps of "
        f"{plan.batch_size * processes * job.train.step_batches} pairs, {accelerator.device.type} "
        f"{accelerator.mixed_precision}, {processes} process{'es' * (processes > 1)}, in {job.run}"
    )


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, "utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
