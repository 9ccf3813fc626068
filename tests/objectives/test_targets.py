"""Targets of masked image modelling against slow formulas."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vicvlm_cli.objectives import targets


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_standardized_patches() -> None:
    x = randn(2, 6, 3) * torch.tensor([0.1, 1.0, 5.0]) + 3
    got = targets.standardize_patches(x)
    for b in range(2):
        for d in range(3):
            channel = x[b, :, d].double()
            mean = channel.sum() / 6
            var = ((channel - mean) ** 2).sum() / 6
            expected = (channel - mean) / (var + 1e-5).sqrt()
            torch.testing.assert_close(got[b, :, d].double(), expected, rtol=1e-4, atol=1e-5)


def test_patches_come_in_the_order_of_the_patch_embedding() -> None:
    image = randn(2, 3, 8, 12)
    patches = targets.patchify(image, (2, 3))
    assert patches.shape == (2, 6, 48)
    # A convolution that copies one pixel of each patch, as the patch embedding is one.
    for channel, y, x in itertools.product(range(3), range(4), range(4)):
        kernel = torch.zeros(1, 3, 4, 4)
        kernel[0, channel, y, x] = 1
        picked = torch.conv2d(image, kernel, stride=4).flatten(1)  # [B, N]
        torch.testing.assert_close(patches[:, :, channel * 16 + y * 4 + x], picked)


def test_normalised_pixels() -> None:
    image = randn(2, 3, 8, 8) * 40 + 100
    pixels = targets.normalized_pixels(image, (2, 2))
    raw = targets.patchify(image, (2, 2))
    for b, n in itertools.product(range(2), range(4)):
        patch = raw[b, n].double()
        mean = patch.sum() / len(patch)
        var = ((patch - mean) ** 2).sum() / len(patch)
        expected = (patch - mean) / (var + 1e-6).sqrt()
        torch.testing.assert_close(pixels[b, n].double(), expected, rtol=1e-4, atol=1e-5)
    flat = targets.normalized_pixels(torch.full((1, 3, 8, 8), 7.0), (2, 2))
    assert not flat.any()  # a patch of one colour: zero, not NaN
