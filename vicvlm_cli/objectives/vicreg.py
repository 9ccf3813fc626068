"""VICReg beside any objective: its three terms on the two projections, by weight."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.ranks import Noise, gather
from vicvlm_cli.objectives.retrieval import Losses

TERMS = ("variance", "covariance", "invariance")


def vicreg_terms(
    views: list[Tensor], pairs: list[tuple[Tensor, Tensor]], active: Set[str]
) -> Losses:
    """Variance and covariance of each view, invariance within each pair (VICReg, eq. 1 to 6).

    Args:
        views: features [G, D] of the batches of all processes.
        pairs: which two of them belong together row by row.
        active: the terms wanted.

    Returns:
        The terms, and what each is for features that tell nothing: all rows at one point, all
        dimensions copies of one, features of other rows.

    Raises:
        UsageError: a single row has no variance.
    """
    _require_pairs(len(views[0]))
    terms = {
        "variance": [losses.variance(x) for x in views],
        "covariance": [losses.covariance(x) for x in views],
        "invariance": [losses.invariance(a, b) for a, b in pairs],
    }
    with torch.no_grad():
        guesses = {
            "variance": [torch.ones(())],
            "covariance": [losses.covariance_of_copies(x) for x in views],
            "invariance": [losses.invariance(a, b.roll(1, 0)) for a, b in pairs],
        }
    wanted = [name for name in TERMS if name in active]
    return (
        {name: torch.stack(terms[name]).mean() for name in wanted},
        {name: torch.stack(guesses[name]).mean() for name in wanted},
    )


def _require_pairs(number: int) -> None:
    if number < 2:
        raise UsageError(
            "VICReg needs two pairs or more a step: raise --batch-size, or lower vicvlm's "
            "options.masked_stride"
        )


class ProjectedVICReg(nn.Module):
    """VICReg on the pictures' and the captions' projections, before they get unit length.

    They are those of a step's first pass over the pair: nothing is encoded for it. They may go
    through an expander first (arXiv 2105.04906, sec. 3.2).

    Args:
        model: whose projections; it is the objective's, not this module's.
        expander: width of the expander's layers; 0: no expander.
    """

    def __init__(self, model: VLM, expander: int = 0) -> None:
        super().__init__()
        width = model.config.projection_dim
        self.expander = _expander(width, expander) if expander else nn.Identity()
        self._seen: dict[str, Tensor] = {}
        for name in ("image_projection", "text_projection"):
            model.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.setdefault(name, output)  # the first pass is over the pair as it is

    def begin(self) -> None:
        """Forget what was projected: a step begins, or it is over."""
        self._seen.clear()

    def forward(self, active: Set[str]) -> Losses:
        """The terms in ``active`` with their trivial values, of what was projected since.

        Raises:
            UsageError: the model projects patches and words, or there is but one pair.
        """
        if any(x.dim() != 2 for x in self._seen.values()):
            raise UsageError(
                "VICReg's terms are of one vector a picture and caption, and this model "
                f"projects each patch and word: leave {', '.join(TERMS)} out of the losses"
            )
        # Gathered first: the expander's batch norm is that of the global batch.
        gathered = [
            gather(self._seen[name].float()) for name in ("image_projection", "text_projection")
        ]
        _require_pairs(len(gathered[0]))
        a, b = (self.expander(x).float() for x in gathered)
        return vicreg_terms([a, b], [(a, b)], active)


class WithVICReg(nn.Module):
    """An objective, and :class:`ProjectedVICReg` beside it.

    Args:
        objective: what else is trained; it owns the model.
        expander: as of :class:`ProjectedVICReg`.
    """

    def __init__(self, objective: Any, expander: int) -> None:
        super().__init__()
        self.objective: Any = objective
        self.LOSSES: tuple[str, ...] = (*objective.LOSSES, *TERMS)
        self.vicreg = ProjectedVICReg(self.model, expander)

    @property
    def model(self) -> VLM:
        """The model that the objective owns."""
        model: VLM = self.objective.model
        return model

    def forward(self, batch: Batch, noise: Noise, active: Set[str], *cached: Any) -> Losses:
        """The objective's losses in ``active`` and VICReg's, each with its trivial value.

        ``cached`` is the objective's own; VICReg's terms are of one batch.
        """
        self.vicreg.begin()
        values, trivial = self.objective(batch, noise, active - set(TERMS), *cached)
        if not active.isdisjoint(TERMS):
            terms, guesses = self.vicreg(active)
            values, trivial = {**values, **terms}, {**trivial, **guesses}
        self.vicreg.begin()
        return values, trivial

    def after_step(self) -> None:
        """The objective's own; once an optimiser step."""
        self.objective.after_step()


def _expander(width: int, expanded: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inner in (width, expanded):
        layers += [nn.Linear(inner, expanded), nn.BatchNorm1d(expanded), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(expanded, expanded, bias=False))
