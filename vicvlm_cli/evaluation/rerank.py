"""Re-ranking: the top k candidates by similarity, ordered by the model's own score of pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicvlm_cli.evaluation.by_picture import match_by_picture
from vicvlm_cli.evaluation.recall import (
    BLOCK,
    RetrievalMetrics,
    adverse,
    best_harmless,
    for_images,
    for_texts,
    metrics,
    ranks,
    similarity,
)
from vicvlm_cli.evaluation.tokens import SplitFeatures
from vicvlm_cli.gallery.search import running_top_k
from vicvlm_cli.inference import inferring
from vicvlm_cli.model.fusion import CrossAttentionFusion
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import VLM, Encoded, RerankWeights, RetrievalModel
from vicvlm_cli.report.progress import Progress

TOP_K = 128
WEIGHTS = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
# Bounds of one batch of pairs, counting the gathered tokens in float32. A CPU is twice as fast
# where the batch stays in its cache.
MAX_PAIRS = 1024
TOKEN_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


@dataclass(frozen=True)
class Candidates:
    """The dual encoder's best k gallery rows for every query, and its own rank of the positive.

    index [Q, k] long, cosine [Q, k] float32, positive [Q, k] bool, dual_rank [Q] long.
    """

    index: Tensor
    cosine: Tensor
    positive: Tensor
    dual_rank: Tensor

    def ranks(self, logit: Tensor, scale: float, weight: float) -> Tensor:
        """Ranks [Q] with the candidates ordered by scale * cosine + weight * logit [Q, k].

        Candidates come before everything else, which keeps the dual order. Ties and NaN count
        against the model. Weight 0 gives `dual_rank` exactly.
        """
        if not weight:
            return self.dual_rank
        # In float64: scaling in float32 would make ties that the cosines do not have.
        combined = scale * self.cosine.double() + weight * logit.double()
        keys = adverse(combined, self.positive)
        best = keys.masked_fill(~self.positive, -torch.inf).amax(1, keepdim=True)
        before = ((keys > best) & ~self.positive).sum(1)
        return torch.where(self.positive.any(1), before + 1, self.dual_rank)


def candidates(
    queries: Tensor,
    gallery: Tensor,
    query_group: Tensor,
    gallery_group: Tensor,
    k: int,
    block: int = BLOCK,
) -> Candidates:
    """The top k by inner product, in blocks; arguments as in `recall.ranks`.

    At equal scores the negatives go first, so that a positive never becomes a candidate ahead of
    a negative that it ties with.
    """
    indices, cosines = [], []
    for rows, group in zip(queries.split(block), query_group.split(block), strict=True):
        parts = zip(gallery.split(block), gallery_group.split(block), strict=True)
        keys, index = running_top_k(
            (adverse(similarity(rows, part), group[:, None] == of) for part, of in parts), k
        )
        indices.append(index)
        cosines.append(keys.float())  # rounds the step that `adverse` took away again
    index = torch.cat(indices)
    return Candidates(
        index=index,
        cosine=torch.cat(cosines),
        positive=gallery_group[index] == query_group[:, None],
        dual_rank=ranks(queries, gallery, query_group, gallery_group, block),
    )


def match_pairs(
    vlm: RetrievalModel,
    features: SplitFeatures,
    image_index: Tensor,
    text_index: Tensor,
    *,
    precision: str = "auto",
    progress: Progress,
) -> Tensor:
    """The model's scores [n] of pairs (image_index [n], text_index [n]), in large batches.

    Pairs are taken by text length, so that padding is small, and in batches whose gathered
    tokens stay below a fixed number of bytes: memory does not grow with n.

    Raises ValueError where `features` were made without tokens.
    """
    images, texts = features.image_tokens, features.text_tokens
    if images is None or texts is None:
        raise ValueError("re-ranking needs features with tokens")
    if isinstance(vlm, VLM) and isinstance(vlm.fusion, CrossAttentionFusion):
        return match_by_picture(
            vlm, features, image_index, text_index, precision=precision, progress=progress
        )
    logits = torch.empty(len(image_index))
    order = texts.lengths[text_index].argsort(stable=True)
    limit = TOKEN_BYTES.get(images.device.type, TOKEN_BYTES["cpu"])
    at = 0
    with (
        progress.bar("re-ranking", len(order), "pairs") as bar,
        inferring(vlm, images.device, precision),  # around all: weights are cast to bf16 once
    ):
        while at < len(order):
            # Texts get longer: the batch is sized by the longest that could be in it.
            end = order[min(at + MAX_PAIRS, len(order)) - 1]
            tokens = int(images.lengths[image_index[end]] + texts.lengths[text_index[end]])
            size = min(MAX_PAIRS, max(1, limit // (4 * tokens * vlm.config.text_width)))
            rows = order[at : at + size]
            image, text = image_index[rows], text_index[rows]
            logit = vlm.match(
                Encoded(features.image[image].to(images.device), *images.gather(image)),
                Encoded(features.text[text].to(images.device), *texts.gather(text)),
            )
            logits[rows] = logit.float().cpu()
            at += len(rows)
            bar.advance(len(rows))
    return logits


@dataclass(frozen=True)
class Reranking:
    """Both directions' candidates with the scores of their pairs, computed once for any weight.

    images: for every text [T, k]; texts: for every image [I, k']; scale: what the cosine counts.
    """

    images: Candidates
    texts: Candidates
    image_logit: Tensor
    text_logit: Tensor
    scale: float

    @property
    def dual(self) -> RetrievalMetrics:
        """The table of the similarities alone, whose ranks were counted with the candidates."""
        return metrics(self.images.dual_rank, self.texts.dual_rank)

    def metrics(self, weights: RerankWeights | float) -> RetrievalMetrics:
        """The table with the pair scores at `weights`, one number for both directions or two."""
        weights = RerankWeights.of(weights)
        return metrics(
            self.images.ranks(self.image_logit, self.scale, weights.image_retrieval),
            self.texts.ranks(self.text_logit, self.scale, weights.text_retrieval),
        )

    @property
    def reach(self) -> tuple[float, float]:
        """Percent of texts and of images with a match among their candidates: no recall is more."""
        first, second = (100 * x.positive.any(1).double().mean() for x in (self.images, self.texts))
        return first.item(), second.item()

    def choose_weights(self, grid: tuple[float, ...] = WEIGHTS) -> RerankWeights:
        """In each direction the weight of the highest R@1 + R@5 + R@10 on these data.

        Of those that do not lower R@1; of equals the smallest. Only weights of ``grid`` are tried,
        and 0, the dual encoder's own order.
        """
        tables = {weight: self.metrics(weight) for weight in sorted({0.0, *grid})}
        return RerankWeights(
            best_harmless({w: table.image_retrieval for w, table in tables.items()}),
            best_harmless({w: table.text_retrieval for w, table in tables.items()}),
        )


def rerank(
    vlm: RetrievalModel,
    features: SplitFeatures,
    *,
    top_k: int = TOP_K,
    weights: RerankWeights | None = None,
    bank: QueryBank | None = None,
    precision: str = "auto",
    progress: Progress,
) -> Reranking:
    """Finds the top k of both directions and scores every pair among them once.

    A direction of weight 0 is left unscored: its order is that of the cosines in any case. Without
    ``weights`` both are scored. With a ``bank``, similarities are less what it takes off.

    Raises ValueError where `features` were made without tokens, or the model cannot match.
    """
    if vlm.pair_score is None:
        raise ValueError("re-ranking needs a model that can match")
    image_group = torch.arange(len(features.image))
    text_group = features.text_image
    sides = features.image, features.text, bank
    images = candidates(*for_images(*sides), text_group, image_group, top_k)
    texts = candidates(*for_texts(*sides), image_group, text_group, top_k)
    # A pair may be a candidate in both directions; it is one number, number = image * T + text.
    count = len(features.text)
    numbers = (
        (images.index * count + torch.arange(count)[:, None]).flatten(),
        (texts.index + image_group[:, None] * count).flatten(),
    )
    asked = [x if w else x[:0] for x, w in zip(numbers, weights or (1.0, 1.0), strict=True)]
    pairs, where = torch.cat(asked).unique(return_inverse=True)
    found = match_pairs(
        vlm,
        features,
        pairs // count,
        pairs % count,
        precision=precision,
        progress=progress,
    )[where]
    parts = found.split([len(x) for x in asked])
    first, second = (
        part if len(part) else torch.zeros(len(x)) for part, x in zip(parts, numbers, strict=True)
    )
    return Reranking(
        images=images,
        texts=texts,
        image_logit=first.view_as(images.index),
        text_logit=second.view_as(texts.index),
        scale=vlm.pair_score.weights(vlm.similarity_scale, 0.0)[0],
    )
