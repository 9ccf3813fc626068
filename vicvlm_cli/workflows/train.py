"""pretrain and finetune: from a prepared data set to a checkpoint, its losses and its recall."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    parse_flag_from_env,
    set_seed,
)

from vicvlm_cli import config as configs
from vicvlm_cli.checkpoint import FILE_NAME, load_model, save_model
from vicvlm_cli.config import Config, DataConfig, ModelConfig, TrainConfig
from vicvlm_cli.data.batches import Plan
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.device import supports_bf16
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.model.vlm import VLM, create_model
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.loop import (
    Position,
    find_run_state,
    parameter_groups,
    run_loop,
    save_run_state,
    total_steps,
)
from vicvlm_cli.workflows.metrics import LossRow, Metrics, summary_dicts

PRESET_OF_SOURCE = {"scenes": "vicvlm-tiny"}
DEFAULT_PRESET = "vicvlm-small-flickr30k"


@dataclass
class TrainResult:
    """What a training gave. ``validation`` has a row for each validation, the last one final."""

    checkpoint: Path
    run: Path
    losses: list[LossRow]
    validation: list[dict[str, Any]]
    best: dict[str, Any] | None
    steps: int
    pairs: int
    seconds: float
    rerank_weight: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "checkpoint": str(self.checkpoint),
            "run": str(self.run),
            "losses": summary_dicts(self.losses),
            "pairs_per_second": round(self.pairs / max(self.seconds, 1e-9), 1),
        }


@dataclass
class _Job:
    """One training, ready to run."""

    kind: str  # "pretrain" or "finetune"
    config: Config
    model: VLM
    tokenizer: Tokenizer
    dataset: PreparedDataset
    run: Path
    position: Position
    state: Path | None = None

    @property
    def train(self) -> TrainConfig:
        return self.config.pretrain if self.kind == "pretrain" else self.config.finetune

    @property
    def origin(self) -> dict[str, Any]:
        split, manifest = self.dataset.split("train"), self.dataset.manifest
        return {
            "source": manifest.source,
            "split_name": manifest.split_name,
            "split": "train",
            "split_hash": split.hash,
            "partial": manifest.partial,
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

    Raises:
        UserError: data, configuration, weights or a run that cannot be used.
    """
    _join()
    dataset = PreparedDataset.open(data)
    if resume is not None:
        if preset or config_file or overrides or output:
            raise UsageError("--resume goes on with a run's own settings: give it alone")
        return _resume("pretrain", dataset, resume, track, progress)
    if preset is None and config_file is None:
        preset = PRESET_OF_SOURCE.get(dataset.manifest.source, DEFAULT_PRESET)
        source = dataset.manifest.source
        progress.say(f"preset: {preset} (default for {source}; --preset to change)")
    config = configs.load_config(preset, config_file, overrides)
    run = _run_folder("pretrain", dataset, output)
    accelerator = _accelerator(config.pretrain, track, run)
    split = dataset.split("train")
    if config.model.text_encoder:
        tokenizer = Tokenizer.load(config.model.text_encoder)
    else:
        captions = (caption for group in split.captions for caption in group)
        tokenizer = Tokenizer.train(captions, config.model.vocab_size)
    set_seed(config.pretrain.seed)
    model = create_model(config.model, tokenizer.vocab_size)
    job = _Job("pretrain", config, model, tokenizer, dataset, run, Position())
    return _train(job, accelerator, progress)


def finetune(
    checkpoint: Path,
    data: Path,
    *,
    overrides: Sequence[str] = (),
    output: Path | None = None,
    resume: Path | None = None,
    track: str = "none",
    progress: Progress,
) -> TrainResult:
    """Fine-tune a checkpoint for retrieval on the ``train`` split of a prepared data set.

    The checkpoint's own configuration is the start, ``overrides`` lie over it. The weights kept are
    those that are best on validation recall.

    Raises:
        UserError: a checkpoint, data, configuration or run that cannot be used.
    """
    _join()
    dataset = PreparedDataset.open(data)
    if resume is not None:
        if overrides or output:
            raise UsageError("--resume goes on with a run's own settings: give it alone")
        return _resume("finetune", dataset, resume, track, progress)
    loaded = load_model(checkpoint, device="cpu")
    config = configs.load_config(base=loaded.info.config, overrides=overrides)
    if config.model != loaded.vlm.config:
        raise UsageError("a checkpoint's model cannot be changed: leave out --set model.…")
    run = _run_folder("finetune", dataset, output)
    accelerator = _accelerator(config.finetune, track, run)
    set_seed(config.finetune.seed)
    job = _Job("finetune", config, loaded.vlm, loaded.tokenizer, dataset, run, Position())
    return _train(job, accelerator, progress)


def _resume(
    kind: str, dataset: PreparedDataset, run: Path, track: str, progress: Progress
) -> TrainResult:
    state = find_run_state(run)
    if state is None:
        done = " it has finished" if (run / "result.json").is_file() else " it has no saved state"
        raise UserError(f"{run} cannot be resumed:{done}; start a new run without --resume")
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
    accelerator = _accelerator(train, track, run)
    set_seed(train.seed)
    model = VLM(configs.from_dict(ModelConfig, description["model"]))
    job = _Job(kind, config, model, tokenizer, dataset, run, position, state)
    progress.say(f"resuming {run} at step {position.step}")
    return _train(job, accelerator, progress)


def _train(job: _Job, accelerator: Accelerator, progress: Progress) -> TrainResult:
    config, data = job.train, _with_workers(job.config.data, accelerator)
    split = job.dataset.split("train")
    plan = Plan(
        tuple(len(c) for c in split.captions),
        data.captions,
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    objective = create_objective(job.model, job.tokenizer, config)
    groups = parameter_groups(objective, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    if job.state is not None:
        accelerator.load_state(str(job.state))
    set_seed(config.seed + job.position.step, device_specific=True)
    if accelerator.is_main_process:
        job.run.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    metrics = Metrics(accelerator, job.run / "metrics.jsonl", job.position.losses)
    _say_what(job, accelerator, plan, progress)
    session = _Session(job, accelerator, metrics, progress)
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
        metrics=metrics,
        validate=session.validate,
        save_state=session.save_state,
        progress=progress,
    )
    rerank_weight = session.finish()
    accelerator.end_training()
    rows = job.position.validation
    result = TrainResult(
        checkpoint=session.checkpoint,
        run=job.run,
        losses=metrics.summary({name: loss.weight for name, loss in config.losses.items()}),
        validation=rows,
        best=max(rows, key=lambda row: row["dual"]["rsum"], default=None),
        steps=job.position.step,
        pairs=job.position.pairs,
        seconds=round(job.position.seconds, 1),
        rerank_weight=rerank_weight,
    )
    if accelerator.is_main_process:
        _write_whole(job.run / "result.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


class _Session:
    """What happens between steps: validation, keeping the weights, saving the state."""

    def __init__(
        self, job: _Job, accelerator: Accelerator, metrics: Metrics, progress: Progress
    ) -> None:
        self.job, self.accelerator, self.metrics = job, accelerator, metrics
        self.progress = progress
        self.checkpoint = job.run / FILE_NAME
        self.split = job.dataset.split("val") if "val" in job.dataset.splits else None
        if self.split is None:
            progress.say(f"{job.dataset.path} has no val split: the last weights will be kept")

    def validate(self) -> None:
        """Recall on validation by the first process, the others wait; keeps the better weights."""
        if self.accelerator.is_main_process:
            best = self.job.train.select == "best"
            row = self._measure(self.job.model, top_k=0)
            if row is None or not best or row["dual"]["rsum"] > self.job.position.best:
                self._keep(self.job.model, 0.0)
            if row is not None:
                self.job.position.best = max(self.job.position.best, row["dual"]["rsum"])
        self.accelerator.wait_for_everyone()

    def finish(self) -> float:
        """Validate once more, choose the re-ranking weight, write the final checkpoint."""
        self.validate()
        weight = 0.0
        top_k = self.job.train.rerank_top_k
        if self.accelerator.is_main_process:
            if self.split is not None and top_k and "itm" in self.metrics.history:
                kept = load_model(self.checkpoint, device=self.accelerator.device)
                row = self._measure(kept.vlm, top_k)
                assert row is not None
                weight = row["rerank_weight"]
                self._keep(kept.vlm, weight)
            shutil.rmtree(self.job.run / "state", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return float(broadcast_object_list([weight])[0])

    def save_state(self) -> None:
        """Write what resuming needs."""
        job = self.job
        description = {
            "kind": job.kind,
            "config": configs.to_dict(job.config),
            "model": configs.to_dict(job.model.config),
            "split_hash": job.dataset.split("train").hash,
            "position": asdict(job.position),
        }
        save_run_state(self.accelerator, job.run / "state", job.tokenizer, description)

    def _measure(self, model: VLM, top_k: int) -> dict[str, Any] | None:
        if self.split is None:
            return None
        result = evaluate_split(
            model,
            self.job.tokenizer,
            self.split,
            device=self.accelerator.device,
            precision=self.accelerator.mixed_precision,
            top_k=top_k,
            images=self.job.train.validation_images,
            progress=self.progress,
        )
        position = self.job.position
        row = {"step": position.step, "seconds": round(position.seconds, 1)}
        row |= {"pairs": position.pairs, **result.to_dict()}
        position.validation.append(row)
        self.metrics.write({"kind": "validation", **row})
        dual = result.dual
        self.progress.say(
            f"validation at step {position.step}: R@1 {dual.image_retrieval.r1:.1f} text to image, "
            f"{dual.text_retrieval.r1:.1f} image to text, RSUM {dual.rsum:.1f}"
        )
        return row

    def _keep(self, model: VLM, rerank_weight: float) -> None:
        job = self.job
        save_model(
            self.checkpoint,
            model,
            job.tokenizer,
            config=configs.to_dict(job.config),
            data=job.origin,
            objective=job.train.objective,
            rerank_weight=rerank_weight,
        )


def _join() -> None:
    """Join the other processes of the launch, on the CPU if asked to or if there is nothing else.

    Before anything else asks accelerate for its state: whoever asks first settles the device, and
    without a word about the CPU each process would train alone.

    Raises:
        UserError: fewer processes came together than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    nothing_else = launched > 1 and not torch.cuda.is_available()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or nothing_else)
    if state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched and {state.num_processes} came together; on CPUs "
            "use ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m vicvlm_cli …"
        )


def _accelerator(config: TrainConfig, track: str, run: Path) -> Accelerator:
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(PartialState().device) else "no"
    if track != "none" and importlib.util.find_spec(track) is None:
        raise UsageError(f"--track {track} needs its package: pip install 'vicvlm[track]'")
    accelerator = Accelerator(
        cpu=PartialState().device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulate,
        log_with=None if track == "none" else track,
        project_dir=str(run),
        # Losses come and go with their schedule, and their heads with them.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if track != "none":
        accelerator.init_trackers("vicvlm")
    return accelerator


def _run_folder(kind: str, dataset: PreparedDataset, output: Path | None) -> Path:
    """The folder of a new run, the same on every process.

    Raises:
        UserError: ``output`` holds a run already.
    """
    if output is None:
        stem = f"{kind}-{dataset.manifest.source}"
        names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
        free = next(n for n in names if not (Path("runs") / n).exists())
        return Path(broadcast_object_list([str(Path("runs") / free)])[0])
    taken = [f for f in (FILE_NAME, "metrics.jsonl", "state") if (output / f).exists()]
    if broadcast_object_list([bool(taken)])[0]:
        raise UserError(
            f"{output} already holds a run: choose another --output, or go on with "
            f"--resume {output}"
        )
    return output


def _with_workers(data: DataConfig, accelerator: Accelerator) -> DataConfig:
    if data.workers >= 0:
        return data
    cores = (os.cpu_count() or 1) // accelerator.num_processes
    # On the CPU the training itself wants every core: a loader process only takes turns with it.
    workers = 0 if accelerator.device.type == "cpu" else min(8, cores - 1)
    return dataclasses.replace(data, workers=max(workers, 0))


def _say_what(job: _Job, accelerator: Accelerator, plan: Plan, progress: Progress) -> None:
    environ = os.environ
    asked = "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_ADDR" in environ
    if asked and "WORLD_SIZE" not in environ and accelerator.num_processes == 1:
        progress.say(
            "warning: accelerate was asked for several processes but started one; on CPUs use "
            "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m vicvlm_cli …"
        )
    if job.dataset.manifest.partial:
        progress.say(f"warning: the data set is partial: {job.dataset.manifest.partial}")
    size = sum(p.numel() for p in job.model.parameters()) / 1e6
    steps = total_steps(plan, job.train)
    processes = accelerator.num_processes
    progress.say(
        f"training {job.train.objective}: {size:.1f} M parameters, {steps:,} steps of "
        f"{plan.batch_size * processes * job.train.accumulate} pairs, {accelerator.device.type} "
        f"{accelerator.mixed_precision}, {processes} process{'es' * (processes > 1)}, in {job.run}"
    )


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)
