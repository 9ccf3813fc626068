"""Many captions a picture through a cross-attention fusion, as re-ranking asks for.

What depends on the picture alone (the projection of its tokens, their keys and values in every
layer) is most of what a pair costs, and is computed once for all captions of a picture; what hangs
on the caption alone (the first layer's attention among its words), once for all pictures.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicvlm_cli.model.fusion import CrossAttentionFusion, Fused, masked_mean


def begin_captions(fusion: CrossAttentionFusion, text: Tensor, text_mask: Tensor) -> Tensor:
    """Captions [B, L, D] as far as they go without a picture; ``text_mask`` bool [B, L]."""
    bert: Any = fusion.bert
    words = bert.embeddings(inputs_embeds=text)
    return _attend(bert.encoder.layer[0].attention, words, words, text_mask[:, None, None, :])


def fuse_captions(
    fusion: CrossAttentionFusion,
    image: Tensor,
    image_mask: Tensor | None,
    begun: Tensor,
    text_mask: Tensor,
) -> Fused:
    """What ``fusion`` gives for the G * C pairs of each picture with its captions, in evaluation.

    Args:
        image: tokens [G, N, D_i] of G pictures; ``image_mask`` bool [G, N], None: all are real.
        begun: [G, C, L, D], what :func:`begin_captions` gives for C captions a picture;
            ``text_mask`` bool [G, C, L].
    """
    bert: Any = fusion.bert
    pictures, captions, length, _ = begun.shape
    patches = fusion.image_projection(image)  # [G, N, D]
    seen = None if image_mask is None else image_mask[:, None, None, :]
    x = begun.flatten(0, 1)  # [G * C, L, D]
    real = text_mask.flatten(0, 1)
    for number, layer in enumerate(bert.encoder.layer):
        if number > 0:
            x = _attend(layer.attention, x, x, real[:, None, None, :])
        x = x.reshape(pictures, captions * length, -1)
        x = _attend(layer.crossattention, x, patches, seen)
        x = x.reshape(pictures * captions, length, -1)
        x = layer.output(layer.intermediate(x), x)
    return Fused(pooled=masked_mean(x, real), text=x, image=None)


def _attend(attention: Any, tokens: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """A BertAttention by its parts: their calls differ between transformers' releases.

    Tokens [B, N, D] and context [B, M, D] to [B, N, D]; ``mask`` broadcasts to [B, 1, N, M].
    """
    of = attention.self

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (of.num_attention_heads, -1)).transpose(1, 2)  # [B, heads, N, d]

    q, k, v = heads(of.query(tokens)), heads(of.key(context)), heads(of.value(context))
    if tokens.device.type == "cpu" and q.dtype == torch.bfloat16:  # the fused kernel is slow there
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(3) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.output(out.transpose(1, 2).flatten(2), tokens)
