"""What masked image modelling predicts of each patch: pixels or features, standardised."""

from __future__ import annotations

from torch import Tensor


def standardize_patches(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Each channel of [B, N, D] to mean 0 and variance 1 over the patches of its own picture.

    The instance normalisation of data2vec 2.0 targets (arXiv 2212.07525, sec. 3.2): what all
    patches of a picture share is gone, so that it cannot be what a predictor learns.
    """
    x = x.float()
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + eps).sqrt()


def patchify(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels [B, 3, H, W] by patch, [B, N, 3 * p * q], in the order of the patch embedding."""
    b, c, height, width = image.shape
    p, q = height // grid[0], width // grid[1]
    x = image.reshape(b, c, grid[0], p, grid[1], q).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, grid[0] * grid[1], c * p * q)  # [B, N, C * p * q]


def normalized_pixels(image: Tensor, grid: tuple[int, int], eps: float = 1e-6) -> Tensor:
    """Pixels by patch, each patch at mean 0 and variance 1 (MAE, arXiv 2111.06377, sec. 3)."""
    x = patchify(image.float(), grid)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
