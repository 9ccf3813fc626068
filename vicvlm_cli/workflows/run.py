"""A training, from all that it is made of to what it gave."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from vicvlm_cli.checkpoint import FILE_NAME
from vicvlm_cli.data.batches import Plan
from vicvlm_cli.data.shards import write_whole
from vicvlm_cli.device import keep_freed_memory
from vicvlm_cli.errors import OwnError
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.objectives import OBJECTIVES, create_objective
from vicvlm_cli.report.profile import Profile
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.launch import (
    LAUNCH_ON_CPUS,
    LOG,
    RESULT,
    with_workers,
)
from vicvlm_cli.workflows.loop import parameter_groups, run_loop, total_steps
from vicvlm_cli.workflows.metrics import LossRow, Metrics, summary_dicts
from vicvlm_cli.workflows.profile import Recorder
from vicvlm_cli.workflows.session import Job, Session
from vicvlm_cli.workflows.state import (
    find_run_state,
    kept_step,
    load_run_state,
)
from vicvlm_cli.workflows.views import check_views, drop_views


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


def train(
    job: Job, accelerator: Accelerator, trace: Path | None, progress: Progress
) -> TrainResult:
    """Everything from the first step, or the next one of a run that goes on, to the result.

    Raises:
        UserError: the job cannot be trained, memory ends, or a file cannot be written.
    """
    try:
        return _train(job, accelerator, trace, progress)
    except torch.OutOfMemoryError as error:
        pairs = job.train.contrastive_batch or job.train.batch_size
        caches = getattr(OBJECTIVES[job.train.objective], "CACHES_CONTRAST", False)
        contrast = f" (--contrastive-batch {pairs} keeps the size of the contrast)"
        step = kept_step(job.run)
        kept = f"; the state of step {step} is kept, for --resume {job.run} with more memory free"
        raise OwnError(
            f"out of memory on {accelerator.device}: lower --batch-size, which is "
            f"{job.train.batch_size}{contrast if caches and job.train.accumulate == 1 else ''}"
            f"{'' if step is None else kept}"
        ) from error


def _train(
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
    plan.require_a_batch(split)
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
            write_whole(job.run / RESULT, json.dumps(result.to_dict(), indent=2) + "\n")
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
