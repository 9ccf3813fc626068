"""MaskVLM: each modality is rebuilt with the help of the other, whole one (arXiv 2208.02131)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.fusion import CoAttentionFusion
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses, targets
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, match, require_matching
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.heads import CrossAttentionPatchHead, MLMHead
from vicvlm_cli.objectives.masked_language import hide_words, token_kinds, word_loss
from vicvlm_cli.objectives.masking import check_block, mask_patches
from vicvlm_cli.objectives.ranks import Noise, global_mean
from vicvlm_cli.objectives.retrieval import Losses


class MaskVLM(nn.Module):
    """ITC and ITM of the clean pair, MLM and MIM at equal weights; one modality masked at a time.

    The masked picture goes through the encoder with a mask token at its hidden patches, and then,
    with the whole caption, through the co-attention fusion and the image decoder, which predicts
    the pixels. Hidden words are read from the text stream alone, by BERT's head.

    Raises:
        UsageError: an option is out of range for this model, or its fusion is not co_attention.
    """

    LOSSES = ("itc", "itm", "mlm", "mim")
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "co_attention"},
        "pretrain": {"losses": {"itc": {}, "itm": {}, "mlm": {}, "mim": {}}},
        "finetune": {"objective": "retrieval", "losses": {"itc": {}, "itm": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """Options of the method.

        ``image_mask`` and ``text_mask``: shares hidden; ``mask_block``: side of a hidden block in
        patches (the paper's 32 pixels are 2 patches of 16); ``decoder_depth``: layers of the image
        decoder.
        """

        image_mask: float = 0.6
        mask_block: int = 2
        text_mask: float = 0.3
        decoder_depth: int = 3
        itm_negatives: int = 1

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        require_matching(model, "maskvlm")
        if not isinstance(model.fusion, CoAttentionFusion):
            raise UsageError(
                "maskvlm rebuilds each modality from a stream of its own, and "
                f"model.fusion={model.config.fusion} has not both: set model.fusion=co_attention"
            )
        for name in ("image_mask", "text_mask"):
            if not 0 < getattr(config, name) < 1:
                raise UsageError(f"options.{name} must be between 0 and 1")
        if config.decoder_depth < 1:
            raise UsageError("options.decoder_depth must be 1 or more")
        encoder = model.image_encoder
        check_block(encoder.grid, config.mask_block)
        self.model, self.config = model, config
        width, heads = model.config.text_width, model.config.text_heads
        side = model.config.image_size // encoder.grid[0]
        self.mask_token = nn.Parameter(torch.randn(encoder.width) * 0.02)
        self.mim_head = CrossAttentionPatchHead(
            width, heads, config.decoder_depth, 3 * side * side, model.config.text_dropout
        )
        self.mlm_head = MLMHead(width, model.config.vocab_size)
        self.mask_id = tokenizer.mask_id
        special, continuation = token_kinds(tokenizer, model.config.vocab_size)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        # How often each token was a masked one: the trivial guess for masked language modelling.
        self.register_buffer("token_counts", torch.ones(model.config.vocab_size))

    special: Tensor
    continuation: Tensor
    token_counts: Tensor

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active`` (ITC always), and the trivial value of each."""
        model, number = self.model, self.config.itm_negatives
        image = model.encode_image(batch.image, batch.begun)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        contrasted = contrast(model, image, text, batch, cached)
        values = {"itc": contrasted.loss}
        trivial = {"itc": contrasted.trivial}
        if "itm" in active:
            values["itm"], _ = match(model, image, text, contrasted, noise, number)
            trivial["itm"] = torch.tensor(losses.itm_base_rate(2 * number))
        if "mim" in active:
            values["mim"], trivial["mim"] = self._mim(batch, text, noise)
        if "mlm" in active:
            values["mlm"], trivial["mlm"] = self._mlm(batch, image, noise)
        return values, trivial

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)

    def _mim(self, batch: Batch, text: Encoded, noise: Noise) -> tuple[Tensor, Tensor]:
        """L1 on the pixels of hidden patches of (I', T), and its trivial value."""
        encoder, cfg = self.model.image_encoder, self.config
        pixels = self.model.normalize(batch.image)
        draw = noise.rand(len(pixels), encoder.num_patches // cfg.mask_block**2)
        _, masked = mask_patches(draw, encoder.grid, cfg.mask_block, cfg.image_mask)
        hidden = torch.zeros(len(pixels), encoder.num_patches, dtype=torch.bool, device=draw.device)
        hidden.scatter_(1, masked, True)
        tokens = encoder(pixels, hidden=hidden, mask_token=self.mask_token)
        assert text.mask is not None
        fused = self.model.fuse(tokens, None, text.tokens, text.mask)
        assert fused.image is not None
        guess = self.mim_head(fused.image, encoder.prefix + masked, fused.text, text.mask)
        # Colours as they are, not each patch's own contrast: the caption names them.
        target = targets.patchify(pixels, encoder.grid)  # [B, N, 3 * p * p]
        index = masked.unsqueeze(-1).expand(-1, -1, target.shape[-1])
        total = losses.l1_sum(guess, target.gather(1, index))
        return global_mean(total, masked.numel()), losses.l1_trivial(target, masked)

    def _mlm(self, batch: Batch, image: Encoded, noise: Noise) -> tuple[Tensor, Tensor]:
        """Cross entropy at hidden words of (I, T'), and its trivial value."""
        ids, hidden = hide_words(
            batch,
            self.special,
            self.continuation,
            noise,
            ratio=self.config.text_mask,
            max_tokens=self.model.config.max_tokens,
            mask_id=self.mask_id,
        )
        words = self.model.text_encoder(ids, batch.attention_mask)
        fusion = self.model.fusion
        assert isinstance(fusion, CoAttentionFusion)
        fused = fusion.fuse_text(image.tokens, None, words, batch.attention_mask)
        return word_loss(
            self.mlm_head,
            fused[hidden],
            self.model.text_encoder.word_embeddings,
            batch.input_ids[hidden],
            self.token_counts,
            count=self.training,
        )
