"""Many captions a picture through a cross-attention fusion, as re-ranking asks for.

What depends on the picture alone (the projection of its tokens, their keys and values in every
layer) is most of what a pair costs, and is computed once for all captions of a picture.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vicvlm_cli.model.fusion import CrossAttentionFusion, Fused, masked_mean


def fuse_captions(
    fusion: CrossAttentionFusion,
    image: Tensor,
    image_mask: Tensor | None,
    text: Tensor,
    text_mask: Tensor,
) -> Fused:
    """What ``fusion`` gives for the G * C pairs of each picture with its captions, in evaluation.

    Args:
        image: tokens [G, N, D_i] of G pictures; ``image_mask`` bool [G, N], None: all are real.
        text: tokens [G, C, L, D] of C captions a picture; ``text_mask`` bool [G, C, L].
    """
    bert: Any = fusion.bert
    pictures, captions, length, _ = text.shape
    patches = fusion.image_projection(image)  # [G, N, D]
    seen = None if image_mask is None else image_mask[:, None, None, :]
    x = bert.embeddings(inputs_embeds=text.flatten(0, 1))  # [G * C, L, D]
    real = text_mask.flatten(0, 1)
    for layer in bert.encoder.layer:
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

    out = F.scaled_dot_product_attention(
        heads(of.query(tokens)), heads(of.key(context)), heads(of.value(context)), attn_mask=mask
    )
    return attention.output(out.transpose(1, 2).flatten(2), tokens)
