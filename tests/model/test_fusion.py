"""The fusion encoders: what they compute, and that padding cannot change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from vicvlm_cli.model import attention as attention_parts
from vicvlm_cli.model.attention import take
from vicvlm_cli.model.fusion import FUSIONS, CrossAttentionFusion, Fused, Want, masked_mean
from vicvlm_cli.model.text_encoder import bert_config

CONFIG: BertConfig = bert_config(vocab_size=50, width=32, heads=2, layers=1, dropout=0.1)
IMAGE_WIDTH, PATCHES = 24, 6


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    monkeypatch.setattr(attention_parts, "prefers_fused", lambda _: kind == "sdpa")
    return kind


def make(name: str, layers: int = 2) -> Any:
    torch.manual_seed(0)
    fusion = FUSIONS[name](CONFIG, layers, IMAGE_WIDTH, 1 + PATCHES)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.3)
    return fusion.eval()


def tokens(rows: int = 3, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens [B, 1 + PATCHES, D_i], text tokens [B, L, D] and the text's mask."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(rows, 1 + PATCHES, IMAGE_WIDTH, generator=generator)
    text = torch.randn(rows, length, 32, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([length, 2, 1])[:rows, None]
    return image, text, mask


@pytest.mark.parametrize("name", FUSIONS)
def test_padded_words_change_nothing(name: str, attention: str) -> None:
    fusion = make(name)
    image, text, mask = tokens()
    before: Fused = fusion(image, None, text, mask)
    longer = torch.randn(3, 9, 32) * 50
    longer[:, :5][mask] = text[mask]
    wider = torch.zeros(3, 9, dtype=torch.bool)
    wider[:, :5] = mask
    after: Fused = fusion(image, None, longer, wider)
    torch.testing.assert_close(after.pooled, before.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.text[wider], before.text[mask], rtol=1e-4, atol=1e-5)
    if before.image is not None:
        torch.testing.assert_close(after.image, before.image, rtol=1e-4, atol=1e-5)
    for row, length in enumerate((5, 2, 1)):  # and it is what the caption gives alone
        alone: Fused = fusion(
            image[row : row + 1], None, text[row : row + 1, :length], mask[row : row + 1, :length]
        )
        torch.testing.assert_close(alone.pooled[0], before.pooled[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_padded_image_tokens_change_nothing(name: str, attention: str) -> None:
    fusion = make(name)
    image, text, mask = tokens()
    real = torch.arange(1 + PATCHES)[None] < torch.tensor([7, 3, 1])[:, None]
    before: Fused = fusion(image, real, text, mask)
    spoiled = image.masked_fill(~real.unsqueeze(-1), 50.0)
    after: Fused = fusion(spoiled, real, text, mask)
    torch.testing.assert_close(after.pooled, before.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.text[mask], before.text[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUSIONS)
def test_every_real_token_counts(name: str, attention: str) -> None:
    fusion = make(name)
    image, text, mask = tokens()
    before: Fused = fusion(image, None, text, mask)
    for i in range(1 + PATCHES):
        changed = image.clone()
        changed[:, i] += 1
        difference = fusion(changed, None, text, mask).pooled - before.pooled
        assert bool((difference.abs().amax(1) > 1e-3).all())
    for i in range(text.shape[1]):
        changed = text.clone()
        changed[:, i] += torch.randn(32)
        difference = (fusion(image, None, changed, mask).pooled - before.pooled).abs().amax(1)
        assert (difference > 1e-3).tolist() == mask[:, i].tolist()


def test_words_see_those_after_them(attention: str) -> None:
    # A decoder's causal mask would hide them.
    fusion = make("cross_attention", layers=1)
    image, text, mask = tokens(rows=1)
    before: Fused = fusion(image, None, text, mask)
    text[:, -1] += torch.randn(32)
    after: Fused = fusion(image, None, text, mask)
    assert bool(((after.text[:, 0] - before.text[:, 0]).abs() > 1e-3).any())


@pytest.mark.parametrize("name", FUSIONS)
def test_both_attentions_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for kind in ("eager", "sdpa"):
        monkeypatch.setattr(attention_parts, "prefers_fused", lambda _, kind=kind: kind == "sdpa")
        fusion = make(name)
        image, text, mask = tokens()
        outputs.append(fusion(image, None, text, mask))
    torch.testing.assert_close(outputs[0].pooled, outputs[1].pooled, rtol=1e-4, atol=1e-5)


def test_shapes_and_places() -> None:
    image, text, mask = tokens()
    fused: Fused = make("concat")(image, None, text, mask)
    assert fused.image is not None
    assert fused.image.shape == (3, 1 + PATCHES, 32) and fused.text.shape == (3, 5, 32)
    # What a token goes in as, it comes out as: with no layers' mixing the places are visible.
    still = make("concat", layers=0)
    out: Fused = still(image, None, text, mask)
    moved = image.clone()
    moved[:, 2] += 1
    assert out.image is not None
    after = still(moved, None, text, mask)
    changed = (after.image - out.image).abs().amax((0, 2)) > 1e-3
    assert changed.tolist() == [i == 2 for i in range(1 + PATCHES)]
    torch.testing.assert_close(after.text, out.text)
    fused = make("cross_attention")(image, None, text, mask)
    assert fused.image is None and fused.text.shape == (3, 5, 32)


def test_words_keep_their_positions_whatever_the_number_of_patches() -> None:
    still = make("concat", layers=0)
    image, text, mask = tokens()
    few: Fused = still(image[:, :3], None, text, mask)
    torch.testing.assert_close(few.text, still(image, None, text, mask).text)
    swapped: Fused = still(image, None, text.flip(1), mask)
    assert bool(((swapped.text.flip(1) - few.text).abs() > 1e-2).any())  # and order matters


def test_more_patches_than_bert_has_positions() -> None:
    fusion = FUSIONS["concat"](CONFIG, 1, IMAGE_WIDTH, 601).eval()
    fused: Fused = fusion(
        torch.randn(1, 601, IMAGE_WIDTH), None, torch.randn(1, 4, 32), torch.ones(1, 4).bool()
    )
    assert fused.image is not None and fused.image.shape == (1, 601, 32)


def test_cross_attention_pools_over_real_words_only() -> None:
    fusion = make("cross_attention")
    assert isinstance(fusion, CrossAttentionFusion)
    image, text, mask = tokens()
    fused: Fused = fusion(image, None, text, mask)
    for row, length in enumerate((5, 2, 1)):
        expected = fused.text[row, :length].mean(0)
        torch.testing.assert_close(fused.pooled[row], expected, rtol=1e-4, atol=1e-5)


def test_the_masked_mean() -> None:
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(masked_mean(x, None), x.mean(1))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    mean = masked_mean(x, mask)
    torch.testing.assert_close(mean[0], (x[0, 0] + x[0, 2]) / 2)
    assert not mean[1].any()  # nothing real: zero, not NaN


@pytest.mark.parametrize("name", FUSIONS)
def test_a_picture_once_for_many_captions(name: str, attention: str) -> None:
    fusion = make(name)
    image, text, mask = tokens()
    real = torch.arange(1 + PATCHES)[None] < torch.tensor([7, 3, 1])[:, None]
    of = torch.tensor([2, 0, 0])
    results = []
    for once in (True, False):
        leaf = image.clone().requires_grad_()
        fusion.zero_grad()
        fused: Fused = (
            fusion(leaf, real, text, mask, of=of)
            if once
            else fusion(leaf[of], real[of], text, mask)
        )
        (fused.pooled.square().sum() + fused.text[mask].square().sum()).backward()
        gradients = [p.grad for p in fusion.parameters() if p.grad is not None]
        results.append([fused.pooled, fused.text[mask], leaf.grad, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("want", ["pooled", "text", "image"])
@pytest.mark.parametrize("name", FUSIONS)
def test_what_is_wanted_is_what_all_would_be(
    name: str, want: Want, layers: int, attention: str
) -> None:
    fusion = make(name, layers)
    results = []
    for wanted in (want, "all"):
        image, text, mask = tokens()
        image.requires_grad_()
        fusion.zero_grad()
        fused: Fused = fusion(image, None, text, mask, want=wanted)
        outputs = [fused.pooled]
        if want == "text":
            outputs.append(fused.text[mask])
        if want == "image" and fused.image is not None:
            outputs.append(fused.image)
        torch.stack([x.square().sum() for x in outputs]).sum().backward()
        # A bias of keys moves nothing: where few tokens attend it has no gradient at all.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in fusion.parameters()]
        results.append([*outputs, image.grad, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("want", ["image", "text"])
@pytest.mark.parametrize("name", FUSIONS)
def test_some_places_are_those_of_all(name: str, want: Want, attention: str) -> None:
    image, text, mask = tokens()
    at = torch.tensor([[2, 0], [1, 1], [0, 4]])  # other ones in each row
    fusion = make(name)
    whole: Fused = fusion(image, None, text, mask, want=want)
    some: Fused = fusion(image, None, text, mask, want=want, at=at)
    torch.testing.assert_close(some.pooled, whole.pooled, rtol=1e-4, atol=1e-5)
    if want == "text":
        torch.testing.assert_close(some.text, take(whole.text, at), rtol=1e-4, atol=1e-5)
    elif whole.image is not None:
        assert some.image is not None
        torch.testing.assert_close(some.image, take(whole.image, at), rtol=1e-4, atol=1e-5)


def test_co_attention_computes_no_patch_that_is_not_wanted() -> None:
    image, text, mask = tokens()
    at = torch.zeros(len(image), 2, dtype=torch.long)
    for want, places, patches in (("pooled", None, 0), ("text", None, 0), ("image", at, 2)):
        fused: Fused = make("co_attention")(image, None, text, mask, want=want, at=places)
        assert fused.image is not None
        assert fused.image.shape[1] == patches


def test_concat_computes_no_output_that_is_not_wanted() -> None:
    image, text, mask = tokens()
    for want, words, patches in (("pooled", 0, 0), ("text", 5, 0), ("image", 0, 1 + PATCHES)):
        fused: Fused = make("concat")(image, None, text, mask, want=want)
        assert fused.image is not None
        assert (fused.text.shape[1], fused.image.shape[1]) == (words, patches)
