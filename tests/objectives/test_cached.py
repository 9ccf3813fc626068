"""Batches one by one, by cached gradients, train as one large batch does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import make_batch, make_model, make_tokenizer, teacher_weights
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError
from vicvlm_cli.objectives import OBJECTIVES, create_objective, recipe_of
from vicvlm_cli.objectives.alignment import info_nce
from vicvlm_cli.objectives.cached import CachedContrast
from vicvlm_cli.objectives.ranks import Noise, seed_modules
from vicvlm_cli.objectives.vicreg import TERMS
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
ROWS = 4  # of a batch
CASES: list[tuple[str, dict[str, Any]]] = [
    ("clip", {"loss": "softmax"}),
    ("clip", {"loss": "sigmoid"}),
    ("clip", {"expander": 12}),
    ("vsepp", {"mean_steps": 0}),
    ("vsepp", {"mean_steps": 1000}),
    ("retrieval", {}),
    ("vicvlm", {"target": "byol", "predictor_width": 32}),
    ("mamo", {}),
    ("maskvlm", {"decoder_depth": 1}),
    ("albef", {"queue_size": 9, "queue_steps": 0, "alpha_steps": 0}),
    ("s_smke", {"teacher": "test_vit", "teacher_weights": teacher_weights(), "bank_size": 8}),
    ("vilt", {}),
    ("vilt_ranking", {"negatives": 1}),
]
EVERY = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
Found = tuple[dict[str, Tensor], dict[str, Tensor]]


def make(name: str, options: dict[str, Any], **changes: Any) -> Any:
    fusion = recipe_of(name).get("model", {}).get("fusion", "concat")
    names = (*OBJECTIVES[name].LOSSES, *(TERMS if "expander" in options else ()))
    config = TrainConfig(
        objective=name, options=options, losses={loss: LossConfig() for loss in names}
    )
    model = make_model(fusion=fusion, **changes)
    objective: Any = create_objective(model, make_tokenizer(), config).train()
    with torch.no_grad():  # so that queues hold something
        objective(make_batch(5, seed=3), Noise(0, 9, CPU), set())
    objective.after_step()
    return objective


def large_batch(more: bool = False) -> Batch:
    """Three batches' rows; a picture has captions in two of them."""
    batch = make_batch(3 * ROWS)
    batch.image_id[9] = batch.image_id[1]
    batch.image[9] = batch.image[1]
    if more:
        batch.more_ids = batch.input_ids.flip(0)[:, None]  # a further caption each
        batch.more_mask = batch.attention_mask.flip(0)[:, None]
    return batch


def parts(batch: Batch) -> list[Batch]:
    """Its rows in batches of their own, each cut to its longest caption."""
    found = []
    for first in range(0, len(batch.image_id), ROWS):
        part = batch.rows(slice(first, first + ROWS))
        longest = int(part.attention_mask.sum(1).max())
        part.input_ids = part.input_ids[:, :longest]
        part.attention_mask = part.attention_mask[:, :longest]
        found.append(part)
    return found


def trained(objective: Any) -> dict[str, Tensor]:
    return {k: p for k, p in objective.named_parameters() if p.requires_grad}


def gradients(objective: Any, loss: Tensor) -> dict[str, Tensor]:
    names = trained(objective)
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {
        k: torch.zeros_like(p) if g is None else g
        for (k, p), g in zip(names.items(), found, strict=True)
    }


def by_cache(objective: Any, batches: Sequence[Batch], active: set[str], seed: int = 0) -> Found:
    """The mean losses of a step, and the gradient of their sum."""
    cached = CachedContrast(len(batches), list(trained(objective).values()))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            seed_modules(seed, number)
            objective(batch, Noise(0, number, CPU), set(), cached)
    values: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        seed_modules(seed, number)
        found, _ = objective(batch, Noise(0, number, CPU), active, cached)
        mean = {k: v / len(batches) for k, v in found.items()}
        for k, v in mean.items():
            values[k] = values.get(k, torch.zeros(())) + v.detach()
        for k, g in gradients(objective, torch.stack(list(mean.values())).sum()).items():
            total[k] = total.get(k, torch.zeros(())) + g
    return values, total


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            got[name] / scale,
            value / scale,
            rtol=1e-4,
            atol=2e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("more", [False, True], ids=["", "more_captions"])
@EVERY
def test_the_contrast_is_that_of_one_large_batch(
    name: str, options: dict[str, Any], more: bool
) -> None:
    objective, other, batch = make(name, options), make(name, options), large_batch(more)
    itc = next(iter(objective.LOSSES))
    values, trivial = other(batch, Noise(0, 0, CPU), set())
    expected = gradients(other, values[itc])
    got, total = by_cache(objective, parts(batch), set())
    torch.testing.assert_close(got[itc], values[itc].detach(), rtol=1e-5, atol=1e-6)
    assert_close(total, expected)
    used = [k for k in expected if "scale" in k or k == "bias"]
    assert all(bool(total[k].any()) for k in used if k != "kd_scale")
    assert trivial[itc].shape == ()


@EVERY
def test_other_losses_are_those_of_each_batch(name: str, options: dict[str, Any]) -> None:
    objective, once, separate = (make(name, options) for _ in range(3))
    others = list(objective.LOSSES)[1:]
    batches = parts(large_batch())
    values, _ = once(large_batch(), Noise(0, 0, CPU), set())
    itc = objective.LOSSES[0]
    expected = {itc: values[itc].detach(), **{k: torch.zeros(()) for k in others}}
    total = gradients(once, values[itc])
    for number, batch in enumerate(batches):
        found, _ = separate(batch, Noise(0, number, CPU), set(others))
        for k in others:
            expected[k] = expected[k] + found[k].detach() / len(batches)
        if others:
            rest = torch.stack([found[k] for k in others]).sum() / len(batches)
            for k, g in gradients(separate, rest).items():
                total[k] = total[k] + g
    got, gradient = by_cache(objective, batches, set(objective.LOSSES))
    assert_close(got, expected)
    assert_close(gradient, total)


def test_dropout_is_the_same_both_times() -> None:
    objective = make("clip", {}, text_dropout=0.4)
    batches, model = parts(large_batch()), objective.model
    rows = []
    for number, batch in enumerate(batches):
        seed_modules(5, number)
        image = model.encode_image(batch.image).features
        text = model.encode_text(batch.input_ids, batch.attention_mask).features
        rows.append((image, text, batch.image_id))
    loss = info_nce(model.logit_scale, *map(torch.cat, zip(*rows, strict=True))).loss
    got, total = by_cache(objective, batches, set(), seed=5)
    torch.testing.assert_close(got["itc"], loss.detach(), rtol=1e-5, atol=1e-6)
    assert_close(total, gradients(objective, loss))
    assert float(by_cache(objective, batches, set(), seed=6)[0]["itc"]) != float(loss.detach())


def test_dropout_differs_between_batches_and_seeds() -> None:
    draws = []
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_modules(seed, step)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_half_precision_keeps_small_gradients() -> None:
    rows = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
    scale = torch.tensor(4.0)
    x = rows[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(info_nce(scale, x, rows[1], torch.arange(8)).loss * 1e-8, x)

    def loss(images: Tensor, texts: Tensor, image_id: Tensor) -> tuple[Tensor, Tensor]:
        found = info_nce(scale, images, texts, image_id)
        return found.loss * 1e-8, found.trivial

    with torch.autocast("cpu", torch.float16):
        cached = CachedContrast(1, [])
        for _ in range(2):
            value, _ = cached(loss, x, rows[1], torch.arange(8))
    (got,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)


def test_the_trivial_value_is_that_of_all_pairs() -> None:
    objective = make("clip", {})
    _, expected = objective(large_batch(), Noise(0, 0, CPU), set())
    batches = parts(large_batch())
    cached = CachedContrast(3, list(objective.parameters()))
    for batch in batches:
        objective(batch, Noise(0, 0, CPU), set(), cached)
    _, trivial = objective(batches[0], Noise(0, 0, CPU), set(), cached)
    assert torch.equal(trivial["itc"], expected["itc"])


def test_the_queues_get_each_row_once_in_order() -> None:
    objective = make("albef", {"queue_size": 40, "queue_steps": 0})
    batch = large_batch()
    by_cache(objective, parts(batch), {"itm", "mlm"})
    assert int(objective.image_queue.pushed) == 5  # not before the step is over
    own = objective.target.module.encode_image(batch.image).features.detach()
    objective.after_step()
    features, image_id = objective.image_queue.filled()
    assert image_id.tolist()[5:] == batch.image_id.tolist()
    torch.testing.assert_close(features[5:], own)


def test_what_compares_no_features_is_refused() -> None:
    config = TrainConfig(
        objective="scan", losses={"hinge": LossConfig()}, batch_size=4, contrastive_batch=8
    )
    model = make_model(fusion="stacked_attention")
    with pytest.raises(UsageError, match="scan has no contrast of features that --contrastive-b"):
        create_objective(model, make_tokenizer(), config)
    able = {name for name, made in OBJECTIVES.items() if getattr(made, "CACHES_CONTRAST", False)}
    assert {name for name, _ in CASES} == able


def test_what_contrasts_one_caption_refuses_more() -> None:
    assert not any(hasattr(OBJECTIVES[name], "MORE_CAPTIONS") for name in ("albef", "scan"))
    config = TrainConfig(objective="vsepp", losses={"hinge": LossConfig()}, batch_size=4)
    with pytest.raises(UsageError, match="vsepp contrasts one caption of each picture: leave"):
        create_objective(make_model(fusion="none"), make_tokenizer(), config, 1)
