"""transformers' BERT layers by their parts: only what is asked for is computed.

Their own calls differ between transformers' releases, give every token's output whether it is read
or not, and compute a picture's keys and values again for each caption it is fused with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Context(NamedTuple):
    """What tokens attend to: ``keys`` and ``values`` [B, heads, N, d]."""

    keys: Tensor
    values: Tensor

    def rows(self, which: Tensor) -> Context:
        """Of the rows ``which``, long [R]."""
        return Context(self.keys.index_select(0, which), self.values.index_select(0, which))


def prefers_fused(x: Tensor) -> bool:
    """Whether PyTorch's fused attention is the faster: on the CPU not in bf16."""
    return x.device.type != "cpu" or x.dtype != torch.bfloat16


def context_of(attention: Any, tokens: Tensor) -> Context:
    """Keys and values that a BertAttention makes of tokens [B, N, D]."""
    of = attention.self
    keys, values = (_heads(f(tokens), of.num_attention_heads) for f in (of.key, of.value))
    return Context(keys.contiguous(), values.contiguous())


def attend(attention: Any, tokens: Tensor, context: Context, mask: Tensor | None) -> Tensor:
    """A BertAttention: tokens [B, N, D] that attend to a context, to [B, N, D].

    ``mask``: bool, broadcasts to [B, 1, N, M], True at what is seen; None: all.
    """
    of = attention.self
    dropout = of.dropout.p if of.training else 0.0
    query = _heads(of.query(tokens), of.num_attention_heads)  # [B, heads, N, d]
    if prefers_fused(query):
        out = F.scaled_dot_product_attention(
            query, context.keys, context.values, attn_mask=mask, dropout_p=dropout
        )
    else:
        scores = (query * query.shape[-1] ** -0.5) @ context.keys.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = of.dropout(scores.softmax(-1)) @ context.values
    return attention.output(out.transpose(1, 2).flatten(2), tokens)


def encode(layers: Any, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Tokens [B, N, D] through BertLayers; bool mask [B, N], True at real tokens.

    Args:
        wanted: long [W], the places whose outputs are read: the last layer computes no others.
            None: all.

    Returns:
        [B, N or W, D].
    """
    seen = mask[:, None, None, :]
    for number, layer in enumerate(layers):
        context = context_of(layer.attention, tokens)
        if wanted is not None and number == len(layers) - 1:
            tokens = tokens.index_select(1, wanted)
        tokens = attend(layer.attention, tokens, context, seen)
        tokens = layer.output(layer.intermediate(tokens), tokens)
    if wanted is not None and not len(layers):
        tokens = tokens.index_select(1, wanted)
    return tokens


def cross_encode(
    layers: Any,
    tokens: Tensor,
    mask: Tensor | None,
    contexts: Sequence[Context],
    context_mask: Tensor | None,
) -> Tensor:
    """Tokens [B, N, D] that attend to each other and then to another modality, in each layer.

    Args:
        mask: bool [B, N], True at real tokens; None: all are.
        contexts: what each layer makes of the other modality, as of :func:`contexts_of`.
        context_mask: bool [B, M].
    """
    own = None if mask is None else mask[:, None, None, :]
    other = None if context_mask is None else context_mask[:, None, None, :]
    for layer, context in zip(layers, contexts, strict=True):
        tokens = attend(layer.attention, tokens, context_of(layer.attention, tokens), own)
        tokens = attend(layer.crossattention, tokens, context, other)
        tokens = layer.output(layer.intermediate(tokens), tokens)
    return tokens


def contexts_of(layers: Any, tokens: Tensor) -> list[Context]:
    """What the cross-attention of each layer makes of the other modality's tokens [B, M, D]."""
    return [context_of(layer.crossattention, tokens) for layer in layers]


def _heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)  # [B, heads, N, d]
