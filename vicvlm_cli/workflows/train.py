"""pretrain and finetune: from what the user names to a job, new or one that goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from vicvlm_cli import config as configs
from vicvlm_cli.checkpoint import FILE_NAME, load_model
from vicvlm_cli.data.caption_check import caption_warning
from vicvlm_cli.data.origins import seen_notes
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.create import build_model, create_model
from vicvlm_cli.objectives import recipe_of
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import Config, ModelConfig
from vicvlm_cli.workflows.launch import (
    RESULT,
    held,
    join,
    make_accelerator,
    require_processes,
    run_folder,
)
from vicvlm_cli.workflows.profile import trace_file
from vicvlm_cli.workflows.run import TrainResult, train
from vicvlm_cli.workflows.session import Job
from vicvlm_cli.workflows.state import (
    Position,
    find_run_state,
)

PRESET_OF_SOURCE = {
    "scenes": "vicvlm-tiny",
    "flickr8k": "vicvlm-tiny-photos",
    "folder": "vicvlm-tiny-photos",
}
DEFAULT_PRESET = "vicvlm-small-flickr30k"
MASKED = ("mim", "joint_mim")  # what --target is of


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
    named = any(word.startswith("pretrain.options.target=") for word in overrides)
    masked = [config.pretrain.losses[name] for name in MASKED if name in config.pretrain.losses]
    if named and masked and not any(loss.weight for loss in masked):
        progress.say(
            "warning: --target is of masked image modelling, which is off: mim and joint_mim have "
            "weight 0; --set 'pretrain.losses.mim={weight = 0.1, start = 0.5, ramp = 0.1, every = "
            "2}' turns it on"
        )
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
        if accelerator.is_main_process and (
            told := caption_warning(
                split.captions,
                tokenizer,
                model.config.max_tokens,
                pretrained=bool(config.model.text_encoder),
            )
        ):
            progress.say(f"warning: {told}")
        job = Job("pretrain", config, model, tokenizer, dataset, run, Position())
        return train(job, accelerator, trace, progress)


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
        job.before = loaded.info.origins
        if "val" in dataset.splits:
            for note in seen_notes(dataset.manifest, dataset.split("val"), job.before):
                progress.say(f"warning: on val, which chooses the weights: {note}")
        return train(job, accelerator, trace, progress)


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
    with held(run):
        job, accelerator = _job_of(kind, dataset, run, state, track)
        progress.say(f"resuming {run} at step {job.position.step}")
        return train(job, accelerator, trace, progress)


def _job_of(
    kind: str, dataset: PreparedDataset, run: Path, state: Path, track: str
) -> tuple[Job, Accelerator]:
    """The job whose state was saved."""
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
    before = description.get("before", [])  # states of earlier versions do not say
    return Job(kind, config, model, tokenizer, dataset, run, position, state, before), accelerator


def _why_not(run: Path) -> str:
    """Why a run without a saved state does not go on, and what to do instead."""
    if (run / RESULT).is_file():
        return "it has finished; start a new run without --resume"
    if (run / FILE_NAME).is_file():
        return f"it has a {FILE_NAME} but no saved state; start a new run in another folder"
    if not run.is_dir():
        return "there is no such folder; name one of those under runs/, or where --output put it"
    return (
        f"it has no saved state; give the command that begins it, with --output {run} and without "
        "--resume"
    )
