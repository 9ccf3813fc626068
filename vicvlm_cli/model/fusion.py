"""Fusion encoders: image tokens and text tokens into multimodal ones.

Each is a module with an entry in ``FUSIONS``, where what they take and give is told. All run over
transformers' BERT, given embeddings in place of ids, so that the last layers of a pretrained BERT
can be loaded into them. Padding cannot change any output.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from vicvlm_cli.model.attention import contexts_of, cross_encode, encode, take
from vicvlm_cli.model.dropout import Dropout
from vicvlm_cli.model.lengths import by_length
from vicvlm_cli.model.text_encoder import make_bert

Want = Literal["all", "image", "text", "pooled"]


class Fused(NamedTuple):
    """Multimodal tokens: ``pooled`` [B, D], ``text`` [B, L, D], ``image`` [B, N, D] or None.

    Tokens that were not wanted may be left out: L or N is then 0.
    """

    pooled: Tensor
    text: Tensor
    image: Tensor | None


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: [B, N, D] and bool [B, N] (None: all) to [B, D]."""
    if mask is None:
        return tokens.mean(dim=1)
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


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


def _attend_text(
    bert: Any,
    text: Tensor,
    text_mask: Tensor,
    image: Tensor,
    image_mask: Tensor | None,
    of: Tensor | None,
) -> Tensor:
    """Words [B, L, D] through a BERT whose layers attend to image tokens [G, N, D] too.

    ``of``: long [B], the picture of each row; None: row by row.
    """
    layers = bert.encoder.layer
    contexts = contexts_of(layers, image)  # once a picture, whatever its captions

    def run(rows: Tensor, length: int) -> Tensor:
        words = bert.embeddings(inputs_embeds=text[rows, :length])
        pictures = rows if of is None else of[rows]
        seen = None if image_mask is None else image_mask[pictures]
        own = [context.rows(pictures) for context in contexts]
        return cross_encode(layers, words, text_mask[rows, :length], own, seen)

    return by_length(text_mask, run)


class CrossAttentionLayers(nn.Module):
    """BERT layers whose tokens attend to each other, then to the tokens of another modality.

    Nothing is added to what goes in: it must know its own places.
    """

    def __init__(self, config: BertConfig, layers: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder: Any = _bert(config, layers, 0, cross_attention=True).encoder

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, D], context [B, M, D] and bool masks (True = real, None: all) to [B, N, D].

        The context goes to all layers as it is. ``wanted``: long [W] or [B, W], the tokens whose
        outputs are read, [B, W, D]; None: all.
        """
        tokens, layers = self.dropout(self.norm(tokens)), self.encoder.layer
        contexts = contexts_of(layers, context)
        return cross_encode(layers, tokens, mask, contexts, context_mask, wanted)


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
        self,
        image: Tensor,
        image_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        of: Tensor | None = None,
        want: Want = "all",
        at: Tensor | None = None,
    ) -> Fused:
        """As told at :data:`FUSIONS`."""
        patches = self.image_projection(image)
        if of is not None:
            patches = patches.index_select(0, of)
            image_mask = None if image_mask is None else image_mask[of]
        b, n, length = len(text), patches.shape[1], text.shape[1]
        device = text.device
        tokens = torch.cat([self.cls_token.expand(b, -1, -1), patches, text], dim=1)
        if image_mask is None:
            image_mask = torch.ones(b, n, dtype=torch.bool, device=device)
        mask = torch.cat([image_mask.new_ones(b, 1), image_mask, text_mask], dim=1)
        counts = [torch.arange(m, device=device) for m in (1 + n, length)]
        kinds = [torch.ones(1 + n, device=device), torch.zeros(length, device=device)]
        bert: Any = self.bert
        tokens = bert.embeddings(
            inputs_embeds=tokens,  # [B, 1 + N + L, D]
            position_ids=torch.cat(counts).unsqueeze(0),
            token_type_ids=torch.cat(kinds).long().expand(b, -1),
        )
        if want == "all":
            out = encode(bert.encoder.layer, tokens, mask)
            return Fused(pooled=out[:, 0], text=out[:, 1 + n :], image=out[:, 1 : 1 + n])
        count, first = {"pooled": (0, 0), "image": (n, 1), "text": (length, 1 + n)}[want]
        if at is None:
            at = torch.arange(count, device=device).expand(b, -1)
        wanted = F.pad(at + first, (1, 0))  # the class token is at 0
        out = encode(bert.encoder.layer, tokens, mask, wanted)
        read, none = out[:, 1:], out[:, :0]
        text, image = (read, none) if want == "text" else (none, read)
        return Fused(pooled=out[:, 0], text=text, image=image)


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
        self,
        image: Tensor,
        image_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        of: Tensor | None = None,
        want: Want = "all",
        at: Tensor | None = None,
    ) -> Fused:
        """As told at :data:`FUSIONS`; the words are needed for the pooled feature anyway."""
        out = _attend_text(self.bert, text, text_mask, self.image_projection(image), image_mask, of)
        text = take(out, at) if want == "text" and at is not None else out
        return Fused(pooled=masked_mean(out, text_mask), text=text, image=None)


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
        patches = self.image_projection(image)
        return _attend_text(self.bert, text, text_mask, patches, image_mask, None)

    def forward(
        self,
        image: Tensor,
        image_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        of: Tensor | None = None,
        want: Want = "all",
        at: Tensor | None = None,
    ) -> Fused:
        """As told at :data:`FUSIONS`. The first token of each modality is its class token."""
        patches = self.image_projection(image)
        words = _attend_text(self.bert, text, text_mask, patches, image_mask, of)
        if of is not None:
            patches = patches.index_select(0, of)
            image_mask = None if image_mask is None else image_mask[of]
        if want == "all" or (want == "image" and at is None):
            seen = image = self.image_stream(patches, image_mask, text, text_mask)
        else:  # the class token at 0, and before what else is read
            more = at if want == "image" and at is not None else patches.new_zeros(len(text), 0)
            wanted = F.pad(more.long(), (1, 0))
            seen = self.image_stream(patches, image_mask, text, text_mask, wanted)
            image = seen[:, 1:]
        pooled = self.pool(torch.cat([seen[:, 0], words[:, 0]], dim=1))
        if want == "text" and at is not None:
            words = take(words, at)
        return Fused(pooled=pooled, text=words, image=image)


FUSIONS = {
    "concat": ConcatFusion,
    "cross_attention": CrossAttentionFusion,
    "co_attention": CoAttentionFusion,
}
"""The fusion encoders by name: ``forward(image, image_mask, text, text_mask, of, want, at)``.

Args:
    image: tokens [G, N, D_i] of G pictures; ``image_mask`` bool [G, N], True = real, None: all.
    text: tokens [B, L, D], with bool ``text_mask`` [B, L].
    of: long [B], the picture that each caption is fused with; None: row by row, G = B.
    want: which outputs are read beside the pooled ones; what only others need is not computed.
    at: long [B, R], which of the words (``want="text"``) or of the image tokens (``want="image"``)
        of each row are read: R is then in the place of L or N. None: all.

Returns:
    :class:`Fused`.
"""
