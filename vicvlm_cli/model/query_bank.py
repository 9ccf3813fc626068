"""Hubs: gallery rows that lie near every query, and what a bank of queries takes off their scores.

In many dimensions a few pictures (or captions) are close to whatever is asked, and stand before the
right answer of many queries (Radovanović et al., JMLR 11, 2010). How close a gallery row is to
queries that have nothing to do with it is measured on captions and pictures of the training split,
and taken off: the inverted softmax (Smith et al., arXiv 1702.03859), QB-Norm (arXiv 2112.12777).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicvlm_cli.model.vlm import RerankWeights

SHARPNESS = 10.0  # inverse temperature of the mean over the bank, for cosines
BLOCK = 4096  # gallery rows at a time: memory is BLOCK x bank


@dataclass(frozen=True)
class QueryBank:
    """Features of unit length of training captions ``texts`` [N, P] and pictures ``images`` [M, P].

    ``weights``: what is taken off in each direction of search, 0 (nothing) to 1 (all); None where
    they have yet to be chosen on validation.
    """

    texts: Tensor
    images: Tensor
    weights: RerankWeights | None = None

    def at(self, weights: RerankWeights) -> QueryBank:
        """The same bank with ``weights``."""
        return replace(self, weights=weights)

    def off_images(self, images: Tensor) -> Tensor:
        """What to take off the scores of pictures [G, P] for any caption that looks for them: [G].

        Raises ValueError without weights.
        """
        return self._off(images, self.texts, 0)

    def off_texts(self, texts: Tensor) -> Tensor:
        """What to take off the scores of captions [G, P] for any picture that looks for them."""
        return self._off(texts, self.images, 1)

    def _off(self, gallery: Tensor, queries: Tensor, direction: int) -> Tensor:
        if self.weights is None:
            raise ValueError("the weights of the query bank have not been chosen")
        weight = self.weights[direction]
        return weight * hubness(gallery, queries) if weight else torch.zeros(len(gallery))


def hubness(gallery: Tensor, queries: Tensor) -> Tensor:
    """How close gallery rows [G, P] are to ``queries`` [N, P] that ask for something else: [G].

    The logarithm of the mean of exp(SHARPNESS * cosine) over the queries, by SHARPNESS: between
    their mean cosine and the highest.
    """
    queries = queries.to(gallery.dtype)
    rows = [
        torch.logsumexp(SHARPNESS * (part @ queries.T), dim=1)  # [BLOCK]
        for part in gallery.split(BLOCK)
    ]
    return (torch.cat(rows) - math.log(len(queries))) / SHARPNESS


def with_discount(queries: Tensor, gallery: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [Q, P + 1] and gallery [G, P + 1] whose inner products are the cosines less ``off``.

    Whatever compares features by their inner product thus takes it into account.
    """
    one = queries.new_ones(len(queries), 1)
    return torch.cat([queries, one], 1), torch.cat([gallery, -off.to(gallery.dtype)[:, None]], 1)
