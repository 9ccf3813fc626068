"""What a training step costs in floating-point operations, averaged over a run's schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trainings import write_whole  # beside this file

from vicvlm_cli.config import load_config
from vicvlm_cli.data.batches import Batch, Plan, Rows, batches, load_size
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.create import create_model
from vicvlm_cli.objectives import create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import Config, TrainConfig
from vicvlm_cli.workflows.loop import augment
from vicvlm_cli.workflows.train import DEFAULT_PRESET, PRESET_OF_SOURCE

STEPS = 1000  # of an imagined run, whose schedule is averaged over


def note_gflop(file: Path, data: Path, preset: str | None, settings: tuple[str, ...]) -> None:
    """Keep :func:`gflop_per_pair` in ``file``, if it is not there yet.

    ``frozen`` beside it is of a pair while blocks are frozen for a part of the run.
    """
    if file.exists():
        return
    costs = {"gflop_per_pair": gflop_per_pair(data, preset, settings)}
    if _config(PreparedDataset.open(data), preset, settings).pretrain.frozen_epochs:
        frozen = (*settings, "pretrain.frozen_epochs=0")
        costs["frozen"] = gflop_per_pair(data, preset, frozen)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, costs)


def operations(call: Callable[[], object]) -> int:
    """Floating-point operations of ``call``'s matrix products, attention and convolutions."""
    # The counter sees nothing of the CPU's fused attention: it is taken apart to be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    total: int = counter.get_total_flops()
    return total


class Step(NamedTuple):
    """A training's objective and one real batch of its data, to be measured."""

    train: TrainConfig
    objective: nn.Module
    batch: Batch
    noise: Noise

    def run(self, active: Set[str]) -> None:
        """Forward and backward of the losses in ``active``, as the training loop does."""
        values, _ = self.objective(self.batch, self.noise, active)
        torch.stack(list(values.values())).sum().backward()
        self.objective.zero_grad()

    @property
    def pairs(self) -> int:
        """Of the batch."""
        return len(self.batch.image)


def one_step(
    data: Path, preset: str | None, settings: tuple[str, ...], kind: str = "pretrain"
) -> Step:
    """A step of ``kind`` (or ``finetune``); the rest as :func:`gflop_per_pair`."""
    dataset = PreparedDataset.open(data)
    config = _config(dataset, preset, settings)
    split = dataset.split("train")
    train: TrainConfig = getattr(config, kind)
    captions = [caption for group in split.captions for caption in group]
    if config.model.text_encoder:
        tokenizer = Tokenizer.load(config.model.text_encoder)
    else:
        tokenizer = Tokenizer.train(captions, config.model.vocab_size)
    model = create_model(config.model, tokenizer.vocab_size)
    fixed = not train.frozen_epochs
    model.image_encoder.freeze(train.frozen_blocks if fixed else 0)
    objective = create_objective(model, tokenizer, train).train()

    rows = Rows(
        split,
        tokenizer,
        load_size(model.config.image_size, config.data),
        config.model.max_tokens,
        words=train.predicts_words,
    )
    counts = tuple(len(group) for group in split.captions)
    size = min(train.batch_size, len(split))
    plan = Plan(counts, config.data.captions, size, train.seed, more=config.data.more_captions)
    batch = next(batches(rows, plan))
    noise = Noise(train.seed, 0, torch.device("cpu"))
    batch.image = augment(batch, model.config.image_size, config.data, noise)
    if train.cached_views and fixed:
        batch.begun = model.image_encoder.begin(model.normalize(batch.image))
    return Step(train, objective, batch, noise)


def _config(dataset: PreparedDataset, preset: str | None, settings: tuple[str, ...]) -> Config:
    preset = preset or PRESET_OF_SOURCE.get(dataset.manifest.source, DEFAULT_PRESET)
    return load_config(preset, None, settings, recipe_of=recipe_of)


def gflop_per_pair(
    data: Path, preset: str | None, settings: tuple[str, ...], kind: str = "pretrain"
) -> float:
    """GFLOP of a pair in pretraining: forward and backward, all that the objective runs.

    Matrix products, attention and convolutions count, a multiply-add as two; EMA targets and
    teachers too. Every set of losses that is on together in some step is measured once, on a real
    batch, and counts as often as it is on: losses share passes, and do not add up. Blocks that are
    frozen for a part of the run count as trained. What ``cached_views`` costs beforehand is not of
    a pair, and not in it.

    Args:
        preset: None is the data set's own.
        settings: ``KEY=VALUE`` as for ``--set``.
        kind: ``pretrain`` or ``finetune``.
    """
    step = one_step(data, preset, settings, kind)
    schedule = active_sets(step.train)
    total = 0.0
    for active, number in schedule.items():
        total += operations(partial(step.run, active)) * number
    return total / schedule.total() / step.pairs / 1e9


def active_sets(train: TrainConfig) -> Counter[frozenset[str]]:
    """How many of ``STEPS`` steps each set of losses is on in."""
    return Counter(
        frozenset(name for name, loss in train.losses.items() if loss.at(i / STEPS, i) > 0)
        for i in range(STEPS)
    )
