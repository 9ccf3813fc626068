"""VICReg's terms beside any objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_same
from tiny import make_batch, make_model, make_tokenizer, teacher_weights

from vicvlm_cli.errors import UsageError
from vicvlm_cli.objectives import OBJECTIVES, create_objective, losses, recipe_of
from vicvlm_cli.objectives.beside import Beside
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.vicreg import TERMS, ProjectedVICReg
from vicvlm_cli.settings import LossConfig, TrainConfig
from vicvlm_cli.workflows.loop import parameter_groups

TEACHER = {"teacher": "test_vit", "teacher_weights": teacher_weights()}
NOISE = Noise(0, 0, torch.device("cpu"))
REFUSED = ("vilt", "vilt_ranking")


def make(name: str = "clip", **options: Any) -> Any:
    if name == "s_smke":
        options = {**TEACHER, **options}
    names = dict.fromkeys([*OBJECTIVES[name].LOSSES, *TERMS])
    config = TrainConfig(
        objective=name, options=options, losses={n: LossConfig() for n in names}, image_lr=1e-5
    )
    fusion = recipe_of(name).get("model", {}).get("fusion", "concat")
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config)


# VicVLM has the terms itself; ViLT has no features of its own, and refuses them.
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("vicvlm", *REFUSED)])
def test_the_terms_stand_beside_every_objective(name: str) -> None:
    objective = make(name).eval()
    assert isinstance(objective, Beside) and isinstance(objective.further, ProjectedVICReg)
    first = OBJECTIVES[name].LOSSES[0]
    assert tuple(objective.LOSSES) == (*OBJECTIVES[name].LOSSES, *TERMS)
    values, trivial = objective(make_batch(), NOISE, {first, *TERMS})
    assert set(values) == set(trivial) == {first, *TERMS}
    alone, _ = objective.objective(make_batch(), NOISE, {first})
    torch.testing.assert_close(values[first], alone[first])
    assert set(objective(make_batch(), NOISE, {first, "variance"})[0]) == {first, "variance"}
    assert set(objective(make_batch(), NOISE, {first})[0]) == {first}


# VicVLM's masked passes come after the clean one, and project other features.
@pytest.mark.parametrize(
    ("name", "options"),
    [("clip", {}), ("vicvlm", {"vicreg": "projections", "predictor_width": 32})],
)
def test_the_terms_are_those_of_the_projections_of_the_clean_pair(
    name: str, options: dict[str, Any]
) -> None:
    objective, batch = make(name, **options), make_batch()
    objective(make_batch(4, seed=1), NOISE, set(objective.LOSSES))  # another step's are forgotten
    model = objective.model
    tokens = model.image_encoder(model.normalize(batch.image))
    prefix = model.image_encoder.prefix
    a = model.image_projection(tokens[:, 0] + tokens[:, prefix:].mean(1))
    words = model.text_encoder(batch.input_ids, batch.attention_mask)
    real = batch.attention_mask.unsqueeze(-1)
    b = model.text_projection(words[:, 0] + (words * real).sum(1) / real.sum(1))
    values, trivial = objective(batch, NOISE, set(objective.LOSSES))
    assert set(values) == set(trivial) == set(objective.LOSSES)
    expected = (losses.variance(a) + losses.variance(b)) / 2
    torch.testing.assert_close(values["variance"], expected)
    expected = (losses.covariance(a) + losses.covariance(b)) / 2
    torch.testing.assert_close(values["covariance"], expected)
    torch.testing.assert_close(values["invariance"], losses.invariance(a, b))


def test_where_patches_and_words_are_projected_the_terms_are_those_of_their_means() -> None:
    objective, batch = make("scan"), make_batch()
    model = objective.model
    patches = model.image_encoder(model.normalize(batch.image))[:, model.image_encoder.prefix :]
    a = torch.stack([model.image_projection(x).mean(0) for x in patches])
    words, mask = model.text_encoder(batch.input_ids, batch.attention_mask), batch.attention_mask
    b = [model.text_projection(x[real]).mean(0) for x, real in zip(words, mask, strict=True)]
    b = torch.stack(b)
    values, _ = objective(batch, NOISE, {"hinge", *TERMS})
    means = {name: getattr(losses, name) for name in ("variance", "covariance")}
    for name, term in means.items():
        assert_same(values[name], (term(a) + term(b)) / 2, objective)
    assert_same(values["invariance"], losses.invariance(a, b), objective)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("beside", [TERMS, ("variance",), ("words",)])
def test_a_single_stream_has_nothing_to_spread(name: str, beside: tuple[str, ...]) -> None:
    def build(weight: float) -> Any:
        weights = {**{n: LossConfig() for n in OBJECTIVES[name].LOSSES}}
        weights |= {n: LossConfig(weight) for n in beside}
        config = TrainConfig(objective=name, losses=weights)
        return create_objective(make_model(fusion="single_stream"), make_tokenizer(), config)

    with pytest.raises(UsageError) as caught:
        build(0.1)
    assert str(caught.value) == (
        "ViLT has no features of its own to spread or to tell words from: leave "
        f"{', '.join(beside)} out of the losses of {name}"
    )
    build(0.0)  # what is off is no matter


def test_the_expander_is_trained_and_no_part_of_the_model() -> None:
    objective = make(expander=24).train()
    assert sum(p.numel() for p in objective.further.expander.parameters()) == (
        16 * 24 + 24 + 24 * 24 + 24 + 4 * 24 + 24 * 24
    )
    values, _ = objective(make_batch(), NOISE, {"itc", *TERMS})
    torch.stack(list(values.values())).sum().backward()
    for key, parameter in objective.named_parameters():
        assert parameter.grad is not None, key
    assert not any("expander" in key for key in objective.model.state_dict())
    assert not [p for p in make().further.expander.parameters()]


def test_the_image_encoder_keeps_its_own_rate() -> None:
    objective = make()
    config = TrainConfig(lr=1.0, image_lr=0.5)
    rates = {id(p): g["lr"] for g in parameter_groups(objective, config) for p in g["params"]}
    for parameter in objective.model.image_encoder.parameters():
        assert rates[id(parameter)] == 0.5
    assert rates[id(objective.model.text_projection.weight)] == 1.0


def test_vicvlm_has_them_on_its_fused_features() -> None:
    assert not isinstance(make("vicvlm", predictor_width=32), Beside)
    with pytest.raises(UsageError, match="vicvlm has VICReg's terms itself, without an expander"):
        make("vicvlm", vicreg="projections", expander=8)
    with pytest.raises(UsageError, match="options.vicreg is 'fused', not multimodal or projection"):
        make("vicvlm", vicreg="fused")


def test_vicvlm_needs_no_further_pass_for_them_on_the_projections() -> None:
    objective = make("vicvlm", vicreg="projections")
    passes: list[int] = []
    objective.model.fusion.register_forward_hook(lambda *_: passes.append(1))
    values, _ = objective(make_batch(), NOISE, {"itc", *TERMS})
    assert not passes and set(values) == {"itc", *TERMS}


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"options\.expander is 'wide', not a width"):
        make(expander="wide")
    with pytest.raises(UsageError, match="VICReg needs two pairs or more a step"):
        make()(make_batch(1), NOISE, {"itc", "variance"})
    with pytest.raises(UsageError, match="VICReg needs two pairs or more a step"):
        make(expander=24).train()(make_batch(1), NOISE, {"itc", "variance"})
    plain = TrainConfig(objective="clip", losses={"itc": LossConfig()}, options={"expander": 8})
    with pytest.raises(UsageError, match="options.expander is of VICReg's terms beside clip's"):
        create_objective(make_model(fusion="none"), make_tokenizer(), plain)
    with pytest.raises(UsageError, match="VICReg needs two pairs or more a step"):
        make("vicvlm", predictor_width=32, masked_stride=6)(make_batch(), NOISE, {"variance"})
