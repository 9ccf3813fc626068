"""ALBEF: soft targets, with momentum model and queues, against slow formulas and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.objectives import create_objective, losses
from vicvlm_cli.objectives.albef import ALBEF
from vicvlm_cli.objectives.masking import mask_words, replace_hidden
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
IDS = [0, 1, 0, 3]  # rows 0 and 2 show one picture
ALPHAS = pytest.mark.parametrize("alpha", [0.0, 0.4])


def make(fusion: str = "cross_attention", **options: Any) -> Any:
    config = TrainConfig(
        objective="albef",
        options={"alpha_steps": 0, "queue_size": 7, "queue_steps": 0, **options},
        losses={name: LossConfig() for name in ALBEF.LOSSES},
    )
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()


def some(ids: list[int], seed: int = 0) -> Batch:
    batch = make_batch(len(ids), seed)
    batch.image_id = torch.tensor(ids)
    return batch


def apart(objective: Any) -> Any:
    """The momentum model away from the online one, so that it matters which of them is asked."""
    torch.manual_seed(7)
    with torch.no_grad():
        for ema in (objective.target, objective.head_target):
            for parameter in ema.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def fill(objective: Any) -> Any:
    """Three and three rows into the queues of seven, two of them of pictures of ``IDS``."""
    for seed, ids in ((1, [8, 0, 9]), (2, [3, 0, 5])):
        objective(some(ids, seed), Noise(0, 0, CPU), set())
        objective.after_step()
    return objective


def divergence(scores: Tensor, target: list[Any]) -> Tensor:
    """Sum of t log(t / p) over one row of scores [C]."""
    p = scores.exp() / scores.exp().sum()
    terms = [t * (math.log(float(t)) - p[j].log()) for j, t in enumerate(target) if float(t) > 0]
    return torch.stack([torch.as_tensor(term) for term in terms]).sum()


def blend(hard: list[float], belief: Tensor, alpha: float) -> list[float]:
    soft = (belief.exp() / belief.exp().sum()).tolist()
    return [(1 - alpha) * h + alpha * s for h, s in zip(hard, soft, strict=True)]


def slow_itc(objective: Any, batch: Batch, alpha: float) -> tuple[Tensor, float]:
    """ITC row by row and way by way, and what equal scores give."""
    words = (batch.input_ids, batch.attention_mask)
    model, momentum = objective.model, objective.target.module
    online = [model.encode_image(batch.image).features, model.encode_text(*words).features]
    with torch.no_grad():
        slow = [momentum.encode_image(batch.image).features, momentum.encode_text(*words).features]
    queues = [objective.image_queue, objective.text_queue]
    ids = batch.image_id.tolist()
    number = min(int(queues[0].pushed), objective.config.queue_size)
    of = ids + queues[0].image_id[:number].tolist()
    total, trivial = torch.zeros(()), 0.0
    for way in (0, 1):
        other = 1 - way
        candidates = [*slow[other], *queues[other].features[:number]]
        for i in range(len(ids)):
            scale = model.logit_scale.exp()
            scores = torch.stack([scale * online[way][i] @ c for c in candidates])
            belief = torch.stack([scale * slow[way][i] @ c for c in candidates]).detach()
            own = [j for j in range(len(of)) if of[j] == ids[i]]
            hard = [1 / len(own) if j in own else 0.0 for j in range(len(of))]
            target = blend(hard, belief, alpha)
            total = total + divergence(scores, target)
            trivial += float(divergence(torch.zeros(len(of)), target))
    return total / (2 * len(ids)), trivial / (2 * len(ids))


def assert_same_gradient(objective: Any, value: Tensor, expected: Tensor) -> None:
    named = {k: p for k, p in objective.named_parameters() if p.requires_grad}
    ours, theirs = (
        torch.autograd.grad(x, list(named.values()), allow_unused=True) for x in (value, expected)
    )
    assert sum(g is not None for g in ours) > 20
    for name, a, b in zip(named, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@ALPHAS
def test_itc_is_the_slow_formula_with_queues_and_pictures(alpha: float) -> None:
    objective, batch = fill(apart(make(alpha=alpha, ema_decay=1.0))), some(IDS)
    values, trivial = objective(batch, Noise(0, 0, CPU), {"itc"})
    assert set(values) == set(trivial) == {"itc"}
    assert objective.image_queue.filled()[1].tolist() == [8, 0, 9, 3, 0, 5]
    expected, guess = slow_itc(objective, batch, alpha)
    torch.testing.assert_close(values["itc"], expected, rtol=1e-4, atol=1e-5)
    assert float(trivial["itc"]) == pytest.approx(guess, rel=1e-4)
    assert_same_gradient(objective, values["itc"], expected)


def test_itc_worked_out_by_hand_with_a_queue_of_three_that_has_wrapped() -> None:
    config = TrainConfig(
        objective="albef",
        options={"alpha": 0.4, "alpha_steps": 0, "queue_size": 3, "queue_steps": 0},
        losses={"itc": LossConfig()},
    )
    model = make_model(fusion="cross_attention", projection_dim=2)
    objective: Any = create_objective(model, make_tokenizer(), config).train()
    model.logit_scale.data.zero_()  # cosines as they are
    x, y, a, b = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]
    # Two and two into three: the first of all makes room, and its picture, 7, comes no more.
    for images, texts, ids in (([x, x], [x, b], [7, 5]), ([a, y], [y, y], [6, 8])):
        objective._contrast(*map(torch.tensor, (images, texts, images, texts, ids)))
        objective.after_step()
    held = objective.image_queue.filled(), objective.text_queue.filled()
    assert [ids.tolist() for _, ids in held] == [[8, 5, 6]] * 2
    torch.testing.assert_close(held[0][0], torch.tensor([y, x, a]))
    torch.testing.assert_close(held[1][0], torch.tensor([y, b, y]))
    # Pictures x and y of 5 and 6 with captions a and y; the momentum model has b and y, x and a.
    rows = [x, y], [a, y], [b, y], [x, a], [5, 6]
    loss, trivial = objective._contrast(*map(torch.tensor, rows))
    # The first picture's cosines with the captions x, a of the batch and y, b, y of the queue are
    # 1, 0.6, 0, 0.8, 0: of the softmax they have 0.310, 0.208, 0.114, 0.254, 0.114. The momentum
    # model has 0.8, 0.96, 0.6, 1, 0.6, of the softmax 0.199, 0.233, 0.163, 0.243, 0.163, and 0.4 of
    # that beside 0.6 of a half for both captions of picture 5, the first and the fourth, is the
    # target 0.380, 0.093, 0.065, 0.397, 0.065. Its divergence is 0.1064, from five fifths 0.2981.
    # Likewise of the second picture 0.2142 and 0.3308, and of the captions, whose candidates are
    # the pictures b, y of the batch and y, x, a of the queue, 0.4365 and 0.3907, 0.2051 and 0.2871.
    assert float(loss.detach()) == pytest.approx(
        (0.10643 + 0.21415 + 0.43649 + 0.20508) / 4, abs=2e-5
    )
    assert float(trivial) == pytest.approx((0.29812 + 0.33078 + 0.39072 + 0.28708) / 4, abs=2e-5)


def test_alone_it_is_the_plain_loss_of_the_batch() -> None:
    objective = make(alpha=0.0, ema_decay=0.0, queue_size=0)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.mul_(1.1)
    objective.after_step()  # the momentum model is the online one again
    for ids in ([0, 1, 2, 3], IDS):
        batch = some(ids)
        values, trivial = objective(batch, Noise(0, 0, CPU), set())
        image = objective.model.encode_image(batch.image).features
        text = objective.model.encode_text(batch.input_ids, batch.attention_mask).features
        similarity = objective.model.logit_scale.exp() * image @ text.T
        positives = [[j for j in range(4) if ids[j] == i] for i in ids]
        cross, entropy = 0.0, 0.0
        for i, own in enumerate(positives):
            for line in (similarity[i], similarity[:, i]):
                cross -= float(line.log_softmax(0)[own].mean().detach()) / 8
            entropy += math.log(len(own)) / 4
        # Less what no guess could get below, where captions share a picture.
        assert float(values["itc"].detach()) == pytest.approx(cross - entropy, rel=1e-4)
        assert float(trivial["itc"]) == pytest.approx(math.log(4) - entropy, rel=1e-4)
        if entropy == 0:
            plain = losses.itc(similarity, batch.image_id)
            torch.testing.assert_close(values["itc"], plain, rtol=1e-4, atol=1e-5)


def test_the_parts_of_the_soft_loss() -> None:
    positive = torch.tensor([[True, False, True], [False, True, False]])
    belief = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]])
    hard = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    assert losses.soft_targets(positive, None, 0.3).tolist() == hard
    target = losses.soft_targets(positive, belief, 0.3)
    expected = [blend(h, b, 0.3) for h, b in zip(hard, belief, strict=True)]
    torch.testing.assert_close(target, torch.tensor(expected))
    logits = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.0, 2.0]], requires_grad=True)
    value = losses.divergence_sum(logits, target)
    slow = sum((divergence(x, t) for x, t in zip(logits, expected, strict=True)), torch.zeros(()))
    torch.testing.assert_close(value, slow)
    (gradient,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(gradient, logits.softmax(1) - target)  # as of cross entropy
    assert float(losses.divergence_sum(target.log(), target)) == pytest.approx(0, abs=1e-6)
    assert float(losses.divergence_sum(torch.zeros(0, 3), target[:0])) == 0


def drawn(objective: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The captions shown and the positions hidden for Noise(0, 0), without ITM."""
    noise, length = Noise(0, 0, CPU), batch.input_ids.shape[1]
    kinds = (objective.continuation, objective.special)
    draw = noise.rand(len(batch.input_ids), 40)[:, :length]
    ratio = objective.config.text_mask
    hidden = mask_words(batch.input_ids, batch.attention_mask, *kinds, draw, ratio)
    choice = noise.rand(len(batch.input_ids), 40, 2)[:, :length]
    special, mask_id = objective.special, objective.mask_id
    return replace_hidden(batch.input_ids, hidden, special, choice, mask_id), hidden


@ALPHAS
def test_mlm_is_the_slow_formula(alpha: float) -> None:
    objective, batch = apart(make(alpha=alpha, text_mask=0.3)), some(IDS)
    shown, hidden = drawn(objective, batch)
    size = objective.model.config.vocab_size
    counts = torch.ones(size).double() + torch.bincount(batch.input_ids[hidden], minlength=size)
    frequency = (counts / counts.sum()).float()
    terms, guesses = [], []
    for row, place in hidden.nonzero().tolist():
        logits = []
        for model, head in (
            (objective.model, objective.mlm_head),
            (objective.target.module, objective.head_target.module),
        ):
            real = batch.attention_mask[row : row + 1]
            tokens = model.encode_image(batch.image[row : row + 1]).tokens
            words = model.text_encoder(shown[row : row + 1], real)
            fused = model.fuse(tokens, None, words, real).text[0, place]
            logits.append(head(fused, model.text_encoder.word_embeddings))
        hard = [0.0] * size
        hard[int(batch.input_ids[row, place])] = 1.0
        target = blend(hard, logits[1].detach(), alpha)
        terms.append(divergence(logits[0], target))
        guesses.append(float(divergence(frequency.log(), target)))
    values, trivial = objective(batch, Noise(0, 0, CPU), {"mlm"})
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(values["mlm"], expected, rtol=1e-4, atol=1e-5)
    assert float(trivial["mlm"]) == pytest.approx(sum(guesses) / len(guesses), rel=1e-4)
    assert_same_gradient(objective, values["mlm"], expected)


def test_hidden_words_are_shown_as_bert_shows_them() -> None:
    special = torch.zeros(20, dtype=torch.bool)
    special[:5] = True
    ids = torch.randint(5, 20, (50, 400), generator=torch.Generator().manual_seed(0))
    noise = torch.rand((50, 400, 2), generator=torch.Generator().manual_seed(1))
    hidden = torch.rand((50, 400), generator=torch.Generator().manual_seed(2)) < 0.5
    shown = replace_hidden(ids, hidden, special, noise, mask_id=4)
    assert torch.equal(shown[~hidden], ids[~hidden])
    now, before = shown[hidden], ids[hidden]
    masked = now == 4
    assert float(masked.float().mean()) == pytest.approx(0.8, abs=0.02)
    # One in fifteen of the other tokens is the same one by chance.
    same = (now == before).float().mean()
    assert float(same) == pytest.approx(0.1 + 0.1 / 15, abs=0.015)
    others = now[~masked & (now != before)].bincount(minlength=20)
    assert not bool(others[:5].any()) and bool(others[5:].all())


def test_a_picture_is_no_negative_of_its_own_captions() -> None:
    objective = make()
    objective(some([0, 1, 0, 0]), Noise(0, 0, CPU), {"itm"})
    with pytest.raises(UserError, match="too few other pictures"):
        objective(some([2, 2, 2, 2]), Noise(0, 0, CPU), {"itm"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fusion": "none"}, "albef matches pairs in a fusion encoder"),
        ({"queue_size": -1}, "options.queue_size must be 0 or more"),
        ({"alpha_steps": -5}, "options.alpha_steps must be 0 or more"),
        ({"alpha": 1.5}, "options.alpha must be from 0 to 1"),
        ({"ema_decay": -0.1}, "options.ema_decay must be from 0 to 1"),
        ({"text_mask": 0.0}, "options.text_mask must be between 0 and 1"),
        ({"itm_negatives": 0}, "options.itm_negatives is 0, and must be above 0"),
        ({"queue_size": 4.5}, "options.queue_size is 4.5, not a whole number"),
        ({"queue": 8}, "did you mean 'queue_size'?"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(**options)
    assert words in str(caught.value)
