"""What a method brings over a preset, and what cannot be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_objectives import make
from tiny import make_model, make_tokenizer

from vicvlm_cli.config import load_config
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.create import create_model
from vicvlm_cli.objectives import OBJECTIVES, create_objective, recipe_of
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.settings import LossConfig, TrainConfig
from vicvlm_cli.workflows.views import check_views


def refusal(**settings: Any) -> str:
    config = {"losses": {"itc": LossConfig()}, **settings}
    with pytest.raises(UsageError) as caught:
        create_objective(make_model(), make_tokenizer(), TrainConfig(**config))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "vicvml"}, "no objective 'vicvml': there are vicvlm, clip, "),
        ({"losses": {"joint_mm": LossConfig()}}, "no loss 'joint_mm': did you mean 'joint_mim'?"),
        ({"losses": {"qq": LossConfig()}}, "its losses are itc, itm, mim"),
        ({"objective": "retrieval", "losses": {"mlm": LossConfig()}}, "retrieval has no loss"),
        ({"losses": {}}, "nothing would be trained"),
        ({"losses": {"itc": LossConfig(0.0)}}, "nothing would be trained"),
        ({"losses": {"itc": LossConfig(1.0, start=0.1)}}, "nothing would be trained"),
        ({"losses": {"itc": LossConfig(1.0, ramp=0.1)}}, "nothing would be trained"),
        ({"losses": {"itc": LossConfig(1.0, every=2)}}, "nothing would be trained"),
        ({"objective": "clip", "options": {"loss": "l2"}}, "--loss is 'l2', not softmax or"),
        ({"options": {"targets": "byol"}}, "did you mean 'target'?"),
        ({"options": {"target": "dino"}}, "--target is 'dino', not byol or pixel"),
        ({"options": {"image_mask": 1.0}}, "options.image_mask must be between 0 and 1"),
        ({"options": {"text_mask": 0.0}}, "options.text_mask must be between 0 and 1"),
        ({"options": {"ema_decay": 1.5}}, "options.ema_decay must be from 0 to 1"),
        ({"options": {"predictor_width": 100}}, "options.predictor_width must be a multiple of 32"),
        ({"options": {"mask_block": 3}}, "options.mask_block=3 does not tile"),
        ({"options": {"masked_stride": 0}}, "options.masked_stride is 0, and must be above 0"),
        ({"options": {"itm_negatives": 0}}, "options.itm_negatives is 0, and must be above 0"),
        ({"options": {"image_mask": "much"}}, "options.image_mask is 'much', not a number"),
        (
            {"objective": "retrieval", "options": {"target": "byol"}},
            "'options.target' is not a setting (known: itm_negatives)",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, Any], words: str) -> None:
    assert words in refusal(**settings)


def test_another_fine_tuning_does_not_take_the_losses_of_the_presets() -> None:
    asked = ["pretrain.objective=mamo", "finetune.objective=albef"]
    config = load_config("vicvlm-tiny", overrides=asked, recipe_of=recipe_of)
    assert config.finetune.losses["itm"].every == 1
    with pytest.raises(UsageError, match="finetune is 3, not a table"):
        load_config("vicvlm-tiny", overrides=[asked[0], "finetune=3"], recipe_of=recipe_of)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_method_fits_the_preset_for_photographs(name: str) -> None:
    wanted = [f"pretrain.objective={name}", "model.image_weights=''"]
    whole = load_config("vicvlm-tiny-photos", overrides=wanted, recipe_of=recipe_of)
    config = whole.model
    model = create_model(config, 100)
    assert model.eval_image_size == (160 if config.fusion == "concat" else 192)
    check_views(model, whole.pretrain)
    model.image_encoder.freeze(whole.pretrain.frozen_blocks)


def test_without_a_preset_the_method_brings_its_losses(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    for text, name in [
        ("", "vicvlm"),
        ("objective = 'vicvlm'", "vicvlm"),
        ("objective = 'mamo'", "mamo"),
    ]:
        file.write_text(f"[pretrain]\n{text}\nlosses.itm.weight = 0.25\n", "utf-8")
        config = load_config(file=file, recipe_of=recipe_of)
        assert set(config.pretrain.losses) == set(OBJECTIVES[name].LOSSES)
        assert config.pretrain.losses["itm"].weight == 0.25


def test_a_dual_encoder_alone_cannot_match() -> None:
    for name in ("vicvlm", "retrieval"):
        with pytest.raises(UsageError, match=f"{name} matches pairs in a fusion encoder"):
            make(name, {}, "none")


def test_a_model_of_another_kind_is_refused() -> None:
    for name, fusion in (("scan", "none"), ("vilt", "concat"), ("clip", "single_stream")):
        words = f"{name} cannot train a model of model.fusion={fusion}"
        with pytest.raises(UsageError, match=words):
            make(name, {}, fusion)


def test_the_options_arrive() -> None:
    objective = make("vicvlm", {"text_mask": 0.5, "ema_decay": 0.9})
    assert isinstance(objective, VicVLM)
    assert objective.config == VicVLM.Config(text_mask=0.5, ema_decay=0.9)
