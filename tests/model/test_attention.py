"""BERT layers by their parts are transformers' own, forward and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel

from vicvlm_cli.model import attention
from vicvlm_cli.model.attention import (
    attend,
    attend_few,
    context_of,
    contexts_of,
    cross_encode,
    encode,
    take,
)
from vicvlm_cli.model.text_encoder import bert_config

WIDTH = 16


@pytest.fixture(params=[True, False], ids=["fused", "eager"], autouse=True)
def _both_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "prefers_fused", lambda _: request.param)


def make_bert(layers: int, cross: bool) -> BertModel:
    """Random layers, their small weights large enough to tell apart; no dropout."""
    config: Any = bert_config(vocab_size=9, width=WIDTH, heads=2, layers=layers, dropout=0.0)
    config.is_decoder = config.add_cross_attention = cross
    config._attn_implementation = "eager"
    torch.manual_seed(layers)
    bert = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.normal_(std=0.3)
    return bert


def make_tokens(rows: int, number: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, number, WIDTH, generator=generator).requires_grad_()
    real = torch.randint(1, number + 1, (rows, 1), generator=generator)
    return x, torch.arange(number) < real


def additive(mask: Tensor) -> Tensor:
    """As transformers wants it, [B, 1, 1, N]."""
    return torch.zeros(mask.shape).masked_fill(~mask, -1e30)[:, None, None, :]


def check(outputs: list[Tensor], leaves: list[Tensor], bert: BertModel) -> None:
    """Equal outputs, and equal gradients of everything that has one."""
    weights = [*leaves, *bert.encoder.parameters()]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(
        *(torch.autograd.grad(x.square().sum(), weights) for x in outputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


# Few enough to go without keys and values, and too many for that; the same in all rows, and not.
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    "wanted",
    [None, [0], [3, 0], [5, 0, 1, 2, 3], [[0, 3], [0, 1], [0, 0], [5, 4]], [[0, 1, 2, 3, 4]] * 4],
)
def test_self_attention(wanted: Any, layers: int) -> None:
    bert = make_bert(layers, cross=False)
    x, mask = make_tokens(4, 6, seed=1)
    at = None if wanted is None else torch.tensor(wanted)
    mine = encode(bert.encoder.layer, x, mask, at)
    theirs = bert.encoder(x, attention_mask=additive(mask)).last_hidden_state
    check([mine, theirs if at is None else take(theirs, at)], [x], bert)


def test_few_that_attend_to_many_have_dropout_as_all_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "prefers_fused", lambda _: False)
    bert = make_bert(1, cross=False)
    of = bert.encoder.layer[0].attention
    x, mask = make_tokens(4, 6, seed=1)
    outputs = []
    for few in (True, False):
        of.self.dropout = Every(2)
        if few:
            outputs.append(attend_few(of, x[:, :2], x, mask))
        else:
            seen = mask[:, None, None, :]
            outputs.append(attend(of, x[:, :2], context_of(of, x), seen))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class Every(nn.Module):
    """Drops every n-th column: a dropout that two ways of computing agree on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.p = number, 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.arange(x.shape[-1]) % self.number > 0) * 2.0


def test_cross_attention() -> None:
    bert = make_bert(2, cross=True)
    x, mask = make_tokens(4, 6, seed=1)
    context, seen = make_tokens(4, 5, seed=2)
    layers = bert.encoder.layer
    mine = cross_encode(layers, x, mask, contexts_of(layers, context), seen)
    theirs = bert.encoder(
        x,
        attention_mask=additive(mask),
        encoder_hidden_states=context,
        encoder_attention_mask=additive(seen),
    ).last_hidden_state
    check([mine, theirs], [x, context], bert)


def test_dropout_is_of_training_alone() -> None:
    bert = make_bert(1, cross=False)
    bert.encoder.layer[0].attention.self.dropout.p = 0.5
    x, mask = make_tokens(4, 6, seed=1)
    first, second = (encode(bert.encoder.layer, x, mask) for _ in range(2))
    assert not torch.equal(first, second)
    bert.eval()
    first, second = (encode(bert.encoder.layer, x, mask) for _ in range(2))
    assert torch.equal(first, second)
