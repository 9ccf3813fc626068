"""Training steps to be measured: those of the presets with random weights, on made-up pairs."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from vicvlm_cli.config import Config, load_config
from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.data.transforms import CROP_MARGIN
from vicvlm_cli.device import supports_bf16
from vicvlm_cli.model.create import create_model
from vicvlm_cli.objectives import create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.workflows.loop import augment, parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# BERT-small, which the preset takes from the hub.
BERT_SMALL = ("model.text_encoder=''", "model.vocab_size=30522", "model.text_heads=8")
LENGTHS = (15.4, 5.0)  # mean and deviation of the tokens of a Flickr30k caption, [CLS] and [SEP] in


def config_of(preset: str, *overrides: str) -> Config:
    """A preset with random weights in the place of the hub's."""
    own = BERT_SMALL if "small" in preset else ()
    given = ["model.image_weights=''", *own, *overrides]
    return load_config(preset, overrides=given, recipe_of=recipe_of)


def make_batch(config: Config, rows: int, seed: int = 0) -> Batch:
    """Random pictures and captions of the lengths that Flickr30k's have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(rows, generator=generator) * LENGTHS[1] + LENGTHS[0]
    lengths = lengths.round().long().clamp(4, config.model.max_tokens)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [B, L]
    ids = torch.randint(10, _words(config), mask.shape, generator=generator)
    side = round(config.model.image_size * CROP_MARGIN)
    return Batch(
        image=torch.randint(256, (rows, 3, side, side), generator=generator, dtype=torch.uint8),
        input_ids=ids.masked_fill(~mask, 0),
        attention_mask=mask,
        image_id=torch.arange(rows),
        flip_ok=torch.ones(rows, dtype=torch.bool),
    ).to(DEVICE)


def _words(config: Config) -> int:
    return min(config.model.vocab_size, 6000)


def make_tokenizer(config: Config) -> Tokenizer:
    """A vocabulary for the objectives that want to know its special tokens."""
    return Tokenizer.train(["a dog on a beach"], 100)


class Step:
    """One optimiser step of an objective, as ``workflows/loop.py`` takes it.

    Args:
        rows: pairs a step.
    """

    def __init__(self, config: Config, rows: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        train = config.pretrain
        self.config, self.rows = config, rows
        model = create_model(config.model, config.model.vocab_size)
        model.image_encoder.freeze(train.frozen_blocks)
        self.objective: Any = create_objective(model, make_tokenizer(config), train).to(DEVICE)
        self.objective.train()
        groups = parameter_groups(self.objective, train)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.batch = make_batch(config, rows)
        self.count = 0

    @property
    def losses(self) -> set[str]:
        """Those of a weight above 0."""
        return {k for k, v in self.config.pretrain.losses.items() if v.weight > 0}

    def active(self, step: int, progress: float = 1.0) -> set[str]:
        """Losses that are on at a step when ``progress`` of the run is done."""
        losses = self.config.pretrain.losses
        return {name for name, loss in losses.items() if loss.at(progress, step) > 0}

    def __call__(self, active: Set[str] | None = None) -> None:
        """Augment, forward, backward, clip, step, follow."""
        active = self.losses if active is None else active
        noise = Noise(0, self.count, DEVICE)
        batch = self.batch.rows(slice(None))
        batch.image = augment(batch, self.config.model.image_size, self.config.data, noise)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=supports_bf16(DEVICE)):
            values, _ = self.objective(batch, noise, active)
        losses = self.config.pretrain.losses
        total: Tensor = torch.stack([losses[k].weight * v for k, v in values.items()]).sum()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.pretrain.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step()
        self.count += 1
