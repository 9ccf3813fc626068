"""The worked example of docs/methods.md is a method like any other."""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_objectives as contract
import torch
from tiny import make_batch, make_model, make_tokenizer

from vicvlm_cli.config import load_config
from vicvlm_cli.objectives import OBJECTIVES, create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def barlow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2 and len(blocks[0].splitlines()) < 60
    monkeypatch.setitem(OBJECTIVES, "barlow", None)  # so that it is taken out again
    (tmp_path / "barlow.py").write_text(blocks[0], "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    exec(blocks[1], {"OBJECTIVES": OBJECTIVES, "Barlow": importlib.import_module("barlow").Barlow})
    sys.modules.pop("barlow")


def test_the_example_learns(barlow: None) -> None:
    config = TrainConfig(objective="barlow", losses={"barlow": LossConfig()})
    objective: Any = create_objective(make_model(fusion="none"), make_tokenizer(), config)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for step in range(30):
        losses, trivial = objective(make_batch(), Noise(0, step, torch.device("cpu")), {"barlow"})
        optimizer.zero_grad()
        losses["barlow"].backward()
        optimizer.step()
        objective.after_step()
        values.append(float(losses["barlow"].detach()))
    assert values[-1] < 0.5 * float(trivial["barlow"]) < values[0]


@pytest.mark.parametrize(
    "check",
    [
        contract.test_the_losses_are_those_named_and_finite,
        contract.test_every_trainable_parameter_gets_a_gradient,
        contract.test_a_tiny_batch_is_learned_by_heart,
        partial(contract.test_padding_changes_no_loss, more=5),
        contract.test_the_same_noise_gives_the_same_losses,
        contract.test_the_recipe_names_losses_that_there_are,
    ],
)
def test_the_example_keeps_the_contract(barlow: None, check: Any) -> None:
    check("barlow", {}, "none")


def test_the_example_goes_on_with_what_frozen_blocks_began(barlow: None) -> None:
    contract.test_a_step_goes_on_with_what_the_frozen_blocks_began("barlow", {})
    contract.test_validation_changes_no_state("barlow", {})


def test_its_recipe_lies_over_a_preset(barlow: None) -> None:
    config = load_config(
        "vicvlm-tiny", overrides=["pretrain.objective=barlow"], recipe_of=recipe_of
    )
    assert config.model.fusion == "none" and set(config.pretrain.losses) == {"barlow"}
    assert config.finetune.objective == "barlow"


def test_every_method_is_in_the_table() -> None:
    page = PAGE.read_text("utf-8")
    for name in OBJECTIVES.keys() - {"retrieval"}:
        assert f"| `{name}` |" in page, name
