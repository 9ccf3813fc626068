"""VICReg beside any objective: its three terms on the two projections, by weight."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.beside import FirstProjections
from vicvlm_cli.objectives.ranks import gather
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

    They may go through an expander first (arXiv 2105.04906, sec. 3.2).

    Args:
        model: whose projections; it is the objective's, not this module's.
        expander: width of the expander's layers; 0: no expander.
    """

    LOSSES = TERMS

    def __init__(self, model: RetrievalModel, expander: int = 0) -> None:
        super().__init__()
        width = model.config.projection_dim
        self.expander = _expander(width, expander) if expander else nn.Identity()
        self.projections = FirstProjections(model)

    def forward(self, active: Set[str], batch: Batch) -> Losses:
        """The terms in ``active`` with their trivial values.

        Raises:
            UsageError: there is but one pair.
        """
        # Gathered first: the expander's batch norm is that of the global batch.
        gathered = [gather(x) for x in self.projections.of(batch)]
        _require_pairs(len(gathered[0]))
        a, b = (self.expander(x).float() for x in gathered)
        return vicreg_terms([a, b], [(a, b)], active)


def _expander(width: int, expanded: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inner in (width, expanded):
        layers += [nn.Linear(inner, expanded), nn.BatchNorm1d(expanded), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(expanded, expanded, bias=False))
