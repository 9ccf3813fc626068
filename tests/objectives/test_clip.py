"""The sigmoid's bias in fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_batch, make_model, make_tokenizer

from vicvlm_cli.config import load_config
from vicvlm_cli.objectives import create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import TrainConfig

CPU = torch.device("cpu")


def make(config: TrainConfig) -> Any:
    return create_objective(make_model(fusion="none"), make_tokenizer(), config).train()


def stages(*settings: str) -> tuple[Any, Any]:
    asked = ["pretrain.objective=clip", "pretrain.options.loss=sigmoid", *settings]
    config = load_config("vicvlm-tiny", overrides=asked, recipe_of=recipe_of)
    return make(config.pretrain), make(config.finetune)


def test_fine_tuning_starts_where_the_features_are() -> None:
    pretrained, tuned = stages()
    with torch.no_grad():
        losses = [
            float(x(make_batch(), Noise(0, 0, CPU), {"itc"})[0]["itc"]) for x in (pretrained, tuned)
        ]
        assert float(pretrained.bias) == -10
        start = float(tuned.bias)
        for by in (-0.3, 0.3):  # no other bias is better for this batch
            tuned.bias.fill_(start + by)
            losses.append(float(tuned(make_batch(), Noise(0, 0, CPU), {"itc"})[0]["itc"]))
    assert losses[1] == min(losses) < losses[0]


def test_it_is_fitted_once_and_not_again_where_a_run_goes_on() -> None:
    _, first = stages()
    first(make_batch(), Noise(0, 0, CPU), {"itc"})
    with torch.no_grad():
        first.bias.fill_(3.0)  # where training took it
    _, second = stages()
    second.load_state_dict(first.state_dict())
    for objective in (first, second):
        objective(make_batch(), Noise(0, 0, CPU), {"itc"})
        assert float(objective.bias.detach()) == 3


def test_validation_does_not_fit_it() -> None:
    _, tuned = stages()
    with torch.no_grad():
        tuned.eval()(make_batch(), Noise(0, 0, CPU), {"itc"})
    assert float(tuned.bias.detach()) == -10 and not bool(tuned.fitted)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_fine_tuning_has_the_loss_of_pretraining(loss: str) -> None:
    pretrained, tuned = stages(f"pretrain.options.loss={loss}")
    assert (pretrained.bias is None) == (tuned.bias is None) == (loss == "softmax")
    _, other = stages("finetune.options.loss=softmax")
    assert other.bias is None
