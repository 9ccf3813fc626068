"""Hubs: gallery rows that lie near every query, and what a bank of queries takes off their scores.

In many dimensions a few pictures (or captions) are close to whatever is asked, and stand before the
right answer of many queries (Radovanović et al., JMLR 11, 2010). How close a gallery row is to
queries that have nothing to do with it is measured on captions and pictures of the training split,
and taken off: the inverted softmax (Smith et al., arXiv 1702.03859), QB-Norm (arXiv 2112.12777).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vicvlm_cli.model.vlm import RerankWeights

SHARPNESS = 10.0  # inverse temperature of the mean over the bank, for cosines
BLOCK = 2048  # gallery rows at a time: memory is BLOCK x bank
# Cosine from which two features are of one picture or caption, perhaps encoded in other precision.
# Of two that are merely alike it may be above 0.98: leaving those out as well cost drawn scenes
# what the bank gains.
SAME = 0.999
# From another file, or in other views, the same picture is at 0.9 to 0.998, but its distance,
# 1 - cosine, is less than a third of that to the next picture of the bank (Lowe, IJCV 60, 2004).
# It was found to tell 96 % and more of 400 photographs in a bank of 1,000.
NEARER = 1 / 3


@dataclass(frozen=True)
class QueryBank:
    """Features of unit length of training captions ``texts`` [N, P] and pictures ``images`` [M, P].

    ``text_image`` long [N]: which of these pictures each caption is of. ``weights``: what is taken
    off in each direction of search, 0 (nothing) to 1 (all); None where they have yet to be chosen
    on validation.
    """

    texts: Tensor
    images: Tensor
    text_image: Tensor
    weights: RerankWeights | None = None

    def at(self, weights: RerankWeights) -> QueryBank:
        """The same bank with ``weights``."""
        return replace(self, weights=weights)

    def off_images(self, images: Tensor, anew: bool = False) -> Tensor:
        """What to take off the scores of pictures [G, P] for any caption that looks for them: [G].

        A picture that is in the bank is not measured by its own captions: the pictures that a model
        was trained on are often those that it is to find. ``anew``: they may have been encoded from
        other files or in other views than the bank's. Raises ValueError without weights.
        """

        def own(rows: Tensor) -> Tensor:
            cosines = rows @ self.images.T  # [B, M]
            same = cosines > SAME
            if anew:
                best, at = cosines.topk(min(2, len(self.images)), dim=1)
                nearer = 1 - best[:, :1] < NEARER * (1 - best[:, -1:])
                same |= torch.zeros_like(same).scatter(1, at[:, :1], nearer)
            return same[:, self.text_image]  # [B, N]

        return self._off(images, self.texts, own, 0)

    def off_texts(self, texts: Tensor) -> Tensor:
        """What to take off the scores of captions [G, P] for any picture that looks for them: [G].

        A caption that is in the bank is not measured by its own picture, as in :meth:`off_images`.
        """

        def own(rows: Tensor) -> Tensor:
            same = (rows @ self.texts.T > SAME).float()  # [B, N]
            return (
                same.new_zeros(len(rows), len(self.images))
                .index_add(1, self.text_image, same)
                .bool()
            )  # [B, M]

        return self._off(texts, self.images, own, 1)

    def _off(
        self, gallery: Tensor, queries: Tensor, own: Callable[[Tensor], Tensor], direction: int
    ) -> Tensor:
        if self.weights is None:
            raise ValueError("the weights of the query bank have not been chosen")
        weight = self.weights[direction]
        if not weight:
            return torch.zeros(len(gallery))
        blocks = gallery.float().split(BLOCK)
        return weight * torch.cat([hubness(rows, queries, own(rows)) for rows in blocks])


def hubness(gallery: Tensor, queries: Tensor, own: Tensor | None = None) -> Tensor:
    """How close gallery rows [G, P] are to ``queries`` [N, P] that ask for something else: [G].

    The logarithm of the mean of exp(SHARPNESS * cosine) over the queries, by SHARPNESS: between
    their mean cosine and the highest. Queries that are a row's ``own`` (bool [G, N]) do not count;
    0 where no others are left.
    """
    # In float64, so that equal rows get equal values wherever they stand: see recall.similarity.
    cosines = gallery.double() @ queries.double().T  # [G, N]
    count = torch.full((len(gallery),), len(queries))
    if own is not None:
        cosines = cosines.masked_fill(own, -torch.inf)
        count = (~own).sum(1)
    soft = (torch.logsumexp(SHARPNESS * cosines, dim=1) - count.double().log()) / SHARPNESS
    return torch.where(count > 0, soft, 0.0).float()


def with_discount(queries: Tensor, gallery: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [Q, P + 1] and gallery [G, P + 1] whose inner products are the cosines less ``off``.

    Whatever compares features by their inner product thus takes it into account.
    """
    one = queries.new_ones(len(queries), 1)
    return torch.cat([queries, one], 1), torch.cat([gallery, -off.to(gallery.dtype)[:, None]], 1)
