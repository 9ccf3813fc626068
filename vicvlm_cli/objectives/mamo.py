"""MAMO: masked multimodal modelling against an EMA copy of the whole model (arXiv 2210.04183)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.attention import take
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses, targets
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, match, require_matching
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.heads import MLMHead
from vicvlm_cli.objectives.masked_language import hide_words, positions, token_kinds, word_loss
from vicvlm_cli.objectives.masking import check_block, mask_patches
from vicvlm_cli.objectives.momentum import EmaTarget
from vicvlm_cli.objectives.ranks import Noise, global_mean
from vicvlm_cli.objectives.retrieval import Losses


class _Clean(NamedTuple):
    """What the EMA model makes of the pair; the multimodal tokens only where MRM is on."""

    visual: Tensor  # [B, N, D_i]
    patches: Tensor | None  # [B, N, D]
    words: Tensor | None  # [B, L, D]


class MAMO(nn.Module):
    """ITC, ITM, MLM with the picture in view, MIM and MRM at equal weights (eq. 6).

    The masked picture with the caption, and the picture with the masked caption, are fused once
    each. At the hidden places MIM predicts the EMA model's visual features of the whole picture,
    MRM its multimodal features of the whole pair.

    Raises:
        UsageError: an option is out of range for this model, or its fusion has no image outputs.
    """

    LOSSES = ("itc", "itm", "mlm", "mim", "mrm")
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "concat", "eval_image_scale": 1.0},
        "pretrain": {"losses": {"itc": {}, "itm": {}, "mlm": {}, "mim": {}, "mrm": {}}},
        "finetune": {"objective": "retrieval", "losses": {"itc": {}, "itm": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """Options of the method.

        ``variant``: ``paper``, or ``seed``, the small re-implementation that VicVLM was first
        compared with: hidden patches are blank pixels, MLM sees no picture, both sides of MRM go
        through one shared layer, and MIM and MRM are sums over channels. ``image_mask`` and
        ``text_mask``: shares hidden; ``mask_block``: side of a hidden block in patches.
        """

        variant: str = "paper"
        image_mask: float = 0.75
        mask_block: int = 2
        text_mask: float = 0.25
        ema_decay: float = 0.995
        itm_negatives: int = 1

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        require_matching(model, "mamo")
        if model.config.fusion != "concat":
            raise UsageError(
                "mamo reads hidden patches and words from one joint sequence, which "
                f"model.fusion={model.config.fusion} does not have: set model.fusion=concat"
            )
        if config.variant not in ("paper", "seed"):
            raise UsageError(f"--variant is {config.variant!r}, not paper or seed")
        for name in ("image_mask", "text_mask"):
            if not 0 < getattr(config, name) < 1:
                raise UsageError(f"options.{name} must be between 0 and 1")
        if not 0 <= config.ema_decay <= 1:
            raise UsageError("options.ema_decay must be from 0 to 1")
        encoder = model.image_encoder
        check_block(encoder.grid, config.mask_block)
        assert model.fusion is not None
        self.model, self.config = model, config
        self.ema_image = EmaTarget(encoder, config.ema_decay)
        self.ema_text = EmaTarget(model.text_encoder, config.ema_decay)
        self.ema_fusion = EmaTarget(model.fusion, config.ema_decay)
        width = model.config.text_width
        self.mask_token: nn.Parameter | None = None
        if config.variant == "paper":
            self.mask_token = nn.Parameter(torch.randn(encoder.width) * 0.02)
            self.mim_head = _predictor(width, encoder.width)
            self.mrm_head = _predictor(width, width)
        else:
            self.mim_head = nn.Sequential(nn.Linear(width, encoder.width))
            self.mrm_head = nn.Sequential(nn.Linear(width, width), nn.Tanh())
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
        if "mim" in active or "mrm" in active:
            clean = self._clean(batch, multimodal="mrm" in active)
            masked, patches = self._masked_image(batch, text, noise)
            if "mim" in active:
                values["mim"], trivial["mim"] = self._mim(patches, clean.visual, masked)
        if "mlm" in active or "mrm" in active:
            hidden, of_mlm, of_mrm = self._masked_text(batch, image, noise, "mrm" in active)
            if "mlm" in active:
                values["mlm"], trivial["mlm"] = word_loss(
                    self.mlm_head,
                    of_mlm,
                    model.text_encoder.word_embeddings,
                    batch.input_ids[hidden],
                    self.token_counts,
                    count=self.training,
                )
            if "mrm" in active:
                assert of_mrm is not None
                values["mrm"], trivial["mrm"] = self._mrm(patches, of_mrm, clean, masked, hidden)
        return values, trivial

    def after_step(self) -> None:
        """Bound the temperature and, in training, move the EMA model; once an optimiser step."""
        clamp_temperature(self.model)
        if self.training:
            assert self.model.fusion is not None
            self.ema_image.update(self.model.image_encoder)
            self.ema_text.update(self.model.text_encoder)
            self.ema_fusion.update(self.model.fusion)

    @torch.no_grad()
    def _clean(self, batch: Batch, multimodal: bool) -> _Clean:
        prefix = self.model.image_encoder.prefix
        image = self.ema_image.module(self.model.normalize(batch.image), begun=batch.begun)
        if not multimodal:
            return _Clean(image[:, prefix:], None, None)
        text = self.ema_text.module(batch.input_ids, batch.attention_mask)
        fused = self.ema_fusion.module(image, None, text, batch.attention_mask)
        return _Clean(image[:, prefix:], fused.image[:, prefix:], fused.text)

    def _masked_image(self, batch: Batch, text: Encoded, noise: Noise) -> tuple[Tensor, Tensor]:
        """The hidden patches, long [B, M], and the multimodal tokens of (I', T) there [B, M, D]."""
        encoder, cfg = self.model.image_encoder, self.config
        pixels = self.model.normalize(batch.image)
        draw = noise.rand(len(pixels), encoder.num_patches // cfg.mask_block**2)
        _, masked = mask_patches(draw, encoder.grid, cfg.mask_block, cfg.image_mask)
        hidden = torch.zeros(len(pixels), encoder.num_patches, dtype=torch.bool, device=draw.device)
        hidden.scatter_(1, masked, True)
        if self.mask_token is None:
            tokens = encoder(_blank(pixels, hidden, encoder.grid))
        else:
            tokens = encoder(pixels, hidden=hidden, mask_token=self.mask_token)
        assert text.mask is not None
        fused = self.model.fuse(
            tokens, None, text.tokens, text.mask, want="image", at=masked + encoder.prefix
        )
        assert fused.image is not None
        return masked, fused.image

    def _masked_text(
        self, batch: Batch, image: Encoded, noise: Noise, multimodal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The hidden words, bool [B, L], and the tokens [H, D] that MLM and MRM read them from.

        ``seed`` needs the fusion for MRM alone: without ``multimodal`` the last is None.
        """
        hidden_ids, hidden = hide_words(
            batch,
            self.special,
            self.continuation,
            noise,
            ratio=self.config.text_mask,
            max_tokens=self.model.config.max_tokens,
            mask_id=self.mask_id,
        )
        unimodal = self.config.variant == "seed"
        tokens = self.model.text_encoder(hidden_ids, batch.attention_mask)
        if unimodal and not multimodal:
            return hidden, tokens[hidden], None
        mask = batch.attention_mask
        at, real = positions(hidden)
        words = self.model.fuse(image.tokens, None, tokens, mask, want="text", at=at).text[real]
        return hidden, tokens[hidden] if unimodal else words, words

    def _mim(self, patches: Tensor, visual: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """L1 between predictions from [B, M, D] and the EMA visual features [B, N, D_i]."""
        guess = self.mim_head(patches).float()
        channels = 1
        if self.config.variant == "seed":
            guess, target = F.normalize(guess, dim=-1), F.normalize(visual.float(), dim=-1)
            channels = target.shape[-1]
        else:
            # What all patches of a picture share goes: it is most of what a ViT's patches are, and
            # predicting it is no task. Layer normalisation would leave it in.
            target = targets.standardize_patches(visual)
        total = losses.l1_sum(guess, take(target, masked))
        trivial = losses.l1_trivial(target, masked)
        return channels * global_mean(total, masked.numel()), channels * trivial

    def _mrm(
        self, patches: Tensor, words: Tensor, clean: _Clean, masked: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L2 between predictions at hidden patches [B, M, D] and words [H, D] and EMA features.

        ``paper`` takes the mean of the two sides, ``seed`` their sum, and the sum over channels.
        """
        assert clean.patches is not None and clean.words is not None
        of_patches, of_words = self._latent(clean.patches), self._latent(clean.words[hidden])
        target = take(of_patches, masked)
        sides = (
            global_mean(losses.mim_sum(self.mrm_head(patches), target), masked.numel()),
            global_mean(losses.mim_sum(self.mrm_head(words), of_words), len(of_words)),
        )
        guesses = losses.mim_trivial(of_patches, masked), losses.mean_trivial(of_words)
        scale = target.shape[-1] if self.config.variant == "seed" else 0.5
        return scale * (sides[0] + sides[1]), scale * (guesses[0] + guesses[1])

    def _latent(self, fused: Tensor) -> Tensor:
        """EMA multimodal tokens [..., D] as the target of MRM."""
        if self.config.variant == "seed":
            # Not under no_grad: autocast would keep the head's weights for its next use, cast and
            # without their gradient.
            latent: Tensor = self.mrm_head(fused)
            return latent.detach().float()
        # Of fixed size, so that shrinking all features to nothing is no way to predict them; token
        # by token, since a caption of one word has nothing to standardise over.
        return F.layer_norm(fused.float(), fused.shape[-1:])


def _predictor(width: int, out: int) -> nn.Sequential:
    """BYOL's predictor (arXiv 2006.07733, sec. 3.1), on the online side alone."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out))


def _blank(pixels: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Normalised pixels [B, 3, H, W], 0 in the patches that are ``hidden``, bool [B, N]."""
    height, width = pixels.shape[2] // grid[0], pixels.shape[3] // grid[1]
    blank = hidden.view(-1, 1, *grid)  # [B, 1, rows, columns]
    blank = blank.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return pixels.masked_fill(blank, 0.0)
