"""One transformer over a caption's words and a picture's patches together (ViLT)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicvlm_cli.model.fusion import masked_mean
from vicvlm_cli.model.image_encoder import ImageEncoder
from vicvlm_cli.model.vlm import Encoded, PairScore, RetrievalModel
from vicvlm_cli.settings import ModelConfig

TEXT, IMAGE = 0, 1


class WordEmbedding(nn.Module):
    """BERT's embedding of words and their places, in one width with the patches."""

    def __init__(self, vocab_size: int, max_tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_tokens, width)
        for table in (self.words, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Long [B, L] to [B, L, D]."""
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        out: Tensor = self.dropout(self.norm(self.words(input_ids) + self.positions(at)))
        return out


class Stream(NamedTuple):
    """What the transformer made of pairs: ``text`` [B, L, D] and ``image`` [B, prefix + N, D]."""

    text: Tensor
    image: Tensor


class SingleStream(RetrievalModel):
    """ViLT (arXiv 2102.03334): embeddings alone are of one modality, all else is of the pair.

    The transformer is the timm ViT's own, its weights with it (sec. 3.1); of a BERT only the
    vocabulary is taken. Tokens are the embedded patches and words. A pair costs a pass, so a
    shortlist has to be chosen before: by the features, which are linear projections of what the
    same transformer makes of the picture alone and of the caption alone. No gradient goes from
    them into the transformer, but theirs counts in the norm by which all gradients are clipped.
    """

    def __init__(self, config: ModelConfig, image_weights: str = "") -> None:
        encoder = ImageEncoder(
            config.image_encoder,
            config.image_size,
            config.image_options,
            config.image_positions,
            image_weights,
            config.eval_image_scale,
            config.image_layers,
        )
        width = encoder.width
        super().__init__(replace(config, text_width=width))
        self.image_encoder = encoder
        self.word_embedding = WordEmbedding(
            config.vocab_size, config.max_tokens, width, config.text_dropout
        )
        self.kind_embedding = nn.Parameter(torch.randn(2, width) * 0.02)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.itm_head = nn.Linear(width, 1)
        self.image_projection = nn.Linear(width, config.projection_dim)
        self.text_projection = nn.Linear(width, config.projection_dim)

    @property
    def pair_score(self) -> PairScore | None:
        """The log-odds of the matching head, which alone order the shortlist."""
        return PairScore("single-stream ITM", alone=True)

    def embed_image(self, image: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] to patches [B, prefix + N, D], the class token first."""
        vit: Any = self.image_encoder.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(self.normalize(image))))
        return x + self.kind_embedding[IMAGE]

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Captions, long [B, L], to words [B, L, D]."""
        out: Tensor = self.word_embedding(input_ids) + self.kind_embedding[TEXT]
        return out

    def encode_image(self, image: Tensor, begun: Tensor | None = None) -> Encoded:
        """Encode pictures; as :class:`RetrievalModel`, but that nothing can be begun."""
        assert begun is None, "words are there from the first block on"
        tokens = self.embed_image(image)
        pooled = self._alone(tokens, None)
        return Encoded(F.normalize(self.image_projection(pooled), dim=-1), tokens, None)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode captions; as :class:`RetrievalModel`."""
        tokens = self.embed_text(input_ids)
        pooled = self._alone(tokens, attention_mask)
        features = F.normalize(self.text_projection(pooled), dim=-1)
        return Encoded(features, tokens, attention_mask)

    def run(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Stream:
        """Patches [B, N, D] and words [B, L, D], row by row, through the transformer together."""
        length = text.shape[1]
        mask = F.pad(text_mask, (0, image.shape[1]), value=True)  # [B, L + N]
        out = self._transform(torch.cat([text, image], dim=1), mask)
        return Stream(text=out[:, :length], image=out[:, length:])

    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Log-odds [B] that picture and caption of each row belong together."""
        assert text.mask is not None
        return self.match_stream(self.run(image.tokens, text.tokens, text.mask))

    def match_stream(self, stream: Stream) -> Tensor:
        """Log-odds [B] float32 from the first word, [CLS], as the transformer leaves it."""
        # In half precision many pairs would tie: this alone orders them.
        with torch.autocast(stream.text.device.type, enabled=False):
            out: Tensor = self.itm_head(self.pooler(stream.text[:, 0].float()))
        return out.squeeze(-1)  # [B, 1] to [B]

    @torch.no_grad()
    def _alone(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """One modality through the transformer, pooled to [B, D]; no gradient comes back."""
        out = self._transform(tokens, mask)
        # Before 2.10 or so, torch's autocast keeps the weights that it cast here, without gradient,
        # for the pass that wants one.
        torch.clear_autocast_cache()
        return out[:, 0] + masked_mean(out, mask)

    def _transform(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        vit: Any = self.image_encoder.vit
        hide = None
        if mask is not None:
            hide = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            hide = hide.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]
        for block in vit.blocks:
            tokens = block(tokens, attn_mask=hide)
        out: Tensor = vit.norm(tokens)
        return out
