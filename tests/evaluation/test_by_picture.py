"""Pairs grouped by picture: each of them once, and scored as the model scores it."""

from __future__ import annotations

import pytest
import torch

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.evaluation import by_picture
from vicvlm_cli.evaluation.by_picture import batches_by_picture
from vicvlm_cli.evaluation.rerank import match_pairs, rerank
from vicvlm_cli.evaluation.tokens import encode_split
from vicvlm_cli.report.progress import Progress

QUIET = Progress(quiet=True)


@pytest.mark.parametrize("limit", [1, 400, 10**6])
@pytest.mark.parametrize("at_most", [3, 64])
def test_every_pair_is_in_one_batch_beside_its_like(limit, at_most, monkeypatch):
    monkeypatch.setattr(by_picture, "CAPTIONS", at_most)
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 7, (200,), generator=g)
    lengths = torch.randint(1, 30, (200,), generator=g)
    seen = []
    for pairs in batches_by_picture(image, lengths, 50, limit):
        pictures, captions = pairs.shape
        assert captions <= at_most
        assert all(len(image[row].unique()) == 1 for row in pairs)
        around = lengths[pairs.flatten()]
        assert (around.max() - around.min()) < by_picture.LENGTHS
        assert pictures == 1 or pictures * (50 + captions * int(around.max())) <= limit
        seen += pairs.unique().tolist()
    assert sorted(seen) == list(range(200))


@pytest.fixture(scope="module")
def cross_model(make_checkpoint):
    model = load_model(make_checkpoint(fusion="cross_attention"), device="cpu")
    model.precision = "no"
    return model


def encoded(model, split):
    return encode_split(
        model.vlm, model.tokenizer, split, device=model.device, precision="no", progress=QUIET
    )


def test_reranking_scores_are_those_of_each_pair_alone(cross_model, tiny_data, monkeypatch):
    monkeypatch.setattr(by_picture, "CAPTIONS", 4)
    split = PreparedDataset.open(tiny_data).split("test")
    captions = [caption for group in split.captions for caption in group]
    features = encoded(cross_model, split)
    scored = rerank(cross_model.vlm, features, top_k=5, precision="no", progress=QUIET)
    for t in range(0, 60, 7):
        for k in range(5):
            i = int(scored.images.index[t, k])
            cosine = cross_model.logit_scale * (features.image[i] @ features.text[t])
            alone = cross_model.score_pairs([split.image(i)], [captions[t]])
            score = cosine + 0.5 * scored.image_logit[t, k]
            assert score.item() == pytest.approx(alone.item(), abs=1e-4)


def test_no_pairs_have_no_scores(cross_model, tiny_data):
    features = encoded(cross_model, PreparedDataset.open(tiny_data).split("val"))
    none = torch.empty(0, dtype=torch.long)
    assert len(match_pairs(cross_model.vlm, features, none, none, progress=QUIET)) == 0
