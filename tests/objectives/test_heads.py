"""The heads that only training needs."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import Tensor

from vicvlm_cli.model.image_encoder import sincos_2d
from vicvlm_cli.objectives.heads import JointPatchHead, MLMHead, PatchPredictor


@pytest.fixture(params=[False, True], ids=["eager", "fused"])
def predictor(request: pytest.FixtureRequest) -> PatchPredictor:
    timm.layers.set_fused_attn(request.param)
    torch.manual_seed(0)
    head = PatchPredictor(12, (4, 4), 7, width=32, depth=2, context_width=10).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return head


def patches(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Visible features [B, 4, 12], and the numbers of the visible and the hidden patches."""
    order = torch.stack([torch.randperm(16) for _ in range(rows)])
    return torch.randn(rows, 4, 12), order[:, :4], order[:, 4:]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_caption_counts_and_its_padding_does_not(predictor: PatchPredictor) -> None:
    visible, keep, masked = patches()
    context = torch.randn(2, 5, 10)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    before = predictor(visible, keep, masked, context, mask)
    assert before.shape == (2, 12, 7)
    wide = torch.cat([context.masked_fill(~mask.unsqueeze(-1), 40.0), torch.randn(2, 3, 10)], 1)
    wide_mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    close(predictor(visible, keep, masked, wide, wide_mask), before)
    context[:, 1] += torch.randn(10)
    changed = predictor(visible, keep, masked, context, mask)
    assert bool(((changed - before).abs().amax((1, 2)) > 1e-2).all())


def test_the_order_of_the_patches_is_of_no_account(predictor: PatchPredictor) -> None:
    visible, keep, masked = patches()
    before = predictor(visible, keep, masked)
    turn = torch.tensor([2, 0, 3, 1])
    close(predictor(visible[:, turn], keep[:, turn], masked), before)
    back = torch.arange(11, -1, -1)
    close(predictor(visible, keep, masked[:, back]), before[:, back])


def test_a_prediction_knows_its_place_and_what_is_seen(predictor: PatchPredictor) -> None:
    visible, keep, masked = patches()
    before = predictor(visible, keep, masked)
    assert float((before[:, 0] - before[:, 1]).abs().amax()) > 1e-2
    visible[:, 2] += torch.randn(12)
    changed = (predictor(visible, keep, masked) - before).abs().amax(2) > 1e-4
    for row in range(2):  # two convolutions see two patches far
        y, x = divmod(int(keep[row, 2]), 4)
        far = [max(abs(m // 4 - y), abs(m % 4 - x)) for m in masked[row].tolist()]
        assert changed[row].tolist() == [distance <= 2 for distance in far]
    context, mask = torch.randn(2, 5, 10), torch.ones(2, 5, dtype=torch.bool)
    before = predictor(visible, keep, masked, context, mask)  # and the attention everything
    visible[:, 2] += torch.randn(12)
    after = predictor(visible, keep, masked, context, mask)
    assert bool(((after - before).abs().amax(2) > 1e-4).all())


def test_what_is_seen_goes_back_to_its_place(predictor: PatchPredictor) -> None:
    # All patches but one are seen, and a patch is told apart from its mirror image.
    visible, numbers = torch.randn(1, 15, 12), torch.arange(16)[None]
    straight = predictor(visible, numbers[:, :15], numbers[:, 15:])
    mirrored = predictor(visible, numbers[:, :15].flip(1), numbers[:, 15:])
    assert bool(((straight - mirrored).abs() > 1e-3).any())


def test_mask_tokens_stand_at_the_places_of_hidden_patches() -> None:
    torch.manual_seed(0)
    head = JointPatchHead(12, (4, 4), 20, 7)
    visible, keep, masked = patches()
    prefix = torch.randn(2, 2, 12)
    tokens, at = head.places(torch.cat([prefix, visible], dim=1), 2, keep, masked)
    table = sincos_2d((4, 4), 12)
    assert tokens.shape == (2, 2 + 16, 12)
    close(tokens[:, :2], prefix)
    for row in range(2):
        # The fusion numbers its tokens as they come: each patch by its place.
        close(tokens[row, 2 + keep[row]], visible[row] + table[keep[row]])
        assert torch.equal(at[row], 2 + masked[row])
        close(tokens[row, at[row]], head.mask_token[0] + table[masked[row]])
    fused = torch.randn(2, 12, 20)
    close(head(fused), head.predictor(fused))


def test_an_encoder_that_drops_no_patch_needs_no_mask_tokens_after_it() -> None:
    torch.manual_seed(0)
    _, _, masked = patches()
    tokens = torch.randn(2, 2 + 16, 12)
    everywhere = torch.arange(16).expand(2, -1)
    head = JointPatchHead(12, (4, 4), 20, 7, dropped=False)
    same, at = head.places(tokens, 2, everywhere, masked)
    assert same is tokens
    for row in range(2):
        close(tokens[row, at[row]], tokens[row, 2:][masked[row]])
    # The predictor sees what the encoder makes of hidden patches, as it sees that of others.
    predictor = PatchPredictor(12, (4, 4), 7, width=32, depth=2, dropped=False).eval()
    assert predictor.mask_token is None
    changed = tokens.clone()
    changed[:, 2:].scatter_add_(1, masked[:, :1, None].expand(-1, -1, 12), torch.ones(2, 1, 12))
    before = predictor(tokens[:, 2:], everywhere, masked)
    after = predictor(changed[:, 2:], everywhere, masked)
    assert bool(((after - before).abs().amax((1, 2)) > 1e-3).all())


def test_words_are_read_off_the_table_of_the_text_encoder() -> None:
    torch.manual_seed(0)
    head = MLMHead(8, 30)
    with torch.no_grad():
        head.bias.normal_()
    tokens, table = torch.randn(5, 8), torch.randn(30, 8, requires_grad=True)
    logits = head(tokens, table)
    hidden = head.transform(tokens)
    for i in range(5):
        for word in range(30):
            expected = float((hidden[i] * table[word]).sum() + head.bias[word])
            assert float(logits[i, word]) == pytest.approx(expected, abs=1e-4)
    logits.sum().backward()
    assert table.grad is not None and bool(table.grad.any())
