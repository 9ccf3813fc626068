"""The vision-language model: two encoders, two projections, a fusion encoder and a matching head.

What is needed to retrieve lives here; heads that only train (masked modelling, targets) live with
the objective, so that a checkpoint carries no training baggage.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from vicvlm_cli.config import ModelConfig
from vicvlm_cli.errors import UserError
from vicvlm_cli.model.fusion import FUSIONS, Fused, masked_mean
from vicvlm_cli.model.image_encoder import ImageEncoder, resolve_image_encoder
from vicvlm_cli.model.shared import SharedBlock
from vicvlm_cli.model.text_encoder import TextEncoder, bert_config, load_bert, load_half


class Encoded(NamedTuple):
    """One modality of a batch.

    ``features`` [B, P] are L2-normalised projections; ``tokens`` [B, N, D] feed the fusion encoder
    (for pictures the class token comes first); ``mask`` [B, N] is True at real tokens, or None.
    ``attended`` [B, D]: the first token after the attention of a shared block, if there is one.
    """

    features: Tensor
    tokens: Tensor
    mask: Tensor | None
    attended: Tensor | None = None


class VLM(nn.Module):
    """A compact image-text retrieval model.

    Args:
        config: a *resolved* configuration, see :func:`create_model`; ``text_width``, ``vocab_size``
            and the picture statistics are the encoders' own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, image_weights: str = "") -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(
            config.image_encoder,
            config.image_size,
            config.image_options,
            config.image_positions,
            image_weights,
        )
        bert = _bert_of(config)
        self.text_encoder = TextEncoder(bert)
        image_tokens = self.image_encoder.prefix + self.image_encoder.num_patches
        self.fusion: nn.Module | None = None
        self.shared: SharedBlock | None = None
        if config.fusion == "shared":
            width = self.image_encoder.width
            self.shared = SharedBlock(config.text_width, config.text_heads, width)
        elif config.fusion != "none":
            self.fusion = FUSIONS[config.fusion](
                bert, config.fusion_layers, self.image_encoder.width, image_tokens
            )
        image_width = config.text_width if self.shared else self.image_encoder.width
        self.image_projection = nn.Linear(image_width, config.projection_dim)
        self.text_projection = nn.Linear(config.text_width, config.projection_dim)
        self.itm_head: nn.Linear | None = None
        if self.fusion is not None:
            self.itm_head = nn.Linear(config.text_width + config.projection_dim, 1)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        for name, values in (("mean", config.image_mean), ("std", config.image_std)):
            pixels = torch.tensor(values).view(1, 3, 1, 1) * 255
            self.register_buffer(name, pixels, persistent=False)

    @property
    def can_match(self) -> bool:
        """Whether there is a fusion encoder to score pairs with; a dual encoder has none."""
        return self.itm_head is not None

    def normalize(self, image: Tensor) -> Tensor:
        """Pixels in [0, 255] to the encoder's range: [B, 3, S, S] to float [B, 3, S, S]."""
        return (image.float() - self.mean) / self.std

    def encode_image(self, image: Tensor) -> Encoded:
        """Encode pictures.

        Args:
            image: uint8, or float in [0, 255], [B, 3, S, S] with S the configured image size.
        """
        tokens = self.image_encoder(self.normalize(image))
        if self.shared is not None:
            return self._share(self.shared, tokens, None, self.image_projection)
        # The class token and the pooled patches each carry what the other misses.
        patches = tokens[:, self.image_encoder.prefix :]
        pooled = patches.amax(dim=1) if self.config.image_pool == "max" else patches.mean(dim=1)
        features = self.image_projection(tokens[:, 0] + pooled)
        return Encoded(F.normalize(features, dim=-1), tokens, None)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode captions: ``input_ids`` long [B, L], ``attention_mask`` bool [B, L]."""
        tokens = self.text_encoder(input_ids, attention_mask)
        if self.shared is not None:
            return self._share(self.shared, tokens, attention_mask, self.text_projection)
        pooled = tokens[:, 0] + masked_mean(tokens, attention_mask)
        features = F.normalize(self.text_projection(pooled), dim=-1)
        return Encoded(features, tokens, attention_mask)

    def _share(
        self, shared: SharedBlock, tokens: Tensor, mask: Tensor | None, projection: nn.Linear
    ) -> Encoded:
        attended, tokens = shared(tokens, mask, image=projection is self.image_projection)
        features = F.normalize(projection(tokens[:, 0]), dim=-1)
        return Encoded(features, tokens, mask, attended[:, 0])

    def fuse(
        self, image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor
    ) -> Fused:
        """Run the fusion encoder over image tokens [B, N, D_i] and text tokens [B, L, D].

        Only for models that have one (``can_match``).
        """
        assert self.fusion is not None
        return self.fusion(image, image_mask, text, text_mask)

    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Log-odds [B] that picture and caption of each row belong together."""
        assert text.mask is not None
        fused = self.fuse(image.tokens, image.mask, text.tokens, text.mask)
        return self.match_fused(fused, image.features, text.features)

    def match_fused(self, fused: Fused, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Log-odds [B] from fused tokens and the features [B, P] of both sides.

        Beside the fused tokens the head sees the elementwise product of the two features
        (ViLBERT, arXiv 1908.02265, sec. 3.1), so that it refines the similarity from its first
        step instead of having to find it again.
        """
        assert self.itm_head is not None
        product = image_features * text_features * self.config.projection_dim  # [B, P], of order 1
        return self.itm_head(torch.cat([fused.pooled, product], dim=1)).squeeze(-1).float()


def _bert_of(config: ModelConfig) -> BertConfig:
    return bert_config(
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        dropout=config.text_dropout,
    )


def create_model(config: ModelConfig, vocab_size: int, max_tokens: int | None = None) -> VLM:
    """A new model with the pretrained weights that ``config`` names.

    The model's ``config`` is resolved: it names an architecture, never a file or a hub, and
    rebuilds the same shapes anywhere.

    Raises:
        UserError: an encoder is unknown, does not fit, or its weights cannot be loaded.
    """
    if config.fusion in ("none", "shared"):
        config = replace(config, fusion_layers=0)
    name, weights, statistics = resolve_image_encoder(config.image_encoder, config.image_weights)
    resolved = replace(
        config, image_encoder=name, image_weights="", text_encoder="", vocab_size=vocab_size
    )
    resolved = replace(resolved, **statistics)
    if config.text_width % config.text_heads:
        raise UserError(
            f"model.text_width={config.text_width} is not a multiple of "
            f"model.text_heads={config.text_heads}"
        )
    if not config.text_encoder:
        return VLM(resolved, image_weights=weights)
    bert, text, fusion = load_bert(config.text_encoder, config.text_layers, config.fusion_layers)
    plain = bert_config(vocab_size=1, width=bert.hidden_size, heads=1, layers=1, dropout=0.0)
    for key in ("intermediate_size", "hidden_act", "layer_norm_eps", "max_position_embeddings"):
        if getattr(bert, key) != getattr(plain, key):
            raise UserError(
                f"{config.text_encoder!r} is not a plain BERT: its {key} is {getattr(bert, key)}, "
                f"not {getattr(plain, key)}"
            )
    resolved = replace(
        resolved,
        vocab_size=bert.vocab_size,
        text_width=bert.hidden_size,
        text_heads=bert.num_attention_heads,
        max_tokens=min(config.max_tokens, bert.max_position_embeddings),
    )
    model = VLM(resolved, image_weights=weights)
    load_half(model.text_encoder.bert, text)
    if model.fusion is None:
        return model
    fusion_bert: nn.Module = model.fusion.get_submodule("bert")
    positions = "embeddings.position_embeddings.weight"
    own = fusion_bert.state_dict()[positions]
    if own.shape != fusion[positions].shape:  # more image tokens than BERT has positions
        own = own.clone()
        own[: len(fusion[positions])] = fusion[positions]
        fusion[positions] = own
    load_half(fusion_bert, fusion)
    return model
