"""Word prediction: whose words, how much each counts, and what a guess without looking scores."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vicvlm_cli.objectives.words import WordPrediction

SPECIAL = torch.tensor([True, True, False, False, False, False])
WORDS = torch.tensor([[1, 2, 3, 0, 3], [2, 4, 0, 0, 1], [2, 3, 0, 0, 0]])


def features(rows: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(rows, 8, generator=generator), dim=1) for _ in range(2)]


def made() -> WordPrediction:
    torch.manual_seed(1)
    return WordPrediction(8, SPECIAL)


def test_the_loss_is_that_of_the_formula() -> None:
    module, pair = made().train(), features()
    with torch.no_grad():
        loss, trivial = module(pair, WORDS)
    rows = list(zip(module.head.weight.detach(), module.head.bias.tolist(), strict=True))
    # Four pictures with the one that counting begins with, which has every word.
    tells = {2: math.log(4 / 4), 3: math.log(4 / 3), 4: math.log(4 / 2)}
    targets = [{2: tells[2], 3: tells[3]}, {2: tells[2], 4: tells[4]}, {2: tells[2], 3: tells[3]}]
    mass = [1 / 6] * 6
    for target in targets:
        for word, weight in target.items():
            mass[word] += weight / sum(target.values())
    expected, guessed = 0.0, 0.0
    for x in pair:
        for row, target in zip(x, targets, strict=True):
            logits = [math.sqrt(8) * float(row @ weight) + bias for weight, bias in rows]
            total = math.log(sum(map(math.exp, logits)))
            for word, weight in target.items():
                share = weight / sum(target.values())
                expected += share * (total - logits[word]) / 6
                guessed -= share * math.log(mass[word] / sum(mass)) / 6
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(trivial) == pytest.approx(guessed, rel=1e-5)


def test_a_word_of_every_picture_tells_nothing() -> None:
    module = made().train()
    module(features(), WORDS)
    module.head.bias.data[2] = 50.0  # what every picture has, and no more
    loud, _ = module.eval()(features(), WORDS)
    module.head.bias.data[2] = -50.0
    quiet, _ = module(features(), WORDS)
    assert float(loud) > 40 > float(quiet)


def test_the_trivial_value_is_that_of_a_head_that_does_not_look() -> None:
    module = made().train()
    for _ in range(3):
        module(features(), WORDS)
    module.eval()
    module.head.weight.data.zero_()
    module.head.bias.data.copy_(module.mass.log())
    loss, trivial = module(features(), WORDS)
    assert float(loss) == pytest.approx(float(trivial), rel=1e-5)


def test_special_tokens_order_and_number_do_not_count() -> None:
    module = made().eval()
    module.with_word.copy_(torch.tensor([1.0, 1, 5, 3, 2, 1]))
    module.pictures.fill_(6)
    again = torch.cat([WORDS.flip(1), WORDS, torch.ones(3, 2, dtype=torch.long)], dim=1)
    assert float(module(features(), WORDS)[0]) == pytest.approx(float(module(features(), again)[0]))


def test_a_picture_of_which_nothing_is_told_is_finite() -> None:
    module = made().train()
    nothing = torch.zeros(2, 3, dtype=torch.long)
    loss, trivial = module([x[:2] for x in features()], nothing)
    assert float(loss) == 0 and float(trivial) == 0
    loss.backward()
    assert bool(module.head.weight.grad.isfinite().all())
