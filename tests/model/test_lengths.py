"""Groups of like length: the same tokens as all captions at once, with less padding."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model
from torch import Tensor

from vicvlm_cli.model import lengths
from vicvlm_cli.model.lengths import by_length


def make_mask(rows: int, longest: int = 9) -> Tensor:
    counts = torch.randint(1, longest + 1, (rows,), generator=torch.Generator().manual_seed(4))
    return torch.arange(longest) < counts[:, None]


def test_rows_come_back_in_their_order_and_each_group_is_cut() -> None:
    mask = make_mask(70)
    x = torch.randn(70, 9, 5)
    seen: list[tuple[int, int]] = []

    def run(rows: Tensor, length: int) -> Tensor:
        seen.append((len(rows), length))
        assert int(mask[rows].sum(1).max()) == length  # no longer than its longest, nothing lost
        return 2 * x[rows, :length]

    got = by_length(mask, run)
    assert torch.equal(got[mask], 2 * x[mask])
    assert len(seen) == lengths.GROUPS and sum(n for n, _ in seen) == 70
    assert [length for _, length in seen] == sorted(length for _, length in seen)
    assert sum(n * length for n, length in seen) < 0.8 * 70 * 9


def test_a_small_batch_is_one_group() -> None:
    mask = make_mask(2 * lengths.FEWEST - 1)
    calls = []
    by_length(mask, lambda rows, length: calls.append(length) or torch.zeros(len(rows), length, 1))
    assert calls == [9]


@pytest.mark.parametrize("fusion", ["cross_attention", "co_attention"])
def test_grouping_changes_no_token_and_no_gradient(
    fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(fusion=fusion)
    mask = make_mask(40)
    ids = torch.randint(5, 80, mask.shape, generator=torch.Generator().manual_seed(1))
    image = torch.randn(40, 17, 24)
    results = []
    for groups in (1, 4):
        monkeypatch.setattr(lengths, "GROUPS", groups)
        model.zero_grad()
        text = model.encode_text(ids, mask)
        fused = model.fuse(image, None, text.tokens, mask)
        logits = model.match_fused(fused, text.features, text.features)
        (logits.square().sum() + fused.text[mask].square().sum()).backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((text.features, fused.pooled, fused.text[mask], gradients))
    for one, other in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert results[0][3].keys() == results[1][3].keys()
    for name, gradient in results[0][3].items():
        torch.testing.assert_close(gradient, results[1][3][name], rtol=1e-3, atol=1e-3)
