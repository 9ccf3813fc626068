"""Training objectives. Adding one takes one file and one line of :data:`OBJECTIVES`.

An objective is a module that owns the model: ``__init__(model, tokenizer, config)``, a frozen
``Config``, the names of its ``LOSSES``, ``forward(batch, noise, active)`` giving raw named scalars
and the trivial value of each, and ``after_step()``, called once an optimiser step. ``RECIPE`` is
the settings that make the method: its fusion, its losses and how it is fine-tuned. They are laid
over a preset where the method is asked for by name. ``MODEL`` is the kind of model that it trains,
where that is not any :class:`VLM`. Where ``CACHES_CONTRAST`` is true, ``forward`` also takes a
:class:`~vicvlm_cli.objectives.cached.CachedContrast`, and contrasts all batches of a step. Where
``MORE_CAPTIONS`` is true, it contrasts further captions that a batch has of its pictures.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from vicvlm_cli.config import from_dict, merge
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.single_stream import SingleStream
from vicvlm_cli.model.vlm import VLM, RetrievalModel
from vicvlm_cli.objectives.albef import ALBEF
from vicvlm_cli.objectives.beside import Beside
from vicvlm_cli.objectives.clip import CLIP
from vicvlm_cli.objectives.mamo import MAMO
from vicvlm_cli.objectives.maskvlm import MaskVLM
from vicvlm_cli.objectives.retrieval import Retrieval
from vicvlm_cli.objectives.s_smke import SSMKE
from vicvlm_cli.objectives.scan import SCAN
from vicvlm_cli.objectives.vicreg import TERMS, ProjectedVICReg
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.objectives.vilt import ViLT, ViLTRanking
from vicvlm_cli.objectives.vsepp import VSEPP
from vicvlm_cli.objectives.words import WordPrediction
from vicvlm_cli.settings import TrainConfig

OBJECTIVES: dict[str, Any] = {
    "vicvlm": VicVLM,
    "clip": CLIP,
    "vsepp": VSEPP,
    "mamo": MAMO,
    "maskvlm": MaskVLM,
    "albef": ALBEF,
    "s_smke": SSMKE,
    "scan": SCAN,
    "vilt": ViLT,
    "vilt_ranking": ViLTRanking,
    "retrieval": Retrieval,
}


def _find(name: str) -> Any:
    if name not in OBJECTIVES:
        raise UsageError(f"there is no objective {name!r}: there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def recipe_of(name: str) -> Mapping[str, Any]:
    """The configuration table of a method, to be laid over a preset's.

    Raises:
        UsageError: there is no objective of that name.
    """
    recipe: Mapping[str, Any] = _find(name).RECIPE
    return merge({"pretrain": {"objective": name}}, recipe)


def create_objective(
    model: RetrievalModel, tokenizer: Tokenizer, config: TrainConfig, more_captions: int = 0
) -> nn.Module:
    """The objective that ``config`` names, around ``model``.

    Args:
        more_captions: how many further captions of each picture batches will have.

    Raises:
        UsageError: an unknown objective or option, weights whose names are not its losses, or a
            model that it cannot train.
    """
    objective = _find(config.objective)
    if not isinstance(model, getattr(objective, "MODEL", VLM)):
        raise UsageError(
            f"{config.objective} cannot train a model of model.fusion={model.config.fusion}: leave "
            "model.fusion to the method, or fine-tune with the objective that the checkpoint has"
        )
    if config.caches_contrast and not getattr(objective, "CACHES_CONTRAST", False):
        raise UsageError(
            f"{config.objective} has no contrast of features that --contrastive-batch can take "
            "over several batches: leave it out, and raise --batch-size instead"
        )
    if more_captions and not getattr(objective, "MORE_CAPTIONS", False):
        raise UsageError(
            f"{config.objective} contrasts one caption of each picture: leave data.more_captions "
            "at 0, or choose another objective"
        )
    anywhere = (*TERMS, *WordPrediction.LOSSES)
    known = tuple(dict.fromkeys([*objective.LOSSES, *anywhere]))
    for name in config.losses:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UsageError(
                f"{config.objective} has no loss {name!r}: {hint}"
                f"its losses are {', '.join(objective.LOSSES)}, and on any objective of two "
                f"encoders {', '.join(anywhere)}"
            )
    beside = [n for n in anywhere if n in config.losses and config.losses[n].weight > 0]
    if beside and isinstance(model, SingleStream):
        # They would train the two projections that choose a shortlist, and nothing of the method.
        raise UsageError(
            "ViLT has no features of its own to spread or to tell words from: leave "
            f"{', '.join(beside)} out of the losses of {config.objective}"
        )
    if not any(loss.at(0.0, step=1) > 0 for loss in config.losses.values()):
        raise UsageError(
            f"no loss of {config.objective} is on in every step, so that in some nothing would be "
            "trained: give one a weight above 0, with start = 0, ramp = 0 and every = 1"
        )
    vicreg = any(name in TERMS and name not in objective.LOSSES for name in config.losses)
    options = dict(config.options)
    if "expander" in options and not vicreg:
        if set(TERMS) <= set(objective.LOSSES):
            raise UsageError(
                f"{config.objective} has VICReg's terms itself, without an expander: leave "
                "options.expander out"
            )
        raise UsageError(
            f"options.expander is of VICReg's terms beside {config.objective}'s own losses: give "
            f"{', '.join(TERMS)} weights in losses, or leave it out"
        )
    expander = options.pop("expander", 0) if vicreg else 0
    if not isinstance(expander, int) or isinstance(expander, bool) or expander < 0:
        raise UsageError(f"options.expander is {expander!r}, not a width: a whole number, or 0")
    made: nn.Module = objective(model, tokenizer, from_dict(objective.Config, options, "options"))
    if vicreg:
        made = Beside(made, ProjectedVICReg(model, expander))
    return Beside(made, WordPrediction(model, tokenizer)) if config.predicts_words else made
