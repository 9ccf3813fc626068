"""Word prediction: whose words, how much each counts, and what a guess without looking scores."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradients import assert_same
from tiny import make_batch, make_model, make_tokenizer, teacher_weights

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.objectives import OBJECTIVES, create_objective, losses, recipe_of
from vicvlm_cli.objectives.beside import Beside
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.words import WordPrediction
from vicvlm_cli.settings import LossConfig, TrainConfig

NOISE = Noise(0, 0, torch.device("cpu"))
WORDS = torch.tensor([[1, 12, 13, 0, 13], [12, 14, 0, 0, 1], [12, 13, 0, 0, 0]])


def of_three(words: torch.Tensor = WORDS) -> Batch:
    """Three pairs whose pictures have the words 12, 13 and 14, beside special tokens."""
    return replace(make_batch(3), words=words)


def make(name: str = "clip", weight: float = 1.0) -> Any:
    weights = {**{n: LossConfig() for n in OBJECTIVES[name].LOSSES}, "words": LossConfig(weight)}
    options = {"predictor_width": 32} if name == "vicvlm" else {}
    if name == "s_smke":
        options = {"teacher": "test_vit", "teacher_weights": teacher_weights()}
    config = TrainConfig(objective=name, losses=weights, options=options)
    fusion = recipe_of(name).get("model", {}).get("fusion", "cross_attention")
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config)


def told(objective: Any, batch: Batch) -> tuple[float, float]:
    with torch.no_grad():
        values, trivial = objective(batch, NOISE, {"words"})
    return float(values["words"]), float(trivial["words"])


# ViLT refuses it, as VICReg's terms: see test_vicreg.py.
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if "vilt" not in n])
def test_it_stands_beside_every_objective_of_two_encoders(name: str) -> None:
    objective, first = make(name).train(), OBJECTIVES[name].LOSSES[0]
    assert isinstance(objective, Beside) and isinstance(objective.further, WordPrediction)
    assert tuple(objective.LOSSES) == (*OBJECTIVES[name].LOSSES, "words")
    values, trivial = objective(make_batch(), NOISE, {first, "words"})
    assert set(values) == set(trivial) == {first, "words"}
    assert set(objective(make_batch(), NOISE, {first})[0]) == {first}
    assert float(values["words"].detach()) > 1 and float(trivial["words"]) > 1
    values["words"].backward()
    assert bool(objective.further.head.weight.grad.any())
    assert bool(objective.model.image_projection.weight.grad.any())


def test_no_weight_is_no_head() -> None:
    assert not isinstance(make(weight=0.0), Beside)


def test_of_patches_and_words_it_is_told_from_their_means() -> None:
    objective, batch = make("scan").train(), make_batch()
    told(objective, batch)  # counts which words tell something
    model, further = objective.eval().model, objective.further
    patches = model.image_encoder(model.normalize(batch.image))[:, model.image_encoder.prefix :]
    words, mask = model.text_encoder(batch.input_ids, batch.attention_mask), batch.attention_mask
    target, _ = further._target(batch.words)
    total = torch.zeros(())
    for image, text, real, own in zip(patches, words, mask, target, strict=True):
        for x in (model.image_projection(image), model.text_projection(text[real])):
            mean = x.mean(0)
            logits = further.head(mean / mean.norm() * math.sqrt(len(mean)))
            total = total + losses.mlm_sum(logits[None], own[None]) / 12
    values, _ = objective(batch, NOISE, {"words"})
    assert_same(values["words"], total, objective)


def test_the_loss_is_that_of_the_formula() -> None:
    objective, batch = make().train(), of_three()
    head, model = objective.further.head, objective.model
    loss, trivial = told(objective, batch)
    # Four pictures with the one that counting begins with, which has every word.
    tells = {12: math.log(4 / 4), 13: math.log(4 / 3), 14: math.log(4 / 2)}
    targets = [{w: tells[w] for w in words} for words in ((12, 13), (12, 14), (12, 13))]
    vocab_size = model.config.vocab_size
    mass = [1 / vocab_size] * vocab_size
    for target in targets:
        for word, weight in target.items():
            mass[word] += weight / sum(target.values())
    expected, guessed = 0.0, 0.0
    with torch.no_grad():
        image = model.encode_image(batch.image).features
        text = model.encode_text(batch.input_ids, batch.attention_mask).features
        for x in (image, text):
            for row, target in zip(x, targets, strict=True):
                logits = (head.weight @ row * math.sqrt(len(row)) + head.bias).tolist()
                total = math.log(sum(map(math.exp, logits)))
                for word, weight in target.items():
                    share = weight / sum(target.values())
                    expected += share * (total - logits[word]) / 6
                    guessed -= share * math.log(mass[word] / sum(mass)) / 6
    assert loss == pytest.approx(expected, rel=1e-4)
    assert trivial == pytest.approx(guessed, rel=1e-4)


def test_a_word_of_every_picture_tells_nothing() -> None:
    objective = make().train()
    told(objective, of_three())
    bias = objective.eval().further.head.bias.data
    bias[12] = 50.0
    loud, _ = told(objective, of_three())
    bias[12] = -50.0
    quiet, _ = told(objective, of_three())
    assert loud > 40 > quiet


def test_the_trivial_value_is_that_of_a_head_that_does_not_look() -> None:
    objective = make().train()
    for _ in range(3):
        told(objective, of_three())
    further = objective.eval().further
    further.head.weight.data.zero_()
    further.head.bias.data.copy_(further.mass.log())
    loss, trivial = told(objective, of_three())
    assert loss == pytest.approx(trivial, rel=1e-5)


def test_special_tokens_order_and_number_do_not_count() -> None:
    objective = make().train()
    told(objective, make_batch())
    again = torch.cat([WORDS.flip(1), WORDS, torch.ones(3, 2, dtype=torch.long)], dim=1)
    first, second = told(objective.eval(), of_three()), told(objective, of_three(again))
    assert first == pytest.approx(second) and first[0] > 1


def test_a_picture_of_which_nothing_is_told_is_finite() -> None:
    objective = make().train()
    batch = of_three(torch.zeros(3, 3, dtype=torch.long))
    values, _ = objective(batch, NOISE, {"words"})
    assert float(values["words"].detach()) == 0
    values["words"].backward()
    assert bool(objective.further.head.weight.grad.isfinite().all())


def test_validation_counts_nothing_and_the_counts_are_kept() -> None:
    objective = make()
    names = ("pictures", "with_word", "mass")
    before = {n: getattr(objective.further, n).clone() for n in names}
    told(objective.eval(), make_batch())
    assert all(torch.equal(getattr(objective.further, n), before[n]) for n in names)
    told(objective.train(), make_batch())
    assert float(objective.further.pictures) == 7
    assert all(f"further.{n}" in objective.state_dict() for n in names)


def test_it_is_learned() -> None:
    objective, batch = make().train(), make_batch(4)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(60):
        values, trivial = objective(batch, Noise(0, step, torch.device("cpu")), {"words"})
        optimizer.zero_grad()
        values["words"].backward()
        optimizer.step()
    assert float(values["words"].detach()) < 0.8 * float(trivial["words"])
