"""The frozen blocks of a run's image encoder, and when they begin to train."""

from __future__ import annotations

import math
from typing import Any

from vicvlm_cli.data.batches import Plan
from vicvlm_cli.model.image_encoder import ImageEncoder
from vicvlm_cli.settings import TrainConfig
from vicvlm_cli.workflows.state import Position

MOST = 0.25  # share of a run that blocks are frozen for if they are to train as well


class FrozenBlocks:
    """Blocks that keep their weights: for good, or for the first ``frozen_epochs`` of a run.

    Where several processes train, which must agree on what wants gradients from the beginning, the
    latter want them all the time, and what they get while they are frozen is dropped.

    Args:
        position: where the run stands; it keeps when they thawed.
    """

    def __init__(
        self, encoder: ImageEncoder, config: TrainConfig, plan: Plan, position: Position
    ) -> None:
        self._encoder, self._position = encoder, position
        self._resting = encoder.frozen_parameters() if config.frozen_epochs else []
        self._steps = math.ceil(config.frozen_epochs * plan.batches / config.step_batches)
        if position.thawed is not None:
            self._free()
        if plan.world_size == 1:
            for parameter in self._resting:
                parameter.requires_grad_(False)

    def drop_gradients(self) -> None:
        """Forget those of blocks that are frozen for a while, after each backward pass."""
        for parameter in self._resting:
            parameter.grad = None

    def thaw(self, share: float) -> bool:
        """Let them train if it is time, at a ``share`` of the run; whether they begin now."""
        if not self._resting or (self._position.step < self._steps and share < MOST):
            return False
        self._position.thawed = share
        self._free()
        return True

    def begins(self, group: dict[str, Any]) -> float:
        """Share of the run at which an optimiser's ``group`` begins to train."""
        if not group.get("thaws"):  # states of earlier versions do not say
            return 0.0
        return self._position.thawed or 0.0

    def _free(self) -> None:
        self._encoder.freeze(0)
        self._resting = []
