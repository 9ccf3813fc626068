"""Late interaction: pairs scored by attention between projected words and patches (SCAN)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicvlm_cli.config import from_dict
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.fusion import masked_mean
from vicvlm_cli.model.vlm import VLM, Encoded, PairScore
from vicvlm_cli.settings import ModelConfig

# Numbers of one [I, T, N, L] attention at a time; a handful of such tensors are alive together.
CHUNK = {"cpu": 2**22, "cuda": 2**26}


class StackedAttention(nn.Module):
    """Stacked cross attention (SCAN, arXiv 1803.08024, sec. 3.1). It has no parameters.

    Text to image: each word attends to the patches, and is compared with what it saw. Image to
    text: each patch attends to the words. The comparisons are pooled over the words (patches).

    Raises:
        UsageError: an option that there is not.
    """

    @dataclass(frozen=True)
    class Config:
        """``model.fusion_options``.

        ``direction``: ``t2i`` or ``i2t``. ``pool``: ``lse`` (eq. 6) or ``mean`` (eq. 7).
        ``attention_scale``: lambda 1, the softmax's inverse temperature (None: 9 or 4, by
        direction); ``pool_scale``: lambda 2, that of LSE (None: 6 or 5).
        """

        direction: str = "t2i"
        pool: str = "lse"
        attention_scale: float | None = None
        pool_scale: float | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        for name, known in (("direction", ("t2i", "i2t")), ("pool", ("lse", "mean"))):
            if getattr(config, name) not in known:
                raise UsageError(
                    f"model.fusion_options.{name} is {getattr(config, name)!r}, not "
                    f"{' or '.join(known)}"
                )
        self.by_word, self.lse = config.direction == "t2i", config.pool == "lse"
        attention, pool = (9.0, 6.0) if self.by_word else (4.0, 5.0)
        self.attention_scale = config.attention_scale or attention
        self.pool_scale = config.pool_scale or pool

    def attend(self, dots: Tensor, mask: Tensor) -> Tensor:
        """Attention from cosines of patches and words, both [B, N, ..., L] (eq. 2 and 3).

        The cosines are thresholded by a leaky ReLU and normalised over what attends, for each of
        what is attended to (``clipped_l2norm`` of the authors' code); then comes the softmax.

        Args:
            dots: 0 where there is no word.
            mask: bool that broadcasts to ``dots``, True at real words.
        """
        x = F.leaky_relu(dots, 0.1)
        norm = (x.square().sum(-1 if self.by_word else 1, keepdim=True) + 1e-16).sqrt()
        x = x * (self.attention_scale / norm)
        return x.softmax(1) if self.by_word else x.masked_fill(~mask, float("-inf")).softmax(-1)

    def pool(self, cosine: Tensor, mask: Tensor) -> Tensor:
        """Scores [...] of the cosines [..., L] of words (``mask`` bool), or [..., N] of patches."""
        real = mask if self.by_word else torch.ones_like(mask[..., :1])
        if self.lse:
            x = self.pool_scale * cosine
            return x.masked_fill(~real, float("-inf")).logsumexp(-1) / self.pool_scale
        return (cosine * real).sum(-1) / real.expand_as(cosine).sum(-1)

    def forward(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Scores [B] of row i's picture [B, N, P] with row i's caption [B, L, P], unit vectors."""
        text = text * text_mask[..., None]
        dots = image @ text.mT  # [B, N, L]
        attention = self.attend(dots, text_mask[:, None])
        if self.by_word:
            cosine = F.cosine_similarity(text, attention.mT @ image, dim=-1)  # [B, L]
        else:
            cosine = F.cosine_similarity(image, attention @ text, dim=-1)  # [B, N]
        return self.pool(cosine, text_mask)

    def all_pairs(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Scores [I, T] of all pictures [I, N, P] with all captions [T, L, P].

        Captions of like length go in chunks that are computed again for the gradient, so that
        memory does not grow with I * T * N * L.
        """
        (i, n, _), longest = image.shape, text.shape[1]
        size = max(1, CHUNK.get(image.device.type, CHUNK["cpu"]) // (i * n * longest))
        lengths = text_mask.sum(1)
        order = lengths.argsort()
        columns = []
        for part in order.split(size):
            length = int(lengths[part[-1]])
            words, mask = text[part, :length], text_mask[part, :length]
            columns.append(checkpoint(self._chunk, image, words, mask, use_reentrant=False))
        return torch.cat(columns, dim=1)[:, order.argsort()]

    def _chunk(self, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = text * mask[..., None]
        # Patches stand before captions, so that no product or softmax needs a copy.
        dots = (image @ text.flatten(0, 1).T).unflatten(-1, mask.shape)  # [I, N, T, L]
        attention = self.attend(dots, mask)
        # The attended vectors themselves would take P / L times the memory of the attention. With
        # unit vectors only their length is wanted beside a sum of cosines, and the length of a
        # weighted sum is a quadratic form of the inner products of its vectors.
        if self.by_word:
            seen = (image @ image.mT @ attention.flatten(2)).view_as(dots)
        else:
            seen = torch.einsum("intm,tml->intl", attention, text @ text.mT)
        along = 1 if self.by_word else -1
        length = (attention * seen).sum(along).clamp(min=1e-12).sqrt()
        cosine = (attention * dots).sum(along) / length  # [I, T, L], or [I, N, T]
        return self.pool(cosine if self.by_word else cosine.mT, mask)


class LateInteraction(VLM):
    """Two encoders whose projected patches and words are compared pair by pair.

    Tokens are the projected patches [B, N, P] and words [B, L, P] of unit length, the class token
    not among the patches. The features, which choose the shortlist, are their means.
    """

    def __init__(self, config: ModelConfig, image_weights: str = "") -> None:
        super().__init__(config, image_weights)
        options = from_dict(StackedAttention.Config, config.fusion_options, "model.fusion_options")
        self.interaction = StackedAttention(options)

    @property
    def pair_score(self) -> PairScore | None:
        """The attention's score; it alone orders the shortlist."""
        return PairScore("stacked cross attention", alone=True)

    def encode_image(self, image: Tensor, begun: Tensor | None = None) -> Encoded:
        """Encode pictures; as :class:`RetrievalModel`."""
        tokens = self.image_encoder(self.normalize(image), begun=begun)
        patches = tokens[:, self.image_encoder.prefix :]
        patches = F.normalize(self.image_projection(patches), dim=-1)
        return Encoded(F.normalize(patches.mean(dim=1), dim=-1), patches, None)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """Encode captions; as :class:`RetrievalModel`."""
        tokens = self.text_encoder(input_ids, attention_mask)
        words = F.normalize(self.text_projection(tokens), dim=-1)
        features = F.normalize(masked_mean(words, attention_mask), dim=-1)
        return Encoded(features, words, attention_mask)

    def match(self, image: Encoded, text: Encoded) -> Tensor:
        """Scores [B] of the pairs of each row."""
        assert text.mask is not None
        with torch.autocast(image.tokens.device.type, enabled=False):
            return self.interaction(*_unit(image, text), text.mask)

    def match_all(self, image: Encoded, text: Encoded) -> Tensor:
        """Scores [I, T] of all pictures with all captions."""
        assert text.mask is not None
        with torch.autocast(image.tokens.device.type, enabled=False):
            return self.interaction.all_pairs(*_unit(image, text), text.mask)


def _unit(image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
    # Half precision leaves lengths that are off by up to 1 %.
    return F.normalize(image.tokens.float(), dim=-1), F.normalize(text.tokens.float(), dim=-1)
