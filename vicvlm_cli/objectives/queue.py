"""A queue of features of earlier batches: candidates beyond the batch (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The last ``size`` features pushed, with the pictures they are of; the oldest make room.

    All of it is buffers, so that a resumed run finds them again. Slots that nothing was pushed to
    are never handed out. Every process must push the same rows in the same order: gather first.
    """

    features: Tensor
    image_id: Tensor
    pushed: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        rows = max(size, 1)  # an empty tensor does not survive the saving of a run's state
        self.register_buffer("features", torch.zeros(rows, width))
        self.register_buffer("image_id", torch.zeros(rows, dtype=torch.long))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    def filled(self) -> tuple[Tensor, Tensor]:
        """Features [K, width] and picture ids [K] in the order of the slots, K at most the size.

        They are views: what has to outlive the next push must be a copy.
        """
        number = min(int(self.pushed), self.size)
        return self.features[:number], self.image_id[:number]

    @torch.no_grad()
    def push(self, features: Tensor, image_id: Tensor) -> None:
        """Put in [G, width] features of pictures [G], the last of them where they are too many."""
        if self.size == 0:
            return
        features, image_id = features[-self.size :], image_id[-self.size :]
        place = torch.arange(len(features), device=self.features.device)
        place = (self.pushed + place) % self.size  # around the end, whatever the size of the batch
        self.features[place] = features.to(self.features.dtype)
        self.image_id[place] = image_id
        self.pushed += len(features)
