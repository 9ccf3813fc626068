"""Every loss against a slow formula, written as the papers write it: value and gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vicvlm_cli.objectives import losses


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(
    fast: Callable[..., Tensor], slow: Callable[..., Tensor], *inputs: Tensor, rtol: float = 1e-4
) -> None:
    """The same value and the same gradient for every input; the slow one counts in float64."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    mine, reference = fast(*ours), slow(*theirs)
    torch.testing.assert_close(mine.double(), reference, rtol=rtol, atol=1e-6)
    mine.backward()
    reference.backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None and y.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=rtol, atol=1e-6)


def slow_itc(similarity: Tensor, image_id: list[int]) -> Tensor:
    number = len(image_id)
    terms = []
    for i in range(number):
        others = [j for j in range(number) if j == i or image_id[j] != image_id[i]]
        for line in (similarity[i], similarity[:, i]):  # to its captions, to its pictures
            total = torch.stack([line[j].exp() for j in others]).sum()
            terms.append(-(line[i].exp() / total).log())
    return torch.stack(terms).sum() / (2 * number)


@pytest.mark.parametrize("image_id", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [7, 7, 3, 3, 3]])
def test_itc(image_id: list[int]) -> None:
    ids = torch.tensor(image_id)
    agree(
        lambda s: losses.itc(s, ids), lambda s: slow_itc(s, image_id), 3 * randn(len(image_id), 5)
    )


def slow_itc_of_captions(similarity: Tensor, image_id: list[int], captions: int) -> Tensor:
    number = len(image_id)
    to_text, to_image = [], []
    for k, i in itertools.product(range(captions), range(number)):
        column = k * number + i
        own = similarity[i, column].exp()
        others = [j for j in range(number) if image_id[j] != image_id[i]]
        texts = [q * number + j for q in range(captions) for j in others]
        to_text.append(-(own / (own + similarity[i, texts].exp().sum())).log())
        to_image.append(-(own / (own + similarity[others, column].exp().sum())).log())
    return (torch.stack(to_text).mean() + torch.stack(to_image).mean()) / 2


@pytest.mark.parametrize("image_id", [[0, 1, 2, 3], [0, 1, 0, 2], [3, 3, 3, 3]])
@pytest.mark.parametrize("captions", [1, 3])
def test_itc_of_several_captions_a_picture(image_id: list[int], captions: int) -> None:
    ids = torch.tensor(image_id)
    agree(
        lambda s: losses.itc(s, ids),
        lambda s: slow_itc_of_captions(s, image_id, captions),
        3 * randn(4, 4 * captions),
    )
    guess = float(losses.itc(torch.zeros(4, 4 * captions), torch.arange(4)))
    assert float(losses.itc_trivial(4, 4 * captions)) == pytest.approx(guess, rel=1e-6)


def slow_sigmoid(logits: Tensor, image_id: list[int], text_id: list[int]) -> Tensor:
    terms = []
    for (i, image), (j, text) in itertools.product(enumerate(image_id), enumerate(text_id)):
        z = 1 if image == text else -1
        terms.append(-(1 / (1 + (-z * logits[i, j]).exp())).log())
    return torch.stack(terms).sum() / len(image_id)


@pytest.mark.parametrize("each", [1, 3], ids=["", "more_captions"])
@pytest.mark.parametrize("image_id", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0]])
def test_sigmoid(image_id: list[int], each: int) -> None:
    text_id = image_id * each
    same = torch.tensor(image_id)[:, None] == torch.tensor(text_id)
    agree(
        lambda s: losses.sigmoid(s, same),
        lambda s: slow_sigmoid(s, image_id, text_id),
        3 * randn(5, 5 * each),
    )
    # The best of constant guesses, tried one by one.
    guesses = torch.linspace(-6, 6, 4001)
    best = min(float(losses.sigmoid(torch.full(same.shape, float(g)), same)) for g in guesses)
    assert float(losses.sigmoid_base_rate(same)) == pytest.approx(best, rel=1e-4)
    assert float(losses.sigmoid_base_rate(torch.ones(2, 2, dtype=torch.bool))) == 0


@pytest.mark.parametrize("away", [0.0, 40.0, -3.0])
def test_the_sigmoids_bias_expects_as_many_positives_as_there_are(away: float) -> None:
    same = torch.eye(5, 7, dtype=torch.bool)
    scores = 3 * randn(5, 7) + away
    bias = losses.sigmoid_bias(scores, same)
    assert float((scores + bias).sigmoid().sum()) == pytest.approx(5, rel=1e-4)
    # There the loss no longer gains from moving all scores alike.
    around = [float(losses.sigmoid(scores + bias + by, same)) for by in (-0.1, 0.0, 0.1)]
    assert around[1] == min(around)


def slow_hinge(similarity: Tensor, image_id: list[int], margin: float, hardest: bool) -> Tensor:
    number = len(image_id)
    total = torch.zeros((), dtype=similarity.dtype)
    for line_of in (lambda i: similarity[i], lambda i: similarity[:, i]):
        costs = [
            [
                (margin - similarity[i, i] + line_of(i)[j]).clamp(min=0)
                for j in range(number)
                if image_id[j] != image_id[i]
            ]
            for i in range(number)
        ]
        if hardest:
            total = total + torch.stack([torch.stack(row).max() for row in costs]).sum() / number
        else:
            within = [cost for row in costs for cost in row if float(cost.detach()) > 0]
            total = total + torch.stack(within).mean()
    return total


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("image_id", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0]])
def test_hinge(image_id: list[int], hardest: bool) -> None:
    ids = torch.tensor(image_id)
    similarity = 0.3 * randn(5, 5)
    agree(
        lambda s: losses.hinge(s, ids, 0.2, hardest),
        lambda s: slow_hinge(s, image_id, 0.2, hardest),
        similarity,
    )
    assert float(losses.hinge(torch.full((5, 5), 0.4), ids, 0.2, hardest)) == pytest.approx(0.4)
    assert float(losses.hinge(torch.eye(5), torch.arange(5), 0.2, hardest)) == 0


def test_captions_of_one_image_are_never_negatives() -> None:
    similarity = randn(4, 4).requires_grad_()
    ids = torch.tensor([5, 8, 5, 9])
    loss = losses.itc(similarity, ids)
    (gradient,) = torch.autograd.grad(loss, similarity)
    assert float(gradient[0, 2]) == float(gradient[2, 0]) == 0
    assert int((gradient != 0).sum()) == 14  # everything else counts
    changed = similarity.detach().clone()
    changed[0, 2], changed[2, 0] = 50.0, 50.0
    assert torch.equal(losses.itc(changed, ids), loss)


def test_itc_of_equal_similarities_is_the_trivial_value() -> None:
    value = float(losses.itc(torch.zeros(6, 6), torch.arange(6)))
    assert value == pytest.approx(math.log(6), rel=1e-5)


@pytest.mark.parametrize(("positives", "negatives"), [(3, 6), (2, 2), (1, 5)])
def test_itm(positives: int, negatives: int) -> None:
    def slow(p: Tensor, n: Tensor) -> Tensor:
        terms = [-(1 / (1 + (-x).exp())).log() for x in p]
        terms += [-(1 - 1 / (1 + (-x).exp())).log() for x in n]
        return torch.stack(terms).sum() / len(terms)

    agree(losses.itm, slow, 2 * randn(positives), 2 * randn(negatives, seed=1))


@pytest.mark.parametrize("negatives", [1, 2, 4])
def test_the_itm_base_rate_is_the_best_constant(negatives: int) -> None:
    def constant(logit: float) -> float:
        return float(losses.itm(torch.full((8,), logit), torch.full((8 * negatives,), logit)))

    best = losses.itm_base_rate(negatives)
    assert math.isclose(constant(math.log(1 / negatives)), best, rel_tol=1e-5)
    assert all(constant(x / 10) > best - 1e-6 for x in range(-40, 41))


def test_mlm() -> None:
    target = torch.tensor([3, 0, 3, 6])

    def slow(logits: Tensor) -> Tensor:
        return -sum(
            ((row[t].exp() / row.exp().sum()).log() for row, t in zip(logits, target, strict=True)),
            torch.zeros((), dtype=torch.float64),
        )

    agree(lambda x: losses.mlm_sum(x, target), slow, 2 * randn(4, 7))
    assert float(losses.mlm_sum(torch.zeros(0, 7), target[:0])) == 0  # no word was masked


def test_mim() -> None:
    target = randn(2, 3, 4, seed=1)

    def slow(prediction: Tensor) -> Tensor:
        terms = [
            sum((prediction[b, m, d] - float(target[b, m, d])) ** 2 for d in range(4)) / 4
            for b in range(2)
            for m in range(3)
        ]
        return torch.stack([torch.as_tensor(t) for t in terms]).sum()

    agree(lambda p: losses.mim_sum(p, target), slow, randn(2, 3, 4))


def test_variance() -> None:
    def slow(z: Tensor) -> Tensor:  # VICReg, eq. 1 and 2
        rows, width = z.shape
        total = torch.zeros((), dtype=z.dtype)
        for d in range(width):
            mean = sum(z[i, d] for i in range(rows)) / rows
            var = sum((z[i, d] - mean) ** 2 for i in range(rows)) / (rows - 1)
            s = (var + 1e-4) ** 0.5
            if float(s.detach()) < 1:
                total = total + 1 - s
        return total / width

    spread = torch.tensor([0.1, 0.5, 3.0, 0.9])  # below and above the hinge
    agree(losses.variance, slow, randn(6, 4) * spread)
    assert float(losses.variance(torch.zeros(5, 3))) == pytest.approx(0.99)
    assert float(losses.variance(5 * randn(50, 3))) == 0


def slow_covariance(z: Tensor) -> Tensor:  # VICReg, eq. 3 and 4
    rows, width = z.shape
    mean = [sum(z[i, d] for i in range(rows)) / rows for d in range(width)]
    total = torch.zeros((), dtype=z.dtype)
    for d, e in itertools.permutations(range(width), 2):
        c = sum((z[i, d] - mean[d]) * (z[i, e] - mean[e]) for i in range(rows)) / (rows - 1)
        total = total + c**2
    return total / width


def test_covariance() -> None:
    agree(losses.covariance, slow_covariance, randn(6, 4) + 2)


def test_the_covariance_of_copies_is_that_of_copies() -> None:
    copies = randn(9, 1) * torch.tensor([0.5, -1.0, 2.0, 3.0]) + 1
    torch.testing.assert_close(losses.covariance_of_copies(copies), losses.covariance(copies))
    other = randn(9, 4)
    assert float(losses.covariance_of_copies(other)) > float(losses.covariance(other))


def test_invariance() -> None:
    def slow(a: Tensor, b: Tensor) -> Tensor:
        rows, width = a.shape
        squares = [(a[i, d] - b[i, d]) ** 2 for i in range(rows) for d in range(width)]
        return torch.stack(squares).sum() / (rows * width)

    agree(losses.invariance, slow, randn(5, 3), randn(5, 3, seed=1))


def test_the_trivial_guess_for_masked_patches() -> None:
    target, masked = randn(3, 4, 2), torch.tensor([[0, 3], [1, 2], [0, 1]])

    def slow() -> float:
        total = 0.0
        for b, m in itertools.product(range(3), range(2)):
            n = int(masked[b, m])
            for d in range(2):
                place = [sum(float(target[i, k, d]) for i in range(3)) / 3 for k in range(4)]
                own = sum(float(target[b, k, d]) - place[k] for k in range(4)) / 4
                total += (float(target[b, n, d]) - place[n] - own) ** 2
        return total / (3 * 2 * 2) * 3 / 2

    assert float(losses.mim_trivial(target, masked)) == pytest.approx(slow(), rel=1e-4)
    # It knows each position's mean and each picture's own: such a target leaves it no error.
    known = randn(1, 4, 2) + randn(3, 1, 2, seed=1)
    assert float(losses.mim_trivial(known, masked)) == pytest.approx(0, abs=1e-10)
    # Of pure noise it can explain what the picture's mean does, one part in the patches.
    noise, all_patches = randn(400, 8, 16), torch.arange(8).expand(400, 8)
    assert float(losses.mim_trivial(noise, all_patches)) == pytest.approx(1 - 1 / 8, rel=0.02)
    assert float(losses.mim_trivial(target[:1], masked[:1])) == pytest.approx(0, abs=1e-10)
