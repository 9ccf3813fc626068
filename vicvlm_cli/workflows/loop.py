"""The training loop: one for pretraining and fine-tuning, on one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch, Plan, batches
from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.data.transforms import Draws, augmented
from vicvlm_cli.errors import UserError
from vicvlm_cli.objectives.ranks import Noise, seed_modules
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import DataConfig, TrainConfig
from vicvlm_cli.workflows.frozen import FrozenBlocks
from vicvlm_cli.workflows.inputs import Input, WordDropout, cached_inputs, plain_inputs
from vicvlm_cli.workflows.launch import make_rows
from vicvlm_cli.workflows.metrics import LOG_STEPS, Metrics
from vicvlm_cli.workflows.profile import Recorder
from vicvlm_cli.workflows.state import Position
from vicvlm_cli.workflows.stopping import StopAtStep
from vicvlm_cli.workflows.views import Views, drop_views, make_views

T = TypeVar("T")
# Never decayed: they are few, and their size means something (biases, norms, embeddings, scale).
NO_DECAY = ("embed", "bias", "norm", "token", "logit_scale")
LONGEST_WARMUP = 1 / 3  # of a run, where it is by steps
ASK_SECONDS = 1.0  # between two looks at who was asked to stop; launchers kill half a minute later


def parameter_groups(objective: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: the image encoder and the rest, each with and without weight decay.

    What of the image encoder is frozen at first is apart: it has a warm-up of its own (``thaws``).
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    model: Any = objective.model
    of_images = {id(p) for p in model.image_encoder.parameters()}
    frozen = {id(p) for p in model.image_encoder.frozen_parameters()}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = config.lr
        if id(parameter) in of_images and config.image_lr:
            lr = config.image_lr
        plain = parameter.ndim < 2 or any(word in name for word in NO_DECAY)
        decay = 0.0 if plain else config.weight_decay
        groups.setdefault((lr, decay, id(parameter) in frozen), []).append(parameter)
    return [
        {"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay, "thaws": thaws}
        for (lr, decay, thaws), p in groups.items()
    ]


def lr_factor(
    progress: float, config: TrainConfig, begins: float = 0.0, step: float = math.inf
) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to ``final_lr``.

    What ``begins`` to train at a share of the run warms up from there. In the first
    ``warmup_steps`` the run's ``step`` bounds the rate too, but not past a third of the run.
    """
    since = max(progress - begins, 0.0)
    warm = max(since / config.warmup, 1e-3) if since < config.warmup else 1.0
    if step + 1 < config.warmup_steps:
        warm = min(warm, max((step + 1) / config.warmup_steps, progress / LONGEST_WARMUP))
    rest = max(progress - config.warmup, 0.0) / max(1 - config.warmup, 1e-9)
    cosine = (1 + math.cos(math.pi * min(rest, 1))) / 2
    return warm * (config.final_lr + (1 - config.final_lr) * cosine)


def total_steps(plan: Plan, config: TrainConfig) -> int:
    """Optimiser steps of the whole run."""
    return max(1, math.ceil(config.epochs * plan.batches / config.step_batches))


def clock_of(config: TrainConfig) -> Callable[[], float]:
    """Seconds as ``max_minutes`` counts them: on the wall, or of this process's work a thread."""
    if config.clock == "cpu":
        return lambda: time.process_time() / torch.get_num_threads()
    return time.perf_counter


def agrees_anyway(accelerator: Accelerator, config: TrainConfig) -> bool:
    """Whether asking all processes to stop costs no step: there is one, or all wait at each."""
    several = accelerator.num_processes > 1
    return not several or accelerator.device.type == "cpu" or config.max_minutes > 0


class Agreements:
    """At which steps processes agree whether to stop, where that makes them wait for the device.

    At each step until steps are known to be shorter than ``ASK_SECONDS``. ``agreed`` gives all of
    them the first process's value, so that all agree at the same steps.
    """

    def __init__(self, step: int, agreed: Callable[[int], int]) -> None:
        self.next, self._agreed = step + 1, agreed
        self._last, self._since = step, time.monotonic()

    def made(self, step: int) -> None:
        """All have agreed at ``step``."""
        now = time.monotonic()
        seconds = (now - self._since) / (step - self._last)
        steps = int(ASK_SECONDS / max(seconds, 1e-9))
        self.next = step + self._agreed(min(max(steps, 1), LOG_STEPS))
        self._last, self._since = step, now


def augment(batch: Batch, size: int, data: DataConfig, noise: Noise) -> Tensor:
    """Random crops, flips where captions allow them, and colours: float [B, 3, size, size]."""
    rows = len(batch.image)
    flip = batch.flip_ok & (noise.rand(rows) < 0.5) & data.flip
    draws = Draws(flip, noise.rand(rows, 4), noise.rand(rows, 3))
    return augmented(batch.image, size, data, draws)


def run_loop(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    config: TrainConfig,
    data: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    plan: Plan,
    position: Position,
    folder: Path,
    metrics: Metrics,
    validate: Callable[[], None],
    save_state: Callable[[], None],
    recorder: Recorder,
    progress: Progress,
) -> None:
    """Train from ``position`` to the end of the schedule, or of ``max_minutes``.

    ``folder``: of the run, for what takes room only as long as it lasts.

    Raises:
        UserError: the split does not fill a batch, or a loss is not finite.
    """
    model = accelerator.unwrap_model(objective).model
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = total_steps(plan, config)
    words = config.predicts_words
    rows = make_rows(accelerator, model, data, split, tokenizer, progress, words=words)
    checks = max(1, round(config.validate_every * plan.batches / config.step_batches))
    clock = clock_of(config)
    began = last_flush = last_state = clock()
    began -= position.seconds
    pairs_flushed = position.pairs
    per_batch = plan.batch_size * plan.world_size
    part = recorder.part

    def agreed(value: T) -> T:
        """The first process's value; clocks differ, and what follows needs them all."""
        return broadcast_object_list([value])[0]

    def anyone(value: bool) -> bool:
        """Whether one process at least says so."""
        if accelerator.num_processes == 1:
            return value
        one = torch.tensor(float(value), device=accelerator.device)
        return bool(accelerator.reduce(one, "sum") > 0)

    def done() -> float:
        """Share of the run that is over; the same on every process."""
        share = position.step / steps
        if config.max_minutes > 0:
            limit = 60 * config.max_minutes
            # What was prepared takes of the time that there is, not of the schedule.
            spent = (clock() - began - position.preparing) / max(limit - position.preparing, 1e-9)
            share = agreed(max(share, spent))
        return min(share, 1.0)

    frozen = FrozenBlocks(model.image_encoder, config, plan, position)
    views: Views | None = None
    if config.cached_views and position.thawed is None:
        before, resumed = clock(), position.step > 0
        views = make_views(accelerator, model, rows, config, data, folder, resumed, progress)
        position.preparing += agreed(clock() - before)
        if 0 < 60 * config.max_minutes <= position.preparing:
            raise UserError(
                f"the views took {position.preparing / 60:.1f} minutes, and max_minutes is "
                f"{config.max_minutes:g}: raise it, or lower cached_views"
            )
        last_flush = last_state = clock()

    dropout: WordDropout | None = None
    if data.word_dropout:
        dropout = WordDropout(tokenizer, model.config, data.word_dropout, accelerator.device)

    def ready(batch: Batch, number: int) -> tuple[Batch, Noise]:
        """The run's ``number``-th batch on the device and augmented, and its noise."""
        noise = Noise(config.seed, number, accelerator.device)
        seed_modules(config.seed, number)  # the same dropout when it comes again, or resumed
        with part("augment"):
            if views is not None:
                batch = views.choose(batch, number, accelerator.device)
            else:
                batch = batch.to(accelerator.device)
                batch.image = augment(batch, model.config.image_size, data, noise)
            if dropout is not None:
                dropout(batch, noise)
        return batch, noise

    def first_pass(*arguments: Any) -> None:
        with part("first pass"):
            accelerator.unwrap_model(objective)(*arguments)

    inputs: Callable[..., Iterator[Input]] = plain_inputs
    if config.caches_contrast:
        inputs = partial(
            cached_inputs,
            batches=config.step_batches,
            parameters=parameters,
            objective=first_pass,
        )
    pin = accelerator.device.type == "cuda"
    objective.train()
    stopping = StopAtStep()
    agreements = None if agrees_anyway(accelerator, config) else Agreements(position.step, agreed)
    goal = steps * config.step_batches * per_batch
    with stopping, recorder, progress.bar("training", total=goal, unit="pairs") as bar:
        bar.advance(position.pairs)
        micro = position.step * config.step_batches
        share = done()
        if share < 1:
            loaded = recorder.waiting(batches(rows, plan, micro, workers=data.workers, pin=pin))
            for batch, noise, cached in inputs(loaded, micro, ready):
                weights = {k: v.at(share, position.step) for k, v in config.losses.items()}
                active = {name for name, weight in weights.items() if weight > 0}
                with accelerator.accumulate(objective):
                    with part("forward"):
                        values, trivial = objective(batch, noise, active, *cached)
                        # With those of weight 0, or processes would wait for gradients in vain.
                        total = torch.stack([weights.get(k, 0.0) * v for k, v in values.items()])
                    with part("backward"):
                        accelerator.backward(total.sum())
                        frozen.drop_gradients()
                    with part("optimiser"):
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(parameters, config.grad_clip)
                            for group in optimizer.param_groups:
                                begins = frozen.begins(group)
                                factor = lr_factor(share, config, begins, position.step)
                                group["lr"] = group["peak_lr"] * factor
                        optimizer.step()
                        optimizer.zero_grad()
                metrics.add(position.step + 1, values, trivial)
                micro += 1
                position.pairs += per_batch
                bar.advance(per_batch)
                if not accelerator.sync_gradients:
                    continue
                with part("EMA"):  # or whatever else follows the weights
                    accelerator.unwrap_model(objective).after_step()
                position.step += 1
                now = clock()
                position.seconds = now - began
                used, share = share, done()
                if frozen.thaw(share):
                    progress.say(f"the frozen blocks train from step {position.step} on")
                    if views is not None and accelerator.is_local_main_process:
                        drop_views(folder)  # gigabytes, of pictures in large numbers
                    views = None
                due = config.validate_every > 0 and position.step % checks == 0
                logging = position.step % LOG_STEPS == 0
                over = share >= 1
                # At the end too, for what follows takes minutes.
                interval = min(config.state_minutes, 1.0) if over else config.state_minutes
                saving = (logging or over) and agreed(now - last_state > 60 * interval)
                # Several processes must stop at one step.
                asking = agreements is None or position.step >= agreements.next or logging or over
                stop = asking and anyone(stopping.asked)
                if asking and agreements is not None:
                    agreements.made(position.step)
                # Before anything is kept, so that weights of a loss that is not finite never are.
                if logging or due or stop or over:
                    with part("log"):
                        means = metrics.flush(
                            step=position.step,
                            epoch=round(micro / plan.batches, 4),
                            progress=round(share, 5),
                            seconds=round(position.seconds, 3),
                            pairs=position.pairs,
                            frozen_blocks=model.image_encoder.frozen,
                            lr=config.lr * lr_factor(share, config, step=position.step),
                            pairs_per_second=round(
                                (position.pairs - pairs_flushed) / (now - last_flush), 1
                            ),
                            weights={name: loss.at(used) for name, loss in config.losses.items()},
                        )
                    last_flush, pairs_flushed = now, position.pairs
                    shown = "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                    bar.describe(f"epoch {micro / plan.batches:.1f}  {shown}")
                if due and not over:
                    before = clock()
                    with part("validation"):
                        validate()
                    objective.train()
                    last_flush += clock() - before
                    if config.clock == "cpu":  # what is compared is training alone
                        began += clock() - before
                if stop or saving:
                    position.losses = metrics.history
                    with part("state"):
                        save_state()
                    last_state = clock()
                recorder.step()
                if stop:
                    progress.say(f"stopped at step {position.step}: --resume {folder} goes on")
                    raise KeyboardInterrupt
                if over:
                    break
    position.losses = metrics.history
