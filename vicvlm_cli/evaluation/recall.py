"""Retrieval metrics: ranks, recall at K, RSUM; ties and NaN count against the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vicvlm_cli.model.query_bank import QueryBank, with_discount
from vicvlm_cli.model.vlm import RerankWeights

BANK_WEIGHTS = (0.0, 0.5, 1.0)
BLOCK = 512  # a side; in float64 2 MB, of which ranking holds several


def similarity(queries: Tensor, gallery: Tensor) -> Tensor:
    """Inner products [Q, G] in float64, rounded to float32.

    A float32 product depends on where a row lies in the tile; rounding the float64 one gives
    equal rows equal scores, so that a tie is seen as a tie.
    """
    return (queries.double() @ gallery.double().T).float()


def adverse(scores: Tensor, positive: Tensor) -> Tensor:
    """float64 keys under which every positive sorts after the negatives that it ties with.

    `positive` is a bool mask of the shape of `scores`. A positive moves down by one step of
    float64, which is less than any difference between float32 scores. NaN is the best
    key for a negative and the worst for a positive.
    """
    keys = torch.nan_to_num(scores.double(), nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own = scores[positive].double()  # few
    lowest = own.new_tensor(-torch.inf)
    keys[positive] = torch.nextafter(torch.where(own.isnan(), lowest, own), lowest)
    return keys


def best_positive(
    queries: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor
) -> Tensor:
    """The score [Q] of each query's best-scoring positive, -inf where there is none or all are NaN.

    Only the pairs of one group are computed; the arguments are those of `ranks`.
    """
    order = gallery_group.argsort(stable=True)
    groups = gallery_group[order]
    first = torch.searchsorted(groups, query_group)
    count = torch.searchsorted(groups, query_group, right=True) - first
    query = torch.arange(len(queries)).repeat_interleave(count)
    place = torch.arange(len(query)) - (count.cumsum(0) - count)[query]  # among the query's own
    pair = order[first[query] + place]
    scores = (queries[query].double() * gallery[pair].double()).sum(1).float()
    best = torch.full((len(queries),), -torch.inf)
    return best.scatter_reduce(0, query, scores.nan_to_num(nan=-torch.inf), "amax")


def ranks(
    queries: Tensor,
    gallery: Tensor,
    query_group: Tensor,
    gallery_group: Tensor,
    block: int = BLOCK,
) -> Tensor:
    """The 1-based rank [Q] of each query's best-scoring positive in the gallery.

    queries [Q, P], gallery [G, P]; a gallery row is positive for a query of the same group
    (long [Q] and [G]). Every negative that does not score strictly below the best positive comes
    before it. A query without any positive gets rank G + 1. Memory: block x block scores.
    """
    found = []
    for rows, group in zip(queries.split(block), query_group.split(block), strict=True):
        best = best_positive(rows, gallery, group, gallery_group)[:, None]
        before = torch.zeros(len(rows), dtype=torch.long)
        for part, part_group in zip(gallery.split(block), gallery_group.split(block), strict=True):
            wins = ~(similarity(rows, part) < best)  # NaN too
            before += (wins & (group[:, None] != part_group)).sum(1)
        found.append(before + 1)
    return torch.cat(found)


@dataclass(frozen=True)
class Recall:
    """Recall at 1, 5 and 10 in percent, the median and mean rank, over `queries` queries."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    queries: int

    @property
    def sum(self) -> float:
        """Of the three recalls (300 is perfect)."""
        return self.r1 + self.r5 + self.r10


def recall(ranks: Tensor) -> Recall:
    """Recall figures of 1-based ranks [Q]: the share of queries with a match in the top K.

    The median of an even number of ranks is the mean of the middle two (VSE++ rounds it down).
    Raises ValueError without ranks.
    """
    if len(ranks) == 0:
        raise ValueError("no queries to evaluate")
    ordered = ranks.double().sort().values
    middle = ordered[[(len(ordered) - 1) // 2, len(ordered) // 2]].mean()
    r1, r5, r10 = (100 * int((ranks <= k).sum()) / len(ranks) for k in (1, 5, 10))
    return Recall(
        r1=r1,
        r5=r5,
        r10=r10,
        median_rank=middle.item(),
        mean_rank=ordered.mean().item(),
        queries=len(ranks),
    )


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions: text queries over images, image queries over texts."""

    image_retrieval: Recall
    text_retrieval: Recall
    images: int
    captions: int

    @property
    def rsum(self) -> float:
        """The sum of the six recalls (600 is perfect)."""
        return self.image_retrieval.sum + self.text_retrieval.sum

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {**asdict(self), "rsum": self.rsum}


def metrics(image_ranks: Tensor, text_ranks: Tensor) -> RetrievalMetrics:
    """Metrics from the ranks of text queries [T] (the image's rank) and image queries [I]."""
    return RetrievalMetrics(
        image_retrieval=recall(image_ranks),
        text_retrieval=recall(text_ranks),
        images=len(text_ranks),
        captions=len(image_ranks),
    )


def evaluate_features(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    block: int = BLOCK,
    bank: QueryBank | None = None,
) -> RetrievalMetrics:
    """Metrics of image features [I, P] and text features [T, P].

    text_image [T] names each text's image (0 <= text_image < I); an image may have any number
    of texts. Features are compared by inner product: normalise them first for the cosine. With a
    `bank`, what it takes off hubs is taken off.
    """
    image = torch.arange(len(image_features))
    looking, pictures = for_images(image_features, text_features, bank)
    asking, texts = for_texts(image_features, text_features, bank)
    return metrics(
        ranks(looking, pictures, text_image, image, block),
        ranks(asking, texts, image, text_image, block),
    )


def for_images(image: Tensor, text: Tensor, bank: QueryBank | None) -> tuple[Tensor, Tensor]:
    """Captions [T, P] as queries, pictures [I, P] as gallery; with a bank, of P + 1 dimensions."""
    return (text, image) if bank is None else with_discount(text, image, bank.off_images(image))


def for_texts(image: Tensor, text: Tensor, bank: QueryBank | None) -> tuple[Tensor, Tensor]:
    """Pictures as queries, captions as gallery; otherwise as :func:`for_images`."""
    return (image, text) if bank is None else with_discount(image, text, bank.off_texts(text))


def best_harmless(recalls: dict[float, Recall]) -> float:
    """Of weights (0 among them) with their recalls that of the highest R@1 + R@5 + R@10.

    Of those that do not lower R@1; of equals the first.
    """
    harmless = [w for w, recall in recalls.items() if recall.r1 >= recalls[0.0].r1]
    return max(harmless, key=lambda w: recalls[w].sum)


def choose_bank_weights(
    image_features: Tensor, text_features: Tensor, text_image: Tensor, bank: QueryBank
) -> RerankWeights:
    """In each direction the best of :data:`BANK_WEIGHTS` on these data that lowers no R@1."""
    tables = {
        weight: evaluate_features(
            image_features, text_features, text_image, bank=bank.at(RerankWeights.of(weight))
        )
        for weight in BANK_WEIGHTS
    }
    return RerankWeights(
        best_harmless({w: table.image_retrieval for w, table in tables.items()}),
        best_harmless({w: table.text_retrieval for w, table in tables.items()}),
    )
