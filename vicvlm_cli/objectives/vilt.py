"""ViLT: one transformer over words and patches, trained by matching, masked words and alignment."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.single_stream import SingleStream
from vicvlm_cli.model.vlm import Encoded
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.heads import MLMHead
from vicvlm_cli.objectives.masked_language import hide_words, token_kinds, word_loss
from vicvlm_cli.objectives.negatives import hard_negatives
from vicvlm_cli.objectives.ranks import Noise, gather, gather_padded, rank
from vicvlm_cli.objectives.retrieval import Losses
from vicvlm_cli.objectives.transport import alignment_distance

# Words and patches share every block: none of them is a picture's own, to be frozen or kept.
ALL_TRAIN = {"frozen_blocks": 0, "frozen_epochs": 0, "cached_views": 0}


class ViLT(nn.Module):
    """ITM, MLM and word-patch alignment in a single stream (arXiv 2102.03334, sec. 3.2).

    ITC trains nothing but the two projections that choose a shortlist: see
    :class:`~vicvlm_cli.model.single_stream.SingleStream`.

    Raises:
        UsageError: an option is out of range.
    """

    LOSSES: tuple[str, ...] = ("itc", "itm", "mlm", "wpa")
    MODEL = SingleStream
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "single_stream"},
        "pretrain": {
            "losses": {"itc": {}, "itm": {}, "mlm": {}, "wpa": {"weight": 0.1}},
            **ALL_TRAIN,
        },
        "finetune": {
            "objective": "vilt_ranking",
            "losses": {"itc": {}, "ranking": {}, "itm": {"weight": 0.5}},
        },
    }

    @dataclass(frozen=True)
    class Config:
        """``text_mask``: share of words hidden."""

        text_mask: float = 0.15

    def __init__(self, model: SingleStream, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        if not 0 < config.text_mask < 1:
            raise UsageError("options.text_mask must be between 0 and 1")
        self.model, self.config = model, config
        vocab_size = model.config.vocab_size
        self.mlm_head = MLMHead(model.config.text_width, vocab_size)
        self.mask_id = tokenizer.mask_id
        special, continuation = token_kinds(tokenizer, vocab_size)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        # How often each token was a masked one: the trivial guess for masked language modelling.
        self.register_buffer("token_counts", torch.ones(vocab_size))

    special: Tensor
    continuation: Tensor
    token_counts: Tensor

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active`` (ITC always), and the trivial value of each."""
        model = self.model
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        contrasted = contrast(model, image, text, batch, cached)
        values, trivial = {"itc": contrasted.loss}, {"itc": contrasted.trivial}
        if "itm" in active or "wpa" in active:
            matched, guesses = match_half(model, image, text, contrasted.image_id, noise)
            values |= {k: v for k, v in matched.items() if k in active}
            trivial |= {k: v for k, v in guesses.items() if k in active}
        if "mlm" in active:
            values["mlm"], trivial["mlm"] = self._mlm(batch, image, noise)
        return values, trivial

    def _mlm(self, batch: Batch, image: Encoded, noise: Noise) -> tuple[Tensor, Tensor]:
        """Masked language modelling of the pair's stream, and its trivial value.

        As in the authors' code, hidden words are shown as BERT shows them: not all by [MASK].
        """
        ids, hidden = hide_words(
            batch,
            self.special,
            self.continuation,
            noise,
            ratio=self.config.text_mask,
            max_tokens=self.model.config.max_tokens,
            mask_id=self.mask_id,
            as_bert=True,
        )
        words = self.model.embed_text(ids)
        stream = self.model.run(image.tokens, words, batch.attention_mask)
        return word_loss(
            self.mlm_head,
            stream.text[hidden],
            self.model.word_embedding.words.weight,
            batch.input_ids[hidden],
            self.token_counts,
            count=self.training,
        )

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)


def match_half(
    model: SingleStream, image: Encoded, text: Encoded, image_id: Tensor, noise: Noise
) -> Losses:
    """ITM and WPA of captions of which one half is shown another picture, drawn at random.

    As in the paper's code, both come from one pass, and WPA pulls the words of matched pairs onto
    the patches and pushes those of the others away. There it is the sum of the distances of the
    ones less that of the others; here the others count as 2, the largest distance, less theirs,
    which has the same gradient and cannot be negative.
    """
    assert text.mask is not None
    rows, total = len(text.tokens), len(image_id)
    mine = slice(rank() * rows, (rank() + 1) * rows)
    same = image_id[mine, None] == image_id[None, :]  # [B, G]
    alike = torch.zeros(same.shape, device=same.device)
    other = hard_negatives(alike, same, noise.rand(rows, total), 1)[:, 0]
    place = gather(noise.rand(rows)).argsort().argsort()[mine]
    replaced = place < total // 2
    own = torch.arange(mine.start, mine.stop, device=other.device)
    stream = model.run(
        gather(image.tokens)[torch.where(replaced, other, own)], text.tokens, text.mask
    )
    label = (~replaced).float()
    itm = F.binary_cross_entropy_with_logits(model.match_stream(stream), label)
    # Neither [CLS] and [SEP] nor the ViT's class token are words or patches.
    words = text.mask.clone()
    words[:, 0] = False
    words[torch.arange(rows), text.mask.sum(1) - 1] = False
    patches = stream.image[:, model.image_encoder.prefix :]
    everywhere = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
    distance = alignment_distance(stream.text, patches, words, everywhere)
    wpa = torch.where(replaced, 2 - distance, distance).mean()
    share = (total // 2) / (total - total // 2)
    # Words and patches that have nothing to do with each other are at a distance of 1.
    trivial = {"itm": torch.tensor(losses.itm_base_rate(share)), "wpa": torch.ones(())}
    return {"itm": itm, "wpa": wpa}, trivial


class ViLTRanking(nn.Module):
    """ViLT's fine-tuning for retrieval: find the caption among random others (sec. 4.3)."""

    LOSSES: tuple[str, ...] = ("itc", "ranking", "itm")
    MODEL = SingleStream
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "single_stream"},
        "pretrain": {"losses": {"itc": {}, "ranking": {}, "itm": {"weight": 0.5}}, **ALL_TRAIN},
        "finetune": ViLT.RECIPE["finetune"],
    }

    @dataclass(frozen=True)
    class Config:
        """``negatives``: captions beside a picture's own, at most as many as a batch has."""

        negatives: int = 15

    def __init__(self, model: SingleStream, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        if config.negatives < 1:
            raise UsageError(f"options.negatives is {config.negatives}, and must be above 0")
        self.model, self.config = model, config

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active`` (ITC always), and the trivial value of each."""
        model = self.model
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        contrasted = contrast(model, image, text, batch, cached)
        values, trivial = {"itc": contrasted.loss}, {"itc": contrasted.trivial}
        if "ranking" in active:
            ranking, number = self._rank(image, text, contrasted.image_id, noise)
            values["ranking"], trivial["ranking"] = ranking, torch.tensor(1.0 + number).log()
        if "itm" in active:
            matched, guesses = match_half(model, image, text, contrasted.image_id, noise)
            values["itm"], trivial["itm"] = matched["itm"], guesses["itm"]
        return values, trivial

    def _rank(
        self, image: Encoded, text: Encoded, image_id: Tensor, noise: Noise
    ) -> tuple[Tensor, int]:
        """Cross entropy of a caption among ``number`` random ones of other pictures, and number."""
        assert text.mask is not None
        rows, total = len(image.tokens), len(image_id)
        mine = slice(rank() * rows, (rank() + 1) * rows)
        same = image_id[:, None] == image_id[None, :]  # [G, G]
        number = max(1, min(self.config.negatives, int((~same).sum(1).min())))
        alike = torch.zeros(rows, total, device=same.device)
        wrong = hard_negatives(alike, same[mine], noise.rand(rows, total), number)
        own = torch.arange(mine.start, mine.stop, device=wrong.device)
        texts = torch.cat([own[:, None], wrong], dim=1).flatten()  # [B * (1 + number)]
        stream = self.model.run(
            image.tokens.repeat_interleave(1 + number, 0),
            gather_padded(text.tokens)[texts],
            gather_padded(text.mask)[texts],
        )
        logits = self.model.match_stream(stream).view(rows, 1 + number)
        return F.cross_entropy(logits, torch.zeros_like(own)), number

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)
