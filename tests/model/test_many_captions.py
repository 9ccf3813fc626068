"""A picture read once for many captions gives what reading it with each of them gives."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model

from vicvlm_cli.model.fusion import CrossAttentionFusion
from vicvlm_cli.model.many_captions import begin_captions, fuse_captions


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_fusion_of_every_pair_alone(layers: int, masked: bool) -> None:
    model = make_model(fusion="cross_attention", fusion_layers=layers)
    fusion = model.fusion
    assert isinstance(fusion, CrossAttentionFusion)
    pictures, captions, length = 3, 4, 6
    image = torch.randn(pictures, 17, model.image_encoder.width)
    text = torch.randn(pictures, captions, length, 32)
    lengths = torch.randint(1, length + 1, (pictures, captions, 1))
    mask = torch.arange(length) < lengths
    image_mask = torch.rand(pictures, 17) < 0.6 if masked else None
    if image_mask is not None:
        image_mask[:, 0] = True
    with torch.inference_mode():
        begun = begin_captions(fusion, text.flatten(0, 1), mask.flatten(0, 1)).view_as(text)
        fused = fuse_captions(fusion, image, image_mask, begun, mask)
        for i in range(pictures):
            for c in range(captions):
                n = int(lengths[i, c])
                seen = image[i] if image_mask is None else image[i, image_mask[i]]
                alone = fusion(seen[None], None, text[i, c, None, :n], mask[i, c, None, :n])
                row = i * captions + c
                torch.testing.assert_close(fused.pooled[row], alone.pooled[0])
                torch.testing.assert_close(fused.text[row, :n], alone.text[0])


def test_captions_do_not_see_each_other() -> None:
    model = make_model(fusion="cross_attention")
    assert isinstance(model.fusion, CrossAttentionFusion)
    image, text = torch.randn(1, 17, model.image_encoder.width), torch.randn(1, 3, 5, 32)
    mask = torch.ones(1, 3, 5, dtype=torch.bool)
    other = text.clone()
    other[0, 1] = torch.randn(5, 32)
    with torch.inference_mode():
        before, after = (fuse_captions(model.fusion, image, None, t, mask) for t in (text, other))
    assert torch.equal(before.pooled[[0, 2]], after.pooled[[0, 2]])
    assert not torch.allclose(before.pooled[1], after.pooled[1])
