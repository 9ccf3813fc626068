"""What every model does, and the one of two encoders with a fusion encoder and a matching head.

What is needed to retrieve lives here; heads that only train (masked modelling, targets) live with
the objective, so that a checkpoint carries no training baggage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig

from vicvlm_cli.model.fusion import FUSIONS, Fused, Want, masked_mean
from vicvlm_cli.model.image_encoder import ImageEncoder
from vicvlm_cli.model.shared import SharedBlock
from vicvlm_cli.model.text_encoder import TextEncoder, bert_config
from vicvlm_cli.settings import ModelConfig


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


@dataclass(frozen=True)
class PairScore:
    """What a model has to say of a pair beyond the cosine of its two features.

    ``name`` is what tables call it. The cosine always chooses a query's shortlist, within which the
    score is added to it with a weight chosen on validation, or (``alone``) orders it by itself.
    """

    name: str
    alone: bool = False

    def weights(self, scale: float, weight: float) -> tuple[float, float]:
        """What cosine and score count, given the inverse temperature and the chosen weight."""
        return (0.0, 1.0) if self.alone else (scale, weight)


class RerankWeights(NamedTuple):
    """What a pair score counts beside the similarity, in each direction of search.

    ``image_retrieval``: captions look for pictures. ``text_retrieval``: pictures look for captions.
    """

    image_retrieval: float = 0.0
    text_retrieval: float = 0.0

    @classmethod
    def of(cls, value: float | Iterable[float]) -> RerankWeights:
        """One weight for both directions, or two."""
        return cls(value, value) if isinstance(value, int | float) else cls(*map(float, value))

    def __str__(self) -> str:
        """For people: one number where both are equal."""
        first, second = self
        if first == second:
            return f"{first:g}"
        return f"{first:g} text to image and {second:g} image to text"


class RetrievalModel(nn.Module, ABC):
    """What evaluation, galleries and checkpoints need of a model, whatever its method.

    Args:
        config: a *resolved* configuration, see :func:`vicvlm_cli.model.create.create_model`;
            ``text_width``, ``vocab_size`` and the picture statistics are the encoders' own.
    """

    mean: Tensor
    std: Tensor
    image_encoder: ImageEncoder  # it has a learning rate and frozen blocks of its own

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        for name, values in (("mean", config.image_mean), ("std", config.image_std)):
            pixels = torch.tensor(values).view(1, 3, 1, 1) * 255
            self.register_buffer(name, pixels, persistent=False)

    @property
    def eval_image_size(self) -> int:
        """Side of the pictures that are embedded.

        Random crops magnify what they show. Whole pictures of the same side then show everything
        smaller than in training, those of a larger side do not (FixRes, arXiv 1906.06423).
        """
        return self.image_encoder.eval_size

    @property
    def pair_score(self) -> PairScore | None:
        """How :meth:`match` counts; None: the model is a dual encoder and cannot match."""
        return None

    @property
    def similarity_scale(self) -> float:
        """The inverse temperature that cosines are multiplied with beside a pair score."""
        return self.logit_scale.detach().float().exp().item()

    @property
    def can_match(self) -> bool:
        """Whether there is more to score a pair with than its cosine."""
        return self.pair_score is not None

    def normalize(self, image: Tensor) -> Tensor:
        """Pixels in [0, 255] to the encoder's range: [B, 3, S, S] to float [B, 3, S, S]."""
        return (image.float() - self.mean) / self.std

    @abstractmethod
    def encode_image(self, image: Tensor, begun: Tensor | None = None) -> Encoded:
        """Encode pictures.

        Args:
            image: uint8, or float in [0, 255], [B, 3, S, S] with S the configured image size.
            begun: [B, prefix + N, D], what the image encoder's frozen blocks make of ``image`` if
                that is known; the rest of the way is all that it takes then.
        """

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode captions: ``input_ids`` long [B, L], ``attention_mask`` bool [B, L]."""

    @abstractmethod
    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Scores [B] of the pairs of each row, higher where they belong together."""


class VLM(RetrievalModel):
    """Two encoders with their projections and, for most methods, a fusion encoder."""

    def __init__(self, config: ModelConfig, image_weights: str = "") -> None:
        super().__init__(config)
        self.image_encoder = ImageEncoder(
            config.image_encoder,
            config.image_size,
            config.image_options,
            config.image_positions,
            image_weights,
            config.eval_image_scale,
            config.image_layers,
        )
        bert = _bert_of(config)
        self.text_encoder = TextEncoder(bert)
        image_tokens = self.image_encoder.prefix + self.image_encoder.num_patches
        self.fusion: nn.Module | None = None
        self.shared: SharedBlock | None = None
        if config.fusion == "shared":
            width = self.image_encoder.width
            self.shared = SharedBlock(config.text_width, config.text_heads, width)
        elif config.fusion in FUSIONS:
            self.fusion = FUSIONS[config.fusion](
                bert, config.fusion_layers, self.image_encoder.width, image_tokens
            )
        image_width = config.text_width if self.shared else self.image_encoder.width
        self.image_projection = nn.Linear(image_width, config.projection_dim)
        self.text_projection = nn.Linear(config.text_width, config.projection_dim)
        self.itm_head: nn.Linear | None = None
        if self.fusion is not None:
            self.itm_head = nn.Linear(config.text_width + config.projection_dim, 1)

    @property
    def pair_score(self) -> PairScore | None:
        """ITM where there is a fusion encoder."""
        return None if self.itm_head is None else PairScore("ITM")

    def encode_image(self, image: Tensor, begun: Tensor | None = None) -> Encoded:
        """Encode pictures; as :class:`RetrievalModel`."""
        tokens = self.image_encoder(self.normalize(image), begun=begun)
        if self.shared is not None:
            return self._share(self.shared, tokens, None, self.image_projection)
        # The class token and the pooled patches each carry what the other misses.
        patches = tokens[:, self.image_encoder.prefix :]
        pooled = patches.amax(dim=1) if self.config.image_pool == "max" else patches.mean(dim=1)
        features = self.image_projection(tokens[:, 0] + pooled)
        return Encoded(F.normalize(features, dim=-1), tokens, None)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode captions; as :class:`RetrievalModel`."""
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
        self,
        image: Tensor,
        image_mask: Tensor | None,
        text: Tensor,
        text_mask: Tensor,
        of: Tensor | None = None,
        want: Want = "all",
        at: Tensor | None = None,
    ) -> Fused:
        """Run the fusion encoder over image tokens [G, N, D_i] and text tokens [B, L, D].

        Only for models that have one (``can_match``). ``of``, ``want`` and ``at``, and all else,
        are those of :data:`~vicvlm_cli.model.fusion.FUSIONS`.
        """
        assert self.fusion is not None
        return self.fusion(image, image_mask, text, text_mask, of, want, at)

    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Log-odds [B] that picture and caption of each row belong together."""
        assert text.mask is not None
        fused = self.fuse(image.tokens, image.mask, text.tokens, text.mask, want="pooled")
        return self.match_fused(fused, image.features, text.features)

    def match_fused(self, fused: Fused, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Log-odds [B] float32 from fused tokens and the features [B, P] of both sides.

        Beside the fused tokens the head sees the elementwise product of the two features
        (ViLBERT, arXiv 1908.02265, sec. 3.1), so that it refines the similarity from its first
        step instead of having to find it again.
        """
        assert self.itm_head is not None
        product = image_features * text_features * self.config.projection_dim  # [B, P], of order 1
        # Log-odds of half precision, of which some ten lie between 1 and 1.1, would make ties.
        with torch.autocast(product.device.type, enabled=False):
            both = torch.cat([fused.pooled.float(), product.float()], dim=1)
            return self.itm_head(both).squeeze(-1)  # [B, 1] to [B]


def _bert_of(config: ModelConfig) -> BertConfig:
    return bert_config(
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
        dropout=config.text_dropout,
        max_tokens=config.max_tokens,
    )
