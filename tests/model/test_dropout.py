"""Dropout with masks four of one random number is dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicvlm_cli.model.dropout import Dropout, keep_mask
from vicvlm_cli.model.text_encoder import bert_config, make_bert


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_elements_go_with_probability_p_and_none_depends_on_another(p: float) -> None:
    torch.manual_seed(0)
    keep = keep_mask(torch.Size([401, 999]), p).flatten().double()
    deviation = (p * (1 - p) / len(keep)) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation
    for lag in (1, 2, 3, 4):  # the four of one number, and the next one's
        both = (keep[:-lag] * keep[lag:]).mean().item()
        assert abs(both - (1 - p) ** 2) < 5 * 2 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_scaled_forward_and_back(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    y = Dropout(0.25)(x)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None
    gone = y == 0
    assert 0 < int(gone.sum()) < y.numel()
    torch.testing.assert_close(y[~gone], x[~gone] / 0.75)
    torch.testing.assert_close(x.grad, (~gone).to(dtype) / 0.75)


def test_it_repeats_by_the_seed_and_is_nothing_in_evaluation() -> None:
    x, dropout = torch.randn(6, 6), Dropout(0.5)
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        draws.append(dropout(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()


def test_every_bert_has_it() -> None:
    bert = make_bert(bert_config(vocab_size=9, width=8, heads=2, layers=2, dropout=0.3))
    found = [module for module in bert.modules() if isinstance(module, nn.Dropout)]
    assert len(found) >= 7 and all(type(module) is Dropout for module in found)
    assert {module.p for module in found} == {0.3}
