"""Training steps to be measured: those of the presets with random weights, on made-up pairs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Set
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vicvlm_cli.config import load_config, read_preset
from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.data.transforms import CROP_MARGIN
from vicvlm_cli.device import supports_bf16
from vicvlm_cli.model import dropout, lengths
from vicvlm_cli.model.attention import take
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.fusion import Fused
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import Config
from vicvlm_cli.workflows.loop import augment, parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# BERT-small, which the preset takes from the hub.
BERT_SMALL = ("model.text_encoder=''", "model.vocab_size=30522", "model.text_heads=8")
LENGTHS = (15.4, 5.0)  # mean and deviation of the tokens of a Flickr30k caption, [CLS] and [SEP] in


def config_of(preset: str, *overrides: str) -> Config:
    """A preset with random weights in the place of the hub's."""
    own = BERT_SMALL if read_preset(preset)["model"].get("text_encoder") else ()
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
        words=ids.masked_fill(~mask, 0),
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

    def schedule(self, steps: int = 1200) -> dict[frozenset[str], float]:
        """Which losses are on together, and in what share of the run's steps."""
        losses = self.config.pretrain.losses.items()
        counts = Counter(
            frozenset(name for name, loss in losses if loss.at(step / steps, step) > 0)
            for step in range(steps)
        )
        return {active: count / steps for active, count in counts.items()}

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


@contextlib.contextmanager
def without_exact_cuts() -> Iterator[None]:
    """The same results, computed without what spares work and leaves them as they are.

    Every output of the fusion, a picture again for each caption, captions padded to the longest of
    the batch, and a random number for each element that dropout may drop.
    """

    def fuse(
        model: VLM,
        image: Tensor,
        image_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        of: Tensor | None = None,
        want: str = "all",
        at: Tensor | None = None,
    ) -> Fused:
        assert model.fusion is not None
        if of is not None:
            image = image[of]
            image_mask = None if image_mask is None else image_mask[of]
        fused: Fused = model.fusion(image, image_mask, text, text_mask)
        if at is None:
            return fused
        if want == "text":
            return fused._replace(text=take(fused.text, at))
        return fused._replace(image=take(fused.image, at))

    with (
        mock.patch.object(VLM, "fuse", fuse),
        mock.patch.object(lengths, "GROUPS", 1),
        mock.patch.object(dropout.Dropout, "forward", nn.Dropout.forward),
    ):
        yield
