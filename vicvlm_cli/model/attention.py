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

from vicvlm_cli.model.feed_forward import gelu_linear


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


def attend_few(attention: Any, tokens: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """What :func:`attend` gives, for few tokens [B, W, D] that attend to many [B, N, D].

    No keys and values are made of the many. Instead of all keys, each query goes through the keys'
    weights; instead of all values, only what attention took of the tokens goes through theirs.
    """
    of = attention.self
    rows, few, heads = len(tokens), tokens.shape[1], of.num_attention_heads

    def by_row(x: Tensor) -> Tensor:  # [heads, B * W, n] to [B, W * heads, n]
        return x.view(heads, rows, few, x.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)

    query = of.query(tokens) * of.attention_head_size**-0.5
    context = context.to(query.dtype)
    query = query.view(rows * few, heads, -1).transpose(0, 1)  # [heads, B * W, d]
    through = by_row(query @ of.key.weight.view(heads, -1, context.shape[-1]))
    # The keys' bias moves no softmax; it is here so that every parameter has its gradient.
    bias = by_row(query @ of.key.bias.view(heads, -1, 1))
    scores = through @ context.transpose(1, 2) + bias  # [B, W * heads, N]
    scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
    taken = of.dropout(scores.softmax(-1))
    share = taken.sum(-1).view(rows * few, heads, 1)  # 1 but for dropout
    out = (taken @ context).view(rows * few, heads, -1).transpose(0, 1)  # [heads, B * W, D]
    out = out @ of.value.weight.view(heads, -1, context.shape[-1]).transpose(1, 2)
    bias = share * of.value.bias.to(out.dtype).view(heads, -1)
    out = out.transpose(0, 1) + bias  # [B * W, heads, d]
    return attention.output(out.reshape(rows, few, -1), tokens)


def feed_forward(layer: Any, tokens: Tensor) -> Tensor:
    """The perceptron of a BertLayer: [B, N, D] to [B, N, D]."""
    out = gelu_linear(layer.intermediate.dense(tokens), layer.output.dense)
    return layer.output.LayerNorm(layer.output.dropout(out) + tokens)


def encode(layers: Any, tokens: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Tokens [B, N, D] through BertLayers; bool mask [B, N], True at real tokens.

    Args:
        wanted: long [W] or, row by row, [B, W], the places whose outputs are read: the last layer
            computes no others. None: all.

    Returns:
        [B, N or W, D].
    """
    seen = mask[:, None, None, :]
    last = len(layers) - 1 if wanted is not None else -1
    for layer in layers[:last] if last >= 0 else layers:
        tokens = attend(layer.attention, tokens, context_of(layer.attention, tokens), seen)
        tokens = feed_forward(layer, tokens)
    if wanted is None:
        return tokens
    few = take(tokens, wanted)
    if last < 0:
        return few
    attention = layers[last].attention
    # Keys and values of N tokens are 2 N D D products; without them there are 2 W heads N D more.
    if 2 * few.shape[1] * attention.self.num_attention_heads <= tokens.shape[-1]:
        few = attend_few(attention, few, tokens, mask)
    else:
        few = attend(attention, few, context_of(attention, tokens), seen)
    return feed_forward(layers[last], few)


def cross_encode(
    layers: Any,
    tokens: Tensor,
    mask: Tensor | None,
    contexts: Sequence[Context],
    context_mask: Tensor | None,
    wanted: Tensor | None = None,
) -> Tensor:
    """Tokens [B, N, D] that attend to each other and then to another modality, in each layer.

    Args:
        mask: bool [B, N], True at real tokens; None: all are.
        contexts: what each layer makes of the other modality, as of :func:`contexts_of`.
        context_mask: bool [B, M].
        wanted: as of :func:`encode`.

    Returns:
        [B, N or W, D].
    """
    own = None if mask is None else mask[:, None, None, :]
    other = None if context_mask is None else context_mask[:, None, None, :]
    for number, (layer, context) in enumerate(zip(layers, contexts, strict=True), 1):
        keys = context_of(layer.attention, tokens)
        if wanted is not None and number == len(layers):
            tokens = take(tokens, wanted)
        tokens = attend(layer.attention, tokens, keys, own)
        tokens = attend(layer.crossattention, tokens, context, other)
        tokens = feed_forward(layer, tokens)
    return tokens


def contexts_of(layers: Any, tokens: Tensor) -> list[Context]:
    """What the cross-attention of each layer makes of the other modality's tokens [B, M, D]."""
    return [context_of(layer.crossattention, tokens) for layer in layers]


def take(x: Tensor, wanted: Tensor) -> Tensor:
    """The tokens of [B, N, D] numbered ``wanted``, long [W] or, row by row, [B, W]: [B, W, D]."""
    if wanted.dim() == 1:
        return x.index_select(1, wanted)
    return x.gather(1, wanted.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)  # [B, heads, N, d]
