"""Fusion encoders: image tokens and text tokens into multimodal ones.

Each is a module with ``forward(image, image_mask, text, text_mask) -> Fused`` and an entry in
``FUSIONS``. All run over transformers' BERT, given embeddings in place of ids, so that the last
layers of a pretrained BERT can be loaded into them. Padding cannot change any output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig

from vicvlm_cli.model.lengths import by_length
from vicvlm_cli.model.text_encoder import make_bert


class Fused(NamedTuple):
    """Multimodal tokens: ``pooled`` [B, D], ``text`` [B, L, D], ``image`` [B, N, D] or None."""

    pooled: Tensor
    text: Tensor
    image: Tensor | None


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: [B, N, D] and bool [B, N] (None: all) to [B, D]."""
    if mask is None:
        return tokens.mean(dim=1)
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool [B, N] (True = real) to what attention adds to its scores, [B, 1, 1, N]."""
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def _bert(config: BertConfig, layers: int, positions: int, cross_attention: bool) -> nn.Module:
    config = BertConfig.from_dict(
        {
            **config.to_dict(),
            "num_hidden_layers": layers,
            "vocab_size": 1,  # it is given embeddings, never ids
            "pad_token_id": None,
            "max_position_embeddings": max(positions, config.max_position_embeddings),
            "is_decoder": cross_attention,
            "add_cross_attention": cross_attention,
            "use_cache": False,
        }
    )
    bert = make_bert(config)
    bert.embeddings.word_embeddings.requires_grad_(False)
    return bert


def _attend(
    layers: Any, tokens: Tensor, mask: Tensor | None, context: Tensor, context_mask: Tensor | None
) -> Tensor:
    """Tokens [B, N, D] through layers that attend to them and to ``context`` [B, M, D]."""
    # The layers alone: the whole BertModel would mask the future, as in a decoder, and its releases
    # do not agree on which ready-made masks they take instead. The layers do so too without a mask.
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    out: Tensor = layers(
        tokens,
        attention_mask=_additive(mask, tokens.dtype),
        encoder_hidden_states=context,
        encoder_attention_mask=(
            None if context_mask is None else _additive(context_mask, tokens.dtype)
        ),
    ).last_hidden_state
    return out


def _attend_text(
    bert: Any, text: Tensor, text_mask: Tensor, image: Tensor, image_mask: Tensor | None
) -> Tensor:
    """Words [B, L, D] through a BERT whose layers attend to image tokens [B, N, D] too."""

    def run(rows: Tensor, length: int) -> Tensor:
        words = bert.embeddings(inputs_embeds=text[rows, :length])
        seen = None if image_mask is None else image_mask[rows]
        return _attend(bert.encoder, words, text_mask[rows, :length], image[rows], seen)

    return by_length(text_mask, run)


class CrossAttentionLayers(nn.Module):
    """BERT layers whose tokens attend to each other, then to the tokens of another modality.

    Nothing is added to what goes in: it must know its own places.
    """

    def __init__(self, config: BertConfig, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder: Any = _bert(config, layers, 0, cross_attention=True).encoder

    def forward(
        self, tokens: Tensor, mask: Tensor | None, context: Tensor, context_mask: Tensor | None
    ) -> Tensor:
        """Tokens [B, N, D], context [B, M, D] and bool masks (True = real, None: all) to [B, N, D].

        The context goes to all layers as it is.
        """
        tokens = self.dropout(self.norm(tokens))
        return _attend(self.encoder, tokens, mask, context, context_mask)


class ConcatFusion(nn.Module):
    """[CLS] + image tokens + text tokens through BERT layers (VicVLM, MAMO).

    Image tokens carry token type 1 and text tokens type 0; BERT's positions count along each part,
    so that a caption's words keep theirs whatever the number of patches.
    """

    def __init__(
        self, config: BertConfig, layers: int, image_width: int, image_tokens: int
    ) -> None:
        super().__init__()
        self.bert = _bert(config, layers, 1 + image_tokens, cross_attention=False)
        self.image_projection = nn.Linear(image_width, config.hidden_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)

    def forward(
        self, image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Fused:
        """Image [B, N, D_i], text [B, L, D] and bool masks (True = real) to :class:`Fused`."""
        b, n, length = image.shape[0], image.shape[1], text.shape[1]
        device = text.device
        tokens = torch.cat(
            [self.cls_token.expand(b, -1, -1), self.image_projection(image), text], dim=1
        )  # [B, 1 + N + L, D]
        if image_mask is None:
            image_mask = torch.ones(b, n, dtype=torch.bool, device=device)
        mask = torch.cat([image_mask.new_ones(b, 1), image_mask, text_mask], dim=1)
        counts = [torch.arange(m, device=device) for m in (1 + n, length)]
        kinds = [torch.ones(1 + n, device=device), torch.zeros(length, device=device)]
        out = self.bert(
            inputs_embeds=tokens,
            attention_mask=mask,
            position_ids=torch.cat(counts).unsqueeze(0),
            token_type_ids=torch.cat(kinds).long().expand(b, -1),
        ).last_hidden_state
        return Fused(pooled=out[:, 0], text=out[:, 1 + n :], image=out[:, 1 : 1 + n])


class CrossAttentionFusion(nn.Module):
    """Text tokens that attend to image tokens (ALBEF, arXiv 2107.07651, sec. 3.1).

    The cheapest: only the words run through the layers. There are no image outputs; the
    pooled feature is the mean over the real words.
    """

    def __init__(
        self, config: BertConfig, layers: int, image_width: int, image_tokens: int
    ) -> None:
        super().__init__()
        self.bert = _bert(config, layers, 0, cross_attention=True)
        self.image_projection = nn.Linear(image_width, config.hidden_size)

    def forward(
        self, image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Fused:
        """Image [B, N, D_i], text [B, L, D] and bool masks (True = real) to :class:`Fused`."""
        out = _attend_text(self.bert, text, text_mask, self.image_projection(image), image_mask)
        return Fused(pooled=masked_mean(out, text_mask), text=out, image=None)


class CoAttentionFusion(nn.Module):
    """Two streams that attend to each other's modality (MaskVLM, arXiv 2208.02131, fig. 2).

    Text tokens attend to the image encoder's tokens, as in :class:`CrossAttentionFusion`, and image
    tokens to the text encoder's; each stream has ``layers`` layers of its own. A pretrained BERT's
    go to the text stream. Image tokens get no positions here: the ViT gave them theirs, which stay
    right where patches are left out. The pooled feature is a linear map of both class tokens side
    by side, so that a linear head on it is one on their concatenation, which is what the paper
    matches with.
    """

    def __init__(
        self, config: BertConfig, layers: int, image_width: int, image_tokens: int
    ) -> None:
        super().__init__()
        self.bert = _bert(config, layers, 0, cross_attention=True)
        self.image_stream = CrossAttentionLayers(config, layers)
        self.image_projection = nn.Linear(image_width, config.hidden_size)
        self.pool = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def fuse_text(
        self, image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Tensor:
        """The text stream alone, [B, L, D]: a fraction of the cost where only words are read."""
        return self._text_stream(self.image_projection(image), image_mask, text, text_mask)

    def forward(
        self, image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Fused:
        """Image [B, N, D_i], text [B, L, D] and bool masks (True = real) to :class:`Fused`.

        The first token of each modality is its class token.
        """
        patches = self.image_projection(image)
        words = self._text_stream(patches, image_mask, text, text_mask)
        seen = self.image_stream(patches, image_mask, text, text_mask)
        pooled = self.pool(torch.cat([seen[:, 0], words[:, 0]], dim=1))
        return Fused(pooled=pooled, text=words, image=seen)

    def _text_stream(
        self, patches: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Tensor:
        return _attend_text(self.bert, text, text_mask, patches, image_mask)


FUSIONS = {
    "concat": ConcatFusion,
    "cross_attention": CrossAttentionFusion,
    "co_attention": CoAttentionFusion,
}
