"""The image encoder with its lowest blocks frozen: what begins in them, and what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_image_encoder import NAME, TINY, VARIANTS, encoder_and_timm

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.image_encoder import ImageEncoder


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_the_frozen_blocks_began_is_gone_on_with(
    frozen: int, name: str, options: dict[str, Any]
) -> None:
    encoder, _ = encoder_and_timm(name, options)
    encoder.freeze(frozen)
    image = torch.randn(3, 3, 32, 32)
    begun = encoder.begin(image)
    assert not begun.requires_grad
    wrong = torch.zeros_like(image)
    torch.testing.assert_close(encoder(wrong, begun=begun), encoder(image), rtol=0, atol=0)
    encoder(wrong, begun=begun).square().sum().backward()
    expected = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(image).square().sum().backward()
    if frozen:
        for key, gradient in expected.items():
            assert torch.equal(gradient, encoder.get_parameter(key).grad), key
        assert not any(key.startswith("vit.blocks.0.") for key in expected)


def test_frozen_blocks_keep_their_weights_and_change_no_other_gradient() -> None:
    options = {**TINY, "depth": 3}
    encoder = ImageEncoder(NAME, 32, options, "learned")
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for blocks in (0, 2):
        encoder.freeze(blocks)
        encoder.zero_grad()
        encoder(x).square().sum().backward()
        gradients.append({k: p.grad for k, p in encoder.vit.named_parameters() if p.requires_grad})
    whole, upper = gradients
    assert all(name.startswith(("blocks.2.", "norm.")) for name in upper)
    assert set(whole) - set(upper) >= {"pos_embed", "cls_token", "patch_embed.proj.weight"}
    for name, gradient in upper.items():
        torch.testing.assert_close(gradient, whole[name])
    encoder.freeze(0)
    assert all(p.requires_grad for p in encoder.parameters())
    assert encoder.frozen_parameters() == []
    with pytest.raises(UserError, match="frozen_blocks=4 is more than the image encoder's 3"):
        encoder.freeze(4)


def test_of_a_cut_encoder_as_many_blocks_are_frozen_as_are_left() -> None:
    encoder = ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned", layers=2)
    for asked, frozen in ((0, 0), (1, 1), (2, 2), (3, 2)):
        encoder.freeze(asked)
        assert encoder.frozen == frozen
        kept = {
            n.split(".")[1]
            for n, p in encoder.vit.named_parameters()
            if "blocks" in n and not p.requires_grad
        }
        assert kept == {str(i) for i in range(frozen)}
    with pytest.raises(UserError, match="frozen_blocks=4 is more than the image encoder's 3"):
        encoder.freeze(4)


def test_blocks_frozen_for_a_while_take_no_gradient_but_hand_a_mask_token_its_own() -> None:
    encoder = ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned")
    x = torch.randn(2, 3, 32, 32)
    encoder.freeze(2, for_good=False)
    assert all(p.requires_grad for p in encoder.parameters())
    encoder(x).square().sum().backward()
    frozen = {id(p) for p in encoder.frozen_parameters()}
    with_gradient = {id(p) for p in encoder.parameters() if p.grad is not None}
    assert frozen and frozen | with_gradient == {id(p) for p in encoder.parameters()}
    assert not frozen & with_gradient
    gradients = []
    for blocks in (0, 2):
        encoder.freeze(blocks, for_good=False)
        token = torch.zeros(encoder.width, requires_grad=True)
        hidden = torch.zeros(2, encoder.num_patches, dtype=torch.bool)
        hidden[:, 1] = True
        encoder(x, hidden=hidden, mask_token=token).square().sum().backward()
        gradients.append(token.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(*gradients)
