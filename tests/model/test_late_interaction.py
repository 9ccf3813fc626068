"""Stacked cross attention against figures worked out by hand and a slow loop over pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from gradients import assert_same
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor

from vicvlm_cli.errors import UsageError
from vicvlm_cli.model import late_interaction
from vicvlm_cli.model.late_interaction import StackedAttention
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig

WAYS = list(itertools.product(("t2i", "i2t"), ("lse", "mean")))


def made(direction: str, pool: str, **options: float) -> StackedAttention:
    return StackedAttention(StackedAttention.Config(direction, pool, **options))


def slow(image: Tensor, text: Tensor, direction: str, pool: str) -> Tensor:
    """One pair, [N, P] and [L, P] without padding, vector by vector as in the paper's sec. 3.1."""
    attending, attended = (text, image) if direction == "t2i" else (image, text)
    first, second = (9, 6) if direction == "t2i" else (4, 5)
    clipped = [[F.leaky_relu(a @ b, 0.1) for b in attended] for a in attending]
    relevances = []
    for i, a in enumerate(attending):
        logits = []
        for j in range(len(attended)):
            norm = sum((row[j] ** 2 for row in clipped), torch.zeros(()).to(image)).sqrt()
            logits.append(first * clipped[i][j] / norm)
        weight = torch.stack(logits).softmax(0)
        seen = sum((w * b for w, b in zip(weight, attended, strict=True)), torch.zeros_like(a))
        relevances.append(a @ seen / (a.norm() * seen.norm()))
    every = torch.stack(relevances)
    if pool == "mean":
        return every.mean()
    return (second * every).exp().sum().log() / second


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures of four patches and five captions of one to five words, in float64."""
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(3, 4, 6, generator=g, dtype=torch.float64), dim=-1)
    text = F.normalize(torch.randn(5, 5, 6, generator=g, dtype=torch.float64), dim=-1)
    mask = torch.arange(5) < torch.tensor([3, 1, 5, 2, 4])[:, None]
    return image, text, mask


@pytest.mark.parametrize(("direction", "pool"), WAYS)
def test_all_pairs_are_the_slow_formula_forward_and_gradient(
    direction: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(late_interaction.CHUNK, "cpu", 3 * 4 * 5 * 2)  # two captions a chunk
    *free, mask = example()
    for x in free:
        x.requires_grad_()
    image, text = (F.normalize(x, dim=-1) for x in free)
    fast = made(direction, pool).all_pairs(image, text, mask)
    rows = [
        torch.stack([slow(i, t[m], direction, pool) for t, m in zip(text, mask, strict=True)])
        for i in image
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(fast, expected)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    ours = torch.autograd.grad((fast * weight).sum(), free, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), free)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("direction", "pool"), WAYS)
def test_pair_by_pair_is_all_pairs(direction: str, pool: str) -> None:
    image, text, mask = example()
    module = made(direction, pool)
    whole = module.all_pairs(image, text, mask)
    rows, columns = torch.arange(15) // 5, torch.arange(15) % 5
    pairs = module(image[rows], text[columns], mask[columns])
    torch.testing.assert_close(pairs.view(3, 5), whole)


def test_the_attention_worked_out_by_hand() -> None:
    """Patches along x and y; a word along x and one along -x. Cosines: [[1, -1], [0, 0]]."""
    dots = torch.tensor([[[1.0, -1.0], [0.0, 0.0]]])  # [1, N, L]
    mask = torch.tensor([[True, True]])
    # Clipped: 1 and -0.1 for the first patch; over words its length is sqrt(1.01). The second
    # patch is orthogonal to both. Each word's softmax is over (x, 0) with lambda 9.
    high, low = 9 / math.sqrt(1.01), -0.9 / math.sqrt(1.01)
    first = [1 / (1 + math.exp(-high)), 1 / (1 + math.exp(-low))]
    expected = torch.tensor([first, [1 - first[0], 1 - first[1]]])
    torch.testing.assert_close(made("t2i", "lse").attend(dots, mask)[0], expected)
    # Image to text: each word's column has length 1 and 0.1, so it is (1, 0) and (-1, 0) after the
    # norm. The first patch's softmax is over (1, -1) with lambda 4, the second's over (0, 0).
    share = 1 / (1 + math.exp(-8))
    expected = torch.tensor([[share, 1 - share], [0.5, 0.5]])
    torch.testing.assert_close(made("i2t", "lse").attend(dots, mask)[0], expected)


def test_the_pooling_worked_out_by_hand() -> None:
    cosine, mask = torch.tensor([[0.5, -0.25, 9.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(made("t2i", "mean").pool(cosine, mask), torch.tensor([0.125]))
    expected = math.log(math.exp(6 * 0.5) + math.exp(6 * -0.25)) / 6
    torch.testing.assert_close(made("t2i", "lse").pool(cosine, mask), torch.tensor([expected]))
    other = made("t2i", "lse", pool_scale=2.0).pool(cosine, mask)
    expected = math.log(math.exp(2 * 0.5) + math.exp(2 * -0.25)) / 2
    torch.testing.assert_close(other, torch.tensor([expected]))


def test_the_model_scores_pairs_as_it_scores_all() -> None:
    model, batch = make_model(fusion="stacked_attention"), make_batch()
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    assert image.tokens.shape == (6, 16, 16)  # patches alone
    torch.testing.assert_close(image.features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(text.features.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(model.match(image, text), model.match_all(image, text).diagonal())
    assert model.pair_score is not None and model.pair_score.weights(14.0, 0.3) == (0.0, 1.0)


def slow_hinge(scores: Tensor, ids: list[int], hardest: bool) -> Tensor:
    """Pair by pair, both ways, a margin of 0.2: the hardest of each row, or the mean of all."""
    total = torch.zeros(())
    for way in (scores, scores.T):
        costs = [
            [0.2 + way[i, j] - way[i, i] for j in range(len(ids)) if ids[j] != ids[i]]
            for i in range(len(ids))
        ]
        if hardest:
            total = total + sum((max(0.0 * c[0], *c) for c in costs), total * 0) / len(ids)
        else:
            within = [x for c in costs for x in c if float(x.detach()) > 0]
            total = total + torch.stack(within).mean()
    return total


@pytest.mark.parametrize(
    ("direction", "pool", "mean_steps"), [*((*way, 0) for way in WAYS), (*WAYS[0], 5)]
)
def test_scan_is_the_hinge_of_the_slow_scores(direction: str, pool: str, mean_steps: int) -> None:
    options = {"direction": direction, "pool": pool}
    model = make_model(fusion="stacked_attention", fusion_options=options)
    config = TrainConfig(
        objective="scan", losses={"hinge": LossConfig()}, options={"mean_steps": mean_steps}
    )
    objective = create_objective(model, make_tokenizer(), config).train()
    batch, ids = make_batch(3), [4, 7, 4]  # two pairs of one picture: no negatives
    batch.image_id = torch.tensor(ids)
    patches = model.image_projection(model.image_encoder(model.normalize(batch.image))[:, 1:])
    words = model.text_projection(model.text_encoder(batch.input_ids, batch.attention_mask))
    patches, words = F.normalize(patches, dim=-1), F.normalize(words, dim=-1)
    pairs = list(zip(words, batch.attention_mask, strict=True))
    rows = [torch.stack([slow(i, t[m], direction, pool) for t, m in pairs]) for i in patches]
    expected = slow_hinge(torch.stack(rows), ids, hardest=mean_steps == 0)
    values, trivial = objective(batch, Noise(0, 0, torch.device("cpu")), {"hinge"})
    assert_same(values["hinge"], expected, objective)
    assert float(trivial["hinge"]) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "both"}, "fusion_options.direction is 'both', not t2i or i2t"),
        ({"pool": "max"}, "fusion_options.pool is 'max', not lse or mean"),
        ({"pol": "lse"}, "did you mean 'pool'?"),
        ({"pool_scale": "6"}, "is '6', not a number"),
    ],
)
def test_options_that_there_are_not(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_model(fusion="stacked_attention", fusion_options=options)
    assert words in str(caught.value)
