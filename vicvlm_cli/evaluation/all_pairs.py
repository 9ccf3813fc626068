"""Every picture scored with every caption: what a shortlist leaves out, at its full cost."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from vicvlm_cli.evaluation.recall import BLOCK, RetrievalMetrics, adverse, metrics, similarity
from vicvlm_cli.evaluation.rerank import match_pairs
from vicvlm_cli.evaluation.tokens import SplitFeatures
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights, RetrievalModel
from vicvlm_cli.report.progress import Progress

SAMPLE = 256  # pairs timed for the estimate, after as many to warm up
PAIRS = 2**20  # of one call, at most: what is held of a pair beside its score


def ranks_by_score(
    scores: Tensor,
    query_group: Tensor,
    gallery_group: Tensor,
    off: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """The ranks of `recall.ranks`, from scores [Q, G], less ``off`` [G], in place of features."""
    found = []
    for rows, group in zip(scores.split(block), query_group.split(block), strict=True):
        rows = rows if off is None else rows - off
        positive = group[:, None] == gallery_group
        keys = adverse(rows, positive)
        best = keys.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        found.append(((keys > best) & ~positive).sum(1) + 1)
    return torch.cat(found)


def expected_minutes(vlm: RetrievalModel, features: SplitFeatures, precision: str) -> float:
    """What all pairs would take, from timing a few, drawn evenly."""
    images, texts = len(features.image), len(features.text)
    sample = torch.linspace(0, images * texts - 1, SAMPLE).long()
    started = 0.0
    for _ in range(2):  # the first is to warm up
        started = time.perf_counter()
        match_pairs(
            vlm,
            features,
            sample // texts,
            sample % texts,
            precision=precision,
            progress=Progress(quiet=True),
        )
    return (time.perf_counter() - started) / SAMPLE * images * texts / 60


def evaluate_all_pairs(
    vlm: RetrievalModel,
    features: SplitFeatures,
    weights: RerankWeights,
    bank: QueryBank | None = None,
    *,
    precision: str = "auto",
    progress: Progress,
) -> RetrievalMetrics:
    """The table with every pair scored; first says how many pairs and how long it will take.

    Memory: for each of the weights the scores, [I, T] in float32, and a bounded number of pairs at
    a time.

    Args:
        weights: of the pair score beside the similarity; of no account where it stands alone.
        bank: whose discounts come off the similarity.

    Raises ValueError where `features` were made without tokens, or the model cannot match.
    """
    if vlm.pair_score is None:
        raise ValueError("scoring pairs needs a model that can match")
    images, texts = len(features.image), len(features.text)
    minutes = expected_minutes(vlm, features, precision)
    progress.say(
        f"all pairs: {images:,} pictures x {texts:,} captions = {images * texts:,} pairs, about "
        f"{minutes:,.1f} minutes (Ctrl-C stops; without --all-pairs a shortlist is scored)"
    )
    scores = {weight: torch.empty(images, texts) for weight in weights}
    with progress.bar("all pairs", images, "images") as bar:
        for rows in torch.arange(images).split(max(1, PAIRS // texts)):
            logits = match_pairs(
                vlm,
                features,
                rows.repeat_interleave(texts),
                torch.arange(texts).repeat(len(rows)),
                precision=precision,
                progress=progress,
            ).view(len(rows), texts)
            cosine = similarity(features.image[rows], features.text)
            for given, score in scores.items():
                scale, weight = vlm.pair_score.weights(vlm.similarity_scale, given)
                score[rows] = (scale * cosine.double() + weight * logits.double()).float()
            bar.advance(len(rows))
    of = torch.arange(images)
    off_images = off_texts = None
    if bank is not None:
        scale, _ = vlm.pair_score.weights(vlm.similarity_scale, 0.0)
        off_images = scale * bank.off_images(features.image)
        off_texts = scale * bank.off_texts(features.text)
    looking, asking = scores[weights.image_retrieval].T, scores[weights.text_retrieval]
    return metrics(
        ranks_by_score(looking, features.text_image, of, off_images),
        ranks_by_score(asking, of, features.text_image, off_texts),
    )
