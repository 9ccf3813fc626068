"""Many captions a picture through a cross-attention fusion, as re-ranking asks for.

What depends on the picture alone (the projection of its tokens, their keys and values in every
layer) is most of what a pair costs, and is computed once for all captions of a picture; what hangs
on the caption alone (the first layer's attention among its words), once for all pictures.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicvlm_cli.model.attention import attend, context_of
from vicvlm_cli.model.fusion import CrossAttentionFusion, Fused, masked_mean


def begin_captions(fusion: CrossAttentionFusion, text: Tensor, text_mask: Tensor) -> Tensor:
    """Captions [B, L, D] as far as they go without a picture; ``text_mask`` bool [B, L]."""
    bert: Any = fusion.bert
    words = bert.embeddings(inputs_embeds=text)
    first = bert.encoder.layer[0].attention
    return attend(first, words, context_of(first, words), text_mask[:, None, None, :])


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
            own = context_of(layer.attention, x)
            x = attend(layer.attention, x, own, real[:, None, None, :])
        x = x.reshape(pictures, captions * length, -1)
        x = attend(layer.crossattention, x, context_of(layer.crossattention, patches), seen)
        x = x.reshape(pictures * captions, length, -1)
        x = layer.output(layer.intermediate(x), x)
    return Fused(pooled=masked_mean(x, real), text=x, image=None)
