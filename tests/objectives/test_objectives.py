"""The contract of every objective, over every fusion and target."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import make_batch, make_model, make_tokenizer, pad, teacher_weights

from vicvlm_cli.config import load_config
from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import OBJECTIVES, create_objective, recipe_of
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.vicreg import TERMS
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("vicvlm", {"target": "byol", "predictor_width": 32}),
    ("vicvlm", {"target": "pixel", "predictor_width": 32}),
    ("vicvlm", {"target": "byol", "predictor_width": 32, "masked_stride": 2, "itm_negatives": 2}),
    ("vicvlm", {"target": "byol", "predictor_width": 32, "drop_hidden": False}),
    ("vicvlm", {"target": "pixel", "predictor_width": 32, "vicreg": "projections"}),
    ("clip", {"loss": "softmax"}),
    ("clip", {"loss": "sigmoid"}),
    ("vsepp", {"mean_steps": 0}),
    ("vsepp", {"mean_steps": 1000}),
    ("mamo", {"variant": "paper"}),
    ("mamo", {"variant": "seed"}),
    ("maskvlm", {"decoder_depth": 1}),
    ("albef", {"queue_size": 7, "queue_steps": 0, "ema_decay": 0.9}),
    ("albef", {"queue_size": 7, "queue_steps": 0, "ema_decay": 0.9, "alpha_steps": 0}),
    ("s_smke", {"teacher": "test_vit", "teacher_weights": teacher_weights(), "bank_size": 8}),
    ("scan", {"mean_steps": 0}),
    ("scan", {"mean_steps": 1000}),
    ("vilt", {}),
    ("vilt_ranking", {"negatives": 2}),
    ("retrieval", {}),
]
# A loss that is learned ends at half of its trivial value or below. VICReg's terms hold each other
# back, since rows at one point have no covariance: all three must be low at once. Four rows differ
# in three directions: at unit variance (D / 3 - 1) / (D - 1) of the covariance of copies is left.
LEARNED = {"variance": 0.3, "covariance": 0.35, "invariance": 0.1}
# Of masks or of negatives that are drawn: another value with other noise.
DRAWN = {"itm", "mlm", "mim", "joint_mim", "mrm", "wpa", "ranking", *TERMS}


def fusions(name: str) -> list[str]:
    """The method's own fusion, or all if it leaves the choice."""
    own = recipe_of(name).get("model", {}).get("fusion")
    return [own] if own else list(FUSIONS)


EVERY = pytest.mark.parametrize(
    ("name", "options", "fusion"),
    [(name, options, fusion) for name, options in CASES for fusion in fusions(name)],
    ids=lambda v: (
        "-".join(str(x) for x in v.values() if "/" not in str(x)) if isinstance(v, dict) else v
    ),
)


def make(
    name: str, options: dict[str, Any], fusion: str | None = None, model: VLM | None = None
) -> Any:
    fusion = fusion or fusions(name)[0]
    weights = {loss: LossConfig() for loss in OBJECTIVES[name].LOSSES}
    config = TrainConfig(objective=name, options=options, losses=weights)
    return create_objective(model or make_model(fusion=fusion), make_tokenizer(), config).train()


def test_every_objective_is_tried() -> None:
    assert {name for name, _ in CASES} == set(OBJECTIVES)


@EVERY
def test_the_losses_are_those_named_and_finite(
    name: str, options: dict[str, Any], fusion: str
) -> None:
    objective = make(name, options, fusion)
    everything = set(objective.LOSSES)
    values, trivial = objective(make_batch(), Noise(0, 0, CPU), everything)
    assert set(values) == set(trivial) == everything
    for loss in everything:
        assert values[loss].shape == trivial[loss].shape == ()
        assert bool(values[loss].isfinite()) and bool(trivial[loss].isfinite())
        assert values[loss].requires_grad and not trivial[loss].requires_grad
        assert float(trivial[loss]) > 0
    for loss in everything:  # one alone: that one, and the first whose similarities all share
        alone, guesses = objective(make_batch(), Noise(0, 0, CPU), {loss})
        assert set(alone) == set(guesses) == {objective.LOSSES[0], loss}


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "vilt" not in case[0]])
def test_a_step_goes_on_with_what_the_frozen_blocks_began(
    name: str, options: dict[str, Any]
) -> None:
    size = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = make_model(fusion=fusions(name)[0], image_options=size)
    model.image_encoder.freeze(1)
    first, batch = make(name, options, model=model), make_batch()
    second, active = copy.deepcopy(first), set(first.LOSSES)
    expected, guesses = first(batch, Noise(0, 0, CPU), active)
    batch.begun = model.image_encoder.begin(model.normalize(batch.image))
    values, trivial = second(batch, Noise(0, 0, CPU), active)
    for loss in active:
        torch.testing.assert_close(values[loss], expected[loss])
        torch.testing.assert_close(trivial[loss], guesses[loss])
    batch.begun = batch.begun.flip(0)  # it is not begun all over
    values, _ = second(batch, Noise(0, 0, CPU), active)
    loss = first.LOSSES[0]
    assert abs(float(values[loss].detach() - expected[loss].detach())) > 1e-5


@EVERY
def test_every_trainable_parameter_gets_a_gradient(
    name: str, options: dict[str, Any], fusion: str
) -> None:
    objective = make(name, options, fusion)
    values, _ = objective(make_batch(), Noise(0, 0, CPU), set(objective.LOSSES))
    torch.stack(list(values.values())).sum().backward()
    for key, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert bool(parameter.grad.isfinite().all()), key
            # The key's bias of an attention cancels in its softmax; all else must count.
            if not key.endswith("key.bias"):
                assert bool(parameter.grad.any()), key
        else:
            assert parameter.grad is None, key


@EVERY
def test_a_tiny_batch_is_learned_by_heart(name: str, options: dict[str, Any], fusion: str) -> None:
    """Every loss of it, all together, with the same masks and negatives in every step."""
    # Four masked rows too: two differ in one direction, of which all dimensions are copies.
    objective, batch = make(name, options, fusion), make_batch(4 * options.get("masked_stride", 1))
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    # ViLT's shortlist learns from features that it cannot move.
    most = {**LEARNED, "itc": 0.7} if name == "vilt" else LEARNED
    for _ in range(400):  # most need 10 to 70; MaskVLM, whose pixels are noise, 190
        values, trivial = objective(batch, Noise(0, 0, CPU), set(objective.LOSSES))
        shares = {k: float(v.detach() / trivial[k]) for k, v in values.items()}
        left = {k: share for k, share in shares.items() if share > most.get(k, 0.5)}
        if not left:
            break
        # The covariance of wide features is many times the size of the others.
        total = sum(v * (0.01 if k == "covariance" else 1) for k, v in values.items())
        assert isinstance(total, torch.Tensor)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        objective.after_step()
    assert not left


@EVERY
@pytest.mark.parametrize("more", [0, 5])
def test_padding_changes_no_loss(
    name: str, options: dict[str, Any], fusion: str, more: int
) -> None:
    objective, batch = make(name, options, fusion).eval(), make_batch()
    everything = set(objective.LOSSES)
    before, trivial = objective(batch, Noise(0, 0, CPU), everything)
    after, guesses = objective(pad(batch, more), Noise(0, 0, CPU), everything)
    for loss in everything:
        torch.testing.assert_close(after[loss], before[loss], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(guesses[loss], trivial[loss], rtol=1e-3, atol=1e-5)


@EVERY
def test_the_same_noise_gives_the_same_losses(
    name: str, options: dict[str, Any], fusion: str
) -> None:
    objective = make(name, options, fusion)
    everything = set(objective.LOSSES)
    runs = [objective(make_batch(), Noise(0, step, CPU), everything)[0] for step in (1, 1, 2)]
    assert all(float(runs[0][k].detach()) == float(runs[1][k].detach()) for k in everything)
    still = set(TERMS) if options.get("vicreg") == "projections" else set()
    drawn = (everything & DRAWN) - still
    assert all(float(runs[0][k].detach()) != float(runs[2][k].detach()) for k in drawn)


def test_the_temperature_is_bounded_after_a_step() -> None:
    for name, options in CASES:
        objective = make(name, options)
        if not objective.model.logit_scale.requires_grad:
            continue
        with torch.no_grad():
            objective.model.logit_scale.fill_(9.0)
        objective.after_step()
        assert float(objective.model.logit_scale.exp()) == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_validation_changes_no_state(name: str, options: dict[str, Any]) -> None:
    objective = make(name, options).eval()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    with torch.no_grad():
        objective(make_batch(), Noise(0, 0, CPU), set(objective.LOSSES))
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
    # Nor does it leave rows behind that the next step pushes to a queue. What counts steps may.
    objective.train().after_step()
    for key, value in objective.state_dict().items():
        if value.is_floating_point() or "queue" in key or "bank" in key:
            assert torch.equal(value, before[key]), key


@EVERY
def test_the_recipe_names_losses_that_there_are(
    name: str, options: dict[str, Any], fusion: str
) -> None:
    config = load_config(
        "vicvlm-tiny", overrides=[f"pretrain.objective={name}"], recipe_of=recipe_of
    )
    assert config.pretrain.objective == name
    tuned = config.finetune
    for stage in (config.pretrain, tuned):
        assert stage.losses.keys() == set(OBJECTIVES[stage.objective].LOSSES)
        model = make_model(fusion=config.model.fusion)
        if stage.objective == "s_smke":  # has no teacher of its own
            stage = replace(stage, options=options)
        assert create_objective(model, make_tokenizer(), stage).model is model
    # All else is the preset's: another word, the same encoders, data and schedule.
    plain = load_config("vicvlm-tiny")
    assert config.data == plain.data
    layers = 6 if name == "s_smke" else 0
    assert config.model == replace(plain.model, fusion=config.model.fusion, image_layers=layers)
    assert replace(config.pretrain, objective="", losses={}, options={}) == replace(
        plain.pretrain, objective="", losses={}, options={}
    )
    if tuned.objective == plain.finetune.objective:  # as often and as much
        itm = plain.finetune.losses["itm"]
        assert itm.weight == 0 and itm.every > 1  # VicVLM does without it, the others do not
        other = {} if name == "vicvlm" else {"itm": replace(itm, weight=1.0)}
        assert tuned.losses == {**plain.finetune.losses, **other}
