"""Pictures in files, and galleries that hold the same of them."""

from __future__ import annotations

import torch
from PIL import Image

from vicvlm_cli.gallery import Gallery


def draw(file, seed):
    """A picture that no other seed makes."""
    grey = torch.randint(256, (20, 30), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(grey.byte().numpy()).save(file)


def same(a, b):
    """Whether two galleries hold the same pictures and features, no two of which are alike."""
    a, b = Gallery.open(a), Gallery.open(b)
    assert torch.pdist(a.features).min() > 1e-3
    return list(a.items) == list(b.items) and torch.allclose(a.features, b.features, atol=1e-5)
