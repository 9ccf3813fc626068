from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.evaluation.recall import evaluate_features, ranks, similarity
from vicvlm_cli.evaluation.rerank import Reranking, candidates, match_pairs, rerank
from vicvlm_cli.evaluation.tokens import encode_split
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.progress import Progress

QUIET = Progress(quiet=True)


def random_problem(seed: int = 0, queries: int = 20, gallery: int = 33):
    """Features of few distinct values, so that ties are everywhere, and their groups."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randint(-1, 2, (queries, 3), generator=g).float(),
        torch.randint(-1, 2, (gallery, 3), generator=g).float(),
        torch.randint(0, 9, (queries,), generator=g),
        torch.randint(0, 9, (gallery,), generator=g),
    )


def slow_reranked(scores, logits, query_group, gallery_group, k, scale, weight):
    """Full sort, one query at a time; on equal scores negatives stand first."""
    found = []
    for q, row in enumerate(scores.double().tolist()):
        positive = (gallery_group == query_group[q]).tolist()
        dual = sorted(range(len(row)), key=lambda i: (-row[i], positive[i]))
        top = dual[:k]

        def combined(i, q=q, row=row):
            return scale * row[i] + weight * float(logits[q, i])

        order = sorted(top, key=lambda i: (-combined(i), positive[i])) + dual[k:]
        ahead = [positive[i] for i in order]
        found.append(ahead.index(True) + 1 if True in ahead else len(row) + 1)
    return found


@pytest.mark.parametrize("k", [1, 4, 33, 500])
@pytest.mark.parametrize("weight", [0.0, 0.7, 50.0])
def test_reranked_ranks_match_the_slow_reference(k, weight):
    queries, gallery, query_group, gallery_group = random_problem()
    # Logits of few values tie as well.
    logits = torch.randint(-2, 3, (20, 33), generator=torch.Generator().manual_seed(1)).float()
    found = candidates(queries, gallery, query_group, gallery_group, k, block=5)
    got = found.ranks(logits.gather(1, found.index), 2.5, weight)
    scores = similarity(queries, gallery)
    assert got.tolist() == slow_reranked(scores, logits, query_group, gallery_group, k, 2.5, weight)


@pytest.mark.parametrize("seed", range(5))
def test_weight_0_is_the_dual_table_ties_and_nan_included(seed):
    queries, gallery, query_group, gallery_group = random_problem(seed)
    gallery[3] = torch.nan
    queries[2] = torch.nan
    dual = ranks(queries, gallery, query_group, gallery_group)
    for k in (1, 3, 10, 33):
        found = candidates(queries, gallery, query_group, gallery_group, k, block=4)
        broken = torch.full(found.index.shape, torch.nan)
        assert torch.equal(found.ranks(broken, 14.3, 0.0), dual)


def test_nan_logits_count_against_the_model():
    found = candidates(torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(4), 3)
    assert found.ranks(torch.full((4, 3), torch.nan), 10.0, 1.0).tolist() == [3, 3, 3, 3]


def oracle_logits(index, query_group, gallery_group):
    return (gallery_group[index] == query_group[:, None]).float() * 10


def problem_with_helpful_itm():
    g = torch.Generator().manual_seed(3)
    image = F.normalize(torch.randn(40, 8, generator=g), dim=1)
    of = torch.arange(40).repeat_interleave(2)
    text = F.normalize(image[of] + 0.6 * torch.randn(80, 8, generator=g), dim=1)
    images = candidates(text, image, of, torch.arange(40), 10)
    texts = candidates(image, text, torch.arange(40), of, 10)
    return image, text, of, images, texts


def test_the_reach_is_what_a_perfect_score_would_recall():
    image, text, of, images, texts = problem_with_helpful_itm()
    right = oracle_logits(images.index, of, torch.arange(40))
    also = oracle_logits(texts.index, torch.arange(40), of)
    perfect = Reranking(images, texts, right, also, scale=0.0)
    table = perfect.metrics(1.0)
    expected = (table.image_retrieval.r1, table.text_retrieval.r1)
    assert perfect.reach == pytest.approx(expected) and min(expected) < 100


def test_the_chosen_weight_is_the_smallest_of_the_best():
    image, text, of, images, texts = problem_with_helpful_itm()
    dual = evaluate_features(image, text, of)
    right = oracle_logits(images.index, of, torch.arange(40))
    also = oracle_logits(texts.index, torch.arange(40), of)
    helpful = Reranking(images, texts, right, also, scale=10.0)
    weights = helpful.choose_weights()
    assert min(weights) > 0
    assert helpful.metrics(weights).rsum > dual.rsum
    smaller = helpful.metrics([weight / 2 for weight in weights])
    assert smaller.image_retrieval.sum < helpful.metrics(weights).image_retrieval.sum
    assert smaller.text_retrieval.sum < helpful.metrics(weights).text_retrieval.sum
    harmful = Reranking(images, texts, -right, -also, scale=10.0)
    assert harmful.choose_weights() == (0, 0)
    assert harmful.metrics(0.0) == dual
    # What helps one direction and harms the other is taken where it helps.
    mixed = Reranking(images, texts, right, -0.01 * also, scale=10.0)
    assert mixed.metrics(5.0).text_retrieval.r1 < dual.text_retrieval.r1
    chosen = mixed.choose_weights((5.0, 10.0))
    assert chosen.image_retrieval > 0 and chosen.text_retrieval == 0
    table = mixed.metrics(chosen)
    assert table.image_retrieval == mixed.metrics(chosen.image_retrieval).image_retrieval
    assert table.text_retrieval == dual.text_retrieval
    # Candidates only: what is not among the ten stays where it was.
    assert helpful.metrics(1e6).image_retrieval.r10 == dual.image_retrieval.r10


def encoded(model, split, **options):
    return encode_split(
        model.vlm,
        model.tokenizer,
        split,
        device=model.device,
        precision="no",
        progress=QUIET,
        **options,
    )


def test_every_pair_is_scored_as_the_model_scores_it_alone(tiny_model, tiny_data, monkeypatch):
    split = PreparedDataset.open(tiny_data).split("test")
    features = encoded(tiny_model, split, batch_size=5)
    captions = [caption for group in split.captions for caption in group]
    assert torch.allclose(features.text, tiny_model.encode_texts(captions, 1), atol=1e-5)
    assert features.text_image.tolist() == [i for i in range(12) for _ in range(5)]
    # A few pairs a batch, of texts of different lengths.
    monkeypatch.setattr("vicvlm_cli.evaluation.rerank.MAX_PAIRS", 3)
    image_index, text_index = torch.arange(12), torch.arange(12) * 5 % 59
    logits = match_pairs(
        tiny_model.vlm,
        features,
        image_index,
        text_index,
        precision="no",
        progress=QUIET,
    )
    pairs = zip(image_index.tolist(), text_index.tolist(), strict=True)
    for logit, (i, t) in zip(logits, pairs, strict=True):
        cosine = tiny_model.logit_scale * (features.image[i] @ features.text[t])
        alone = tiny_model.score_pairs([split.image(i)], [captions[t]])
        assert (cosine + 0.5 * logit).item() == pytest.approx(alone.item(), abs=1e-4)


def test_features_without_tokens_cannot_be_reranked(tiny_model, tiny_data):
    split = PreparedDataset.open(tiny_data).split("val")
    features = encoded(tiny_model, split, keep_tokens=False)
    with pytest.raises(ValueError, match="with tokens"):
        rerank(tiny_model.vlm, features, progress=QUIET)


def test_rerank_scores_each_wanted_pair_once(tiny_model, tiny_data, monkeypatch):
    split = PreparedDataset.open(tiny_data).split("test")
    features = encoded(tiny_model, split)
    scored = []

    def numbered(vlm, features, image_index, text_index, **_):
        scored.extend(zip(image_index.tolist(), text_index.tolist(), strict=True))
        return image_index * 1000.0 + text_index

    monkeypatch.setattr("vicvlm_cli.evaluation.rerank.match_pairs", numbered)
    found = rerank(tiny_model.vlm, features, top_k=4, progress=QUIET)
    assert len(scored) == len(set(scored)) < 60 * 4 + 12 * 4
    text = torch.arange(60)[:, None]
    assert torch.equal(found.image_logit, found.images.index * 1000.0 + text)
    image = torch.arange(12)[:, None]
    assert torch.equal(found.text_logit, image * 1000.0 + found.texts.index)
    dual = evaluate_features(features.image, features.text, features.text_image)
    assert found.metrics(0.0) == dual


@pytest.mark.parametrize("weights", [(0.7, 0.0), (0.0, 0.7)])
def test_a_direction_of_weight_0_is_not_scored(weights, tiny_model, tiny_data, monkeypatch):
    features = encoded(tiny_model, PreparedDataset.open(tiny_data).split("test"))
    given, scored = RerankWeights(*weights), []

    def counting(*arguments, **options):
        scored.append(len(arguments[2]))
        return match_pairs(*arguments, **options)

    monkeypatch.setattr("vicvlm_cli.evaluation.rerank.match_pairs", counting)
    options = {"top_k": 4, "precision": "no", "progress": QUIET}
    both = rerank(tiny_model.vlm, features, **options)
    one = rerank(tiny_model.vlm, features, weights=given, **options)
    assert one.metrics(given) == both.metrics(given) != both.dual
    queries = 60 if given.image_retrieval else 12
    assert scored[1] == 4 * queries < scored[0]
