"""Losses beside any objective, of what it projects in a step's first pass over the pair."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any

from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.model.fusion import masked_mean
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.retrieval import Losses


class FirstProjections:
    """Projections [B, P] of pictures and of captions, before they get unit length.

    They are those of a step's first pass over the pair as it is: nothing is encoded for them. Where
    a model projects each patch and word, as SCAN's does, they are the means over these.

    Args:
        model: whose projections; nothing of it is kept here but the step's outputs.
    """

    def __init__(self, model: RetrievalModel) -> None:
        self._seen: dict[str, Tensor] = {}
        for name in ("image_projection", "text_projection"):
            model.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.setdefault(name, output)

    def begin(self) -> None:
        """Forget what was projected: a step begins, or it is over."""
        self._seen.clear()

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pictures' and the captions' of ``batch``, the one that was projected first."""
        image, text = (self._seen[f"{side}_projection"].float() for side in ("image", "text"))
        if image.dim() == 3:  # [B, N, P] and [B, L, P]
            return image.mean(dim=1), masked_mean(text, batch.attention_mask)
        return image, text


class Beside(nn.Module):
    """An objective, and further losses of its projections.

    Args:
        objective: what else is trained; it owns the model.
        further: a module with the names of its ``LOSSES``, the ``projections`` that they are of,
            and ``forward(active, batch)`` like an objective's.
    """

    def __init__(self, objective: Any, further: Any) -> None:
        super().__init__()
        self.objective: Any = objective
        self.further: Any = further
        self.LOSSES: tuple[str, ...] = (*objective.LOSSES, *further.LOSSES)

    @property
    def model(self) -> RetrievalModel:
        """The model that the objective owns."""
        model: RetrievalModel = self.objective.model
        return model

    def forward(self, batch: Batch, noise: Noise, active: Set[str], *cached: Any) -> Losses:
        """The losses in ``active``, the objective's and the further, each with its trivial value.

        ``cached`` is the objective's own; the further losses are of one batch.
        """
        own = set(self.further.LOSSES)
        self.further.projections.begin()
        values, trivial = self.objective(batch, noise, active - own, *cached)
        if not active.isdisjoint(own):
            more, guesses = self.further(active, batch)
            values, trivial = {**values, **more}, {**trivial, **guesses}
        self.further.projections.begin()
        return values, trivial

    def after_step(self) -> None:
        """The objective's own; once an optimiser step."""
        self.objective.after_step()
