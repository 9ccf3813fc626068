from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vicvlm_cli.evaluation.recall import (
    adverse,
    best_positive,
    choose_bank_weights,
    evaluate_features,
    ranks,
    recall,
    similarity,
)
from vicvlm_cli.model.query_bank import QueryBank, hubness
from vicvlm_cli.model.vlm import RerankWeights


def test_a_bank_takes_off_what_it_says_in_each_direction():
    image, text, of = seeded(5, 40, 2, 8, 1.5)
    others, captions, own = seeded(6, 30, 2, 8, 1.5)
    bank = QueryBank(captions, others, own, RerankWeights(1.0, 0.5))
    whole = evaluate_features(image, text, of, bank=bank)
    at = torch.arange(40)
    looking = similarity(text, image) - hubness(image, captions)
    asking = similarity(image, text) - 0.5 * hubness(text, others)
    assert whole.image_retrieval == recall(torch.tensor(slow_ranks(looking, of, at)))
    assert whole.text_retrieval == recall(torch.tensor(slow_ranks(asking, at, of)))
    plain = evaluate_features(image, text, of)
    assert evaluate_features(image, text, of, bank=bank.at(RerankWeights())) == plain != whole


@pytest.mark.parametrize("seed", range(4))
def test_a_banks_weights_lower_no_recall_at_1(seed):
    image, text, of = seeded(seed, 40, 2, 8, 1.5)
    others, captions, own = seeded(seed + 10, 30, 2, 8, 1.5)
    bank = QueryBank(captions, others, own)
    weights = choose_bank_weights(image, text, of, bank)
    plain, chosen = (
        evaluate_features(image, text, of, bank=bank.at(w)) for w in (RerankWeights(), weights)
    )
    for way in ("image_retrieval", "text_retrieval"):
        of_plain, of_chosen = getattr(plain, way), getattr(chosen, way)
        assert of_chosen.r1 >= of_plain.r1 and of_chosen.sum >= of_plain.sum


def test_a_banks_weights_are_those_that_help():
    axis = torch.eye(64)
    common = 2 * axis[63]
    image = axis[:20] + common
    text = 0.3 * axis[:20] + 0.95 * axis[20:40] + common
    image[0] = text[0] = axis[63]  # hubs: near everything, nearer than what belongs together
    others = F.normalize(axis[40:60] + common, dim=1)
    bank = QueryBank(others, others.roll(1, 0), torch.arange(20))
    pair = F.normalize(image, dim=1), F.normalize(text, dim=1), torch.arange(20)
    plain = evaluate_features(*pair)
    assert plain.image_retrieval.r1 == plain.text_retrieval.r1 == 5  # the hubs themselves
    weights = choose_bank_weights(*pair, bank)
    assert weights.image_retrieval > 0 and weights.text_retrieval > 0
    assert evaluate_features(*pair, bank=bank.at(weights)).rsum == 600
    # Where there is nothing to gain, nothing is taken off.
    assert choose_bank_weights(axis, axis, torch.arange(64), bank) == (0, 0)


def seeded(seed: int, images: int, captions: int, dim: int, noise: float):
    """Random image features and captions that lie around their image."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((images, dim))
    text = np.repeat(image, captions, 0) + noise * rng.standard_normal((images * captions, dim))
    of = torch.arange(images).repeat_interleave(captions)
    return *(F.normalize(torch.tensor(x), dim=1).float() for x in (image, text)), of


def slow_ranks(scores, query_group, gallery_group):
    """One query at a time, by counting."""
    found = []
    for row, group in zip(np.asarray(scores), query_group.tolist(), strict=True):
        positive = np.asarray(gallery_group) == group
        best = max((s for s in row[positive] if not np.isnan(s)), default=-np.inf)
        before = sum(1 for s in row[~positive] if np.isnan(s) or s >= best)
        found.append(1 + before)
    return found


# Figures on which ALBEF's itm_eval, CLIP_benchmark and (the first case) VSE++ agree:
# text retrieval R@1, 5, 10, image retrieval R@1, 5, 10.
AGREED = [
    ((1, 200, 5, 32, 1.6), (88.5, 100.0, 100.0, 71.6, 89.9, 93.7)),
    ((3, 50, 1, 8, 1.5), (16.0, 64.0, 80.0, 18.0, 62.0, 80.0)),
    ((4, 12, 2, 4, 1.5), (25.0, 275 / 3, 100.0, 137.5 / 3, 87.5, 100.0)),
]


@pytest.mark.parametrize(("case", "expected"), AGREED)
@pytest.mark.parametrize("block", [61, 5000])
def test_figures_of_public_implementations(case, expected, block):
    metrics = evaluate_features(*seeded(*case), block=block)
    text, image = metrics.text_retrieval, metrics.image_retrieval
    figures = (text.r1, text.r5, text.r10, image.r1, image.r5, image.r10)
    assert figures == pytest.approx(expected, abs=1e-9)
    assert metrics.rsum == pytest.approx(sum(expected))
    assert (metrics.images, metrics.captions) == (case[1], case[1] * case[2])


def test_mean_and_median_rank_of_vsepp():
    metrics = evaluate_features(*seeded(1, 200, 5, 32, 1.6))
    text, image = metrics.text_retrieval, metrics.image_retrieval
    assert (text.median_rank, image.median_rank) == (1.0, 1.0)
    assert (text.mean_rank, image.mean_rank) == pytest.approx((1.175, 3.091))
    assert (text.queries, image.queries) == (200, 1000)


SAME = [
    [0, 0, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.3, 0.2, 0, 0],
]
FAR_I2T = [
    [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0.8, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
]
FAR_T2I = [
    [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.1, 0.1],
    [0.5, 0.4, 0, 0, 0.4, 0.2, 0.6, 0.4],
    [0.5, 0.4, 0.1, 0.5, 0, 0.8, 0.8, 0.3],
    [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
]


@pytest.mark.parametrize(
    ("distance", "to_text", "expected"),
    [
        (SAME, True, (100, 100, 100)),
        (FAR_I2T, True, (50, 75, 100)),
        (SAME, False, (100, 100, 100)),
        (FAR_T2I, False, (37.5, 100, 100)),
    ],
)
def test_figures_of_big_vision(distance, to_text, expected):
    scores, of = -torch.tensor(distance), torch.arange(4).repeat_interleave(2)
    if to_text:
        found = recall(ranks(scores, torch.eye(8), torch.arange(4), of))
    else:
        found = recall(ranks(scores.T, torch.eye(4), of, torch.arange(4)))
    assert (found.r1, found.r5, found.r10) == expected


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_ties_and_uneven_groups_match_the_slow_reference(block):
    generator = torch.Generator().manual_seed(5)
    # Few distinct values: most scores tie with another.
    queries = torch.randint(-1, 2, (23, 3), generator=generator).float()
    gallery = torch.randint(-1, 2, (31, 3), generator=generator).float()
    query_group = torch.randint(0, 9, (23,), generator=generator)
    gallery_group = torch.randint(0, 9, (31,), generator=generator)
    gallery[4] = torch.nan
    found = ranks(queries, gallery, query_group, gallery_group, block)
    slow = slow_ranks(similarity(queries, gallery), query_group, gallery_group)
    assert found.tolist() == slow
    assert len(set(slow)) > 5


def test_a_collapsed_model_finds_nothing():
    image = F.normalize(torch.ones(40, 17), dim=1)
    metrics = evaluate_features(image, image.repeat(3, 1), torch.arange(40).repeat(3))
    assert metrics.rsum == 0
    assert metrics.image_retrieval.median_rank == 40
    assert metrics.text_retrieval.median_rank == 118  # 120 captions, 3 of them right


def test_equal_rows_tie_wherever_they_stand():
    row = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    scores = similarity(torch.randn(5, 256), row.expand(1003, -1))
    assert (scores == scores[:, :1]).all()


def test_nan_counts_against_the_model():
    image, text = torch.eye(3), torch.eye(3)
    text[1] = torch.nan
    metrics = evaluate_features(image, text, torch.arange(3))
    # The broken caption finds nothing, and stands before every picture's own.
    assert metrics.image_retrieval.r1 == pytest.approx(200 / 3)
    assert metrics.image_retrieval.mean_rank == pytest.approx((1 + 3 + 1) / 3)
    assert metrics.text_retrieval.r1 == 0
    broken = torch.full((3, 3), torch.nan)
    assert ranks(broken, image, torch.arange(3), torch.arange(3)).tolist() == [3, 3, 3]


def test_a_query_without_positives_is_never_found():
    found = ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 7]), torch.arange(2))
    assert found.tolist() == [1, 3]


def test_adverse_steps_are_smaller_than_any_difference():
    scores = torch.tensor([[0.0, 1e-30, -1.0, 1.0]]).float()
    above = torch.nextafter(scores, torch.tensor(torch.inf))
    lowered = adverse(scores, torch.ones(1, 4, dtype=torch.bool))
    assert (lowered < adverse(scores, torch.zeros(1, 4, dtype=torch.bool))).all()
    below = torch.nextafter(scores, torch.tensor(-torch.inf)).double()
    assert (lowered > below).all()
    assert (adverse(above, torch.ones(1, 4, dtype=torch.bool)) > scores.double()).all()
    assert (lowered.float() == scores).all()


def test_recall_of_an_even_number_and_of_none():
    found = recall(torch.tensor([1, 2, 5, 11]))
    assert (found.r1, found.r5, found.r10, found.median_rank) == (25, 75, 75, 3.5)
    with pytest.raises(ValueError, match="no queries"):
        recall(torch.tensor([]))


def test_memory_is_bounded_by_the_block(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "vicvlm_cli.evaluation.recall.similarity",
        lambda q, g: seen.append((len(q), len(g))) or similarity(q, g),
    )
    evaluate_features(*seeded(2, 30, 3, 4, 1.0), block=16)
    assert max(max(shape) for shape in seen) <= 16


def test_the_best_positive_is_found_among_its_own_group_alone():
    g = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(30, 4, generator=g), torch.randn(50, 4, generator=g)
    query_group = torch.randint(0, 12, (30,), generator=g)
    gallery_group = torch.randint(3, 12, (50,), generator=g)  # queries of 0 to 2 have no positive
    gallery[5] = torch.nan
    best = best_positive(queries, gallery, query_group, gallery_group)
    scores = similarity(queries, gallery)
    positive = (query_group[:, None] == gallery_group) & ~scores.isnan()
    slow = scores.masked_fill(~positive, -torch.inf).amax(1)
    assert torch.equal(best, slow) and (best == -torch.inf).any()
