"""Configuration: strict keys, types and choices, and which source wins."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from vicvlm_cli.config import from_dict, load_config, merge, parse_override, preset_names, to_dict
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.create import create_model
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.settings import Config, LossConfig, ModelConfig, TrainConfig


def refusal(*overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_an_unknown_key_is_refused_with_the_closest_name() -> None:
    assert "'pretrain.batchsize' is not a setting, did you mean 'batch_size'?" in refusal(
        "pretrain.batchsize=3"
    )


def test_a_key_like_no_other_is_refused_with_all_names() -> None:
    message = refusal("zzz=1")
    assert "'zzz' is not a setting (known: model, data, pretrain, finetune)" in message


def test_all_mistakes_are_named_together() -> None:
    message = refusal("pretrain.lrr=1", "model.image_size=big", "finetune.select=worst")
    for part in ("did you mean 'lr'", "model.image_size is 'big'", "finetune.select is 'worst'"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.batch_size=1.5", "pretrain.batch_size is 1.5, not a whole number"),
        ("pretrain.batch_size=true", "pretrain.batch_size is True, not a whole number"),
        ("pretrain.lr=fast", "pretrain.lr is 'fast', not a number"),
        ("pretrain.lr=true", "pretrain.lr is True, not a number"),
        ("data.flip=1", "data.flip is 1, not true or false"),
        ("model.image_encoder=3", "model.image_encoder is 3, not text"),
        ("model.image_mean=0.5", "model.image_mean is 0.5, not a list"),
        ("model.image_mean=[0.5, 'x']", "model.image_mean is 'x', not a number"),
        ("model=small", "model is 'small', not a table"),
        ("pretrain.losses=[1]", "pretrain.losses is [1], not a table"),
        ("pretrain.losses.itc=1", "pretrain.losses.itc is 1, not a table"),
        ("pretrain.losses.itc.wait=1", "'pretrain.losses.itc.wait' is not a setting"),
        ("model.fusion=add", "model.fusion is 'add', not one of concat, cross_attention"),
        ("data.captions=some", "data.captions is 'some', not one of all, one"),
        ("pretrain.precision=fp8", "pretrain.precision is 'fp8', not one of auto, no"),
        ("pretrain.batch_size=0", "pretrain.batch_size is 0, and must be above 0"),
        ("finetune.lr=-1", "finetune.lr is -1, and must be above 0"),
        ("pretrain.contrastive_batch=-8", "contrastive_batch is -8, and must not be below 0"),
        ("model.image_layers=-1", "model.image_layers is -1, and must not be below 0"),
        ("data.word_dropout=20", "data.word_dropout is 20, and must be below 1"),
        ("pretrain.seed=-1", "pretrain.seed is -1, and must not be below 0"),
        ("pretrain.losses.itc={weight=-1}", "itc.weight is -1, and must not be below 0"),
        ("pretrain.losses.itc={every=0}", "itc.every is 0, and must be above 0"),
        ("data.crop_scale=0", "data.crop_scale is 0, and must be above 0"),
        ("model.temperature=0", "model.temperature is 0, and must be above 0"),
    ],
)
def test_wrong_values_are_refused(override: str, words: str) -> None:
    assert words in refusal(override)


def test_batches_of_a_step() -> None:
    assert TrainConfig(accumulate=3).step_batches == 3
    wide = TrainConfig(batch_size=16, contrastive_batch=64)
    assert wide.step_batches == 4 and wide.caches_contrast
    alone = TrainConfig(batch_size=16, contrastive_batch=16)
    more = TrainConfig(batch_size=16, contrastive_batch=16, accumulate=4)
    assert more.step_batches == 4 and not more.caches_contrast
    assert alone.step_batches == 1 and not alone.caches_contrast
    assert not TrainConfig(accumulate=2).caches_contrast
    for settings, words in (
        (
            {"contrastive_batch": 100},
            "100, not a multiple of --batch-size, which is 16: give 96",
        ),
        ({"contrastive_batch": 4}, "is 4, not a multiple of --batch-size, which is 16: give 16"),
        ({"contrastive_batch": 32, "accumulate": 2}, "leave accumulate at 1, not 2"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            _ = TrainConfig(batch_size=16, **settings).step_batches
        assert caught.value.exit_code == 2


def test_values_arrive_with_their_types() -> None:
    config = load_config(
        overrides=[
            "pretrain.lr=1",
            "pretrain.batch_size=7",
            "model.image_mean=[0.1, 0, 1]",
            "model.image_options.depth=2",
            "data.flip=false",
            "pretrain.losses.itc={weight = 2}",
            "pretrain.objective=retrieval",
            "model.text_encoder=./some/bert base",
            "model.image_weights=",
        ]
    )
    assert config.pretrain.lr == 1.0 and isinstance(config.pretrain.lr, float)
    assert config.pretrain.batch_size == 7
    assert config.model.image_mean == (0.1, 0.0, 1.0)
    assert config.model.image_options == {"depth": 2}
    assert config.data.flip is False
    assert config.pretrain.losses == {"itc": LossConfig(2.0)}
    assert config.pretrain.objective == "retrieval"
    assert config.model.text_encoder == "./some/bert base"
    assert config.model.image_weights == ""


@pytest.mark.parametrize("text", ["pretrain.lr", "=3", " = 3", ""])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        parse_override(text)


def test_an_override_may_hold_an_equals_sign() -> None:
    assert parse_override("model.text_encoder=a=b") == {"model": {"text_encoder": "a=b"}}


def test_presets_yield_to_files_and_files_to_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[pretrain]\nlr = 3e-3\nbatch_size = 5\n[pretrain.losses.mim]\nweight = 9\n")
    base = {"pretrain": {"lr": 1.0, "seed": 8, "epochs": 1.0}}
    preset = load_config("vicvlm-tiny")
    config = load_config("vicvlm-tiny", file, ["pretrain.batch_size=6"], base=base)
    assert config.pretrain.seed == 8  # only in the base
    assert config.pretrain.epochs == preset.pretrain.epochs != 1.0  # preset over base
    assert config.pretrain.lr == 3e-3 != preset.pretrain.lr  # file over preset
    assert config.pretrain.batch_size == 6  # override over file
    expected = {
        **preset.pretrain.losses,
        "mim": replace(preset.pretrain.losses["mim"], weight=9.0),
    }
    assert config.pretrain.losses == expected  # tables merge leaf by leaf


def test_merging_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 5}, "d": [2]}
    assert merge(base, over) == {"a": {"b": 5, "c": 2}, "d": [2]}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


def test_a_file_that_is_missing_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "none.toml"))):
        load_config(file=tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot read the configuration"):
        load_config(file=tmp_path)
    (tmp_path / "bad.toml").write_text("lr: 3\n")
    with pytest.raises(UsageError, match="bad.toml is not TOML"):
        load_config(file=tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="binary.toml is not TOML"):
        load_config(file=tmp_path / "binary.toml")


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="did you mean 'vicvlm-tiny'") as caught:
        load_config("vicvlm-tinny")
    assert all(name in str(caught.value) for name in preset_names())


def test_plain_data_and_back_is_the_same_configuration() -> None:
    config = load_config("vicvlm-tiny", overrides=["model.image_mean=[0.1, 0.2, 0.3]"])
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


def test_the_default_presets_are_there() -> None:
    assert {"vicvlm-tiny", "vicvlm-small-flickr30k"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_makes_a_model_and_both_objectives(name: str) -> None:
    config = load_config(name)
    # From scratch and narrow: the weights and the width are the preset's, but not what can break.
    shape = {**config.model.image_options, "embed_dim": 24, "num_heads": 2, "depth": 1}
    small = replace(
        config.model,
        text_encoder="",
        image_weights="",
        image_options=shape,
        text_width=32,
        text_heads=2,
        text_layers=1,
        fusion_layers=1,
    )
    tokenizer = make_tokenizer()
    for train in (config.pretrain, config.finetune):
        objective: Any = create_objective(
            create_model(small, tokenizer.vocab_size), tokenizer, train
        )
        assert set(train.losses) <= set(objective.LOSSES)
        assert train.losses["itc"].at(0.0) > 0
        assert 0 < train.warmup < 1
    assert set(config.pretrain.losses) == set(objective_losses(config.pretrain.objective))
    assert config.finetune.objective == "retrieval"
    # Its own shapes: what timm and BERT would refuse only when the model is made.
    assert config.model.text_width % config.model.text_heads == 0
    assert ModelConfig(**to_dict(config.model)) == config.model


def objective_losses(name: str) -> tuple[str, ...]:
    from vicvlm_cli.objectives import OBJECTIVES

    losses: tuple[str, ...] = OBJECTIVES[name].LOSSES
    return losses


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LossConfig(), [1, 1, 1, 1, 1]),
        (LossConfig(2.0, start=0.5), [0, 0, 2, 2, 2]),
        (LossConfig(2.0, start=0.25, ramp=0.5), [0, 0, 1, 2, 2]),
        (LossConfig(4.0, ramp=1.0), [0, 1, 2, 3, 4]),
        (LossConfig(0.0, start=0.25, ramp=0.5), [0, 0, 0, 0, 0]),
    ],
)
def test_a_loss_comes_in_on_schedule(loss: LossConfig, expected: list[float]) -> None:
    assert [loss.at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == expected


def test_a_loss_may_come_in_some_of_the_steps_only() -> None:
    loss = LossConfig(2.0, start=0.5, every=3)
    assert [loss.at(0.6, step) for step in range(7)] == [2, 0, 0, 2, 0, 0, 2]
    assert [loss.at(0.4, step) for step in range(7)] == [0] * 7
