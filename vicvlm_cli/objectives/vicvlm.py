"""VicVLM: masked image, joint masked image and masked language modelling, VICReg, ITC and ITM.

The equations, and where this departs from the first public code, are in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.attention import take
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses, targets
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, match, require_matching
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.heads import JointPatchHead, MLMHead, PatchPredictor
from vicvlm_cli.objectives.masked_language import hide_words, positions, token_kinds, word_loss
from vicvlm_cli.objectives.masking import check_block, mask_patches
from vicvlm_cli.objectives.momentum import EmaTarget
from vicvlm_cli.objectives.ranks import Noise, gather, global_mean
from vicvlm_cli.objectives.retrieval import Losses
from vicvlm_cli.objectives.vicreg import TERMS, ProjectedVICReg, vicreg_terms


class _MaskedImage(NamedTuple):
    """Tokens of the masked picture, patch numbers, and the target of every patch."""

    tokens: Tensor  # [R, prefix + K, D]
    encoded: Tensor  # [R, K], the patches that the tokens are of: the visible, or all
    masked: Tensor  # [R, M]
    target: Tensor  # [R, N, T]


class VicVLM(nn.Module):
    """Masked modelling around one shared pass over the clean pair.

    Raises:
        UsageError: an option is out of range for this model.
    """

    LOSSES = ("itc", "itm", "mim", "joint_mim", "mlm", "variance", "covariance", "invariance")
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    # Small weights, and ITC first: with all at 1 from the start, short trainings learn nothing.
    RECIPE: ClassVar[dict[str, Any]] = {
        "pretrain": {
            "losses": {
                "itc": {},
                "itm": {"weight": 0.5, "start": 0.3, "ramp": 0.1},
                "mlm": {"weight": 0.2, "start": 0.3, "ramp": 0.1},
                "mim": {"weight": 0.1, "start": 0.3, "ramp": 0.1},
                "joint_mim": {"weight": 0.1, "start": 0.3, "ramp": 0.1},
                "variance": {"weight": 0.02, "start": 0.3, "ramp": 0.1},
                "covariance": {"weight": 0.002, "start": 0.3, "ramp": 0.1},
                "invariance": {"weight": 0.02, "start": 0.3, "ramp": 0.1},
            }
        },
        "finetune": {"objective": "retrieval", "losses": {"itc": {}, "itm": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """Options of the method.

        ``target``: ``byol`` (features of the EMA image encoder) or ``pixel``. ``image_mask`` and
        ``text_mask``: shares hidden; ``mask_block``: side of a hidden block in patches.
        ``masked_stride``: the masked passes take every n-th row of the batch (1: all).
        ``vicreg``: its terms are of the ``multimodal`` features of the three pairs, or of the
        ``projections`` of picture and caption, which take no pass of their own.
        ``drop_hidden``: the image encoder does without the hidden patches; else a mask token stands
        in for each, and what becomes of it is what is predicted from.
        """

        target: str = "byol"
        image_mask: float = 0.75
        mask_block: int = 2
        text_mask: float = 0.25
        ema_decay: float = 0.995
        itm_negatives: int = 1
        masked_stride: int = 1
        drop_hidden: bool = True
        vicreg: str = "multimodal"
        predictor_width: int = 192
        predictor_depth: int = 2

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        require_matching(model, "vicvlm")
        if config.target not in ("byol", "pixel"):
            raise UsageError(f"--target is {config.target!r}, not byol or pixel")
        if config.vicreg not in ("multimodal", "projections"):
            raise UsageError(f"options.vicreg is {config.vicreg!r}, not multimodal or projections")
        for name in ("image_mask", "text_mask"):
            if not 0 < getattr(config, name) < 1:
                raise UsageError(f"options.{name} must be between 0 and 1")
        if not 0 <= config.ema_decay <= 1:
            raise UsageError("options.ema_decay must be from 0 to 1")
        if config.predictor_width % 32:
            raise UsageError("options.predictor_width must be a multiple of 32, the size of a head")
        encoder = model.image_encoder
        check_block(encoder.grid, config.mask_block)
        self.model, self.config = model, config
        width = model.config.text_width
        side = model.config.image_size // encoder.grid[0]
        out = encoder.width if config.target == "byol" else 3 * side * side
        self.target = EmaTarget(encoder, config.ema_decay) if config.target == "byol" else None
        self.has_image_outputs = model.config.fusion == "concat"
        dropped = config.drop_hidden
        self.mask_token = None if dropped else nn.Parameter(torch.randn(encoder.width) * 0.02)
        predictor = partial(
            PatchPredictor,
            encoder.width,
            encoder.grid,
            out,
            width=config.predictor_width,
            depth=config.predictor_depth,
            dropped=dropped,
        )
        self.mim_head = predictor()
        self.joint_head = (
            JointPatchHead(encoder.width, encoder.grid, width, out, dropped=dropped)
            if self.has_image_outputs
            else predictor(context_width=width)
        )
        self.mlm_head = MLMHead(width, model.config.vocab_size)
        self.projected = ProjectedVICReg(model) if config.vicreg == "projections" else None
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
        if self.projected is not None:
            self.projected.projections.begin()
        image = model.encode_image(batch.image, batch.begun)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        contrasted = contrast(model, image, text, batch, cached)
        values = {"itc": contrasted.loss}
        trivial = {"itc": contrasted.trivial}
        clean: Tensor | None = None
        if "itm" in active:
            values["itm"], clean = match(model, image, text, contrasted, noise, number)
            trivial["itm"] = torch.tensor(losses.itm_base_rate(2 * number))
        if self.projected is not None and not active.isdisjoint(TERMS):
            terms, guesses = self.projected(active, batch)
            values, trivial = {**values, **terms}, {**trivial, **guesses}
            active = active - set(TERMS)
        if active <= {"itc", "itm"}:
            return values, trivial

        rows = slice(None, None, self.config.masked_stride)
        batch = batch.rows(rows)
        image = Encoded(image.features[rows], image.tokens[rows], None)
        text = Encoded(text.features[rows], text.tokens[rows], batch.attention_mask)
        vicreg = not active.isdisjoint(TERMS)
        pooled: dict[str, Tensor] = {}
        if vicreg:
            pooled["clean"] = (
                clean[rows]
                if clean is not None
                else model.fuse(
                    image.tokens, None, text.tokens, batch.attention_mask, want="pooled"
                ).pooled
            )
        if vicreg or "mim" in active or "joint_mim" in active:
            masked = self._mask_image(batch, noise)
            if "mim" in active:
                patches = masked.tokens[:, model.image_encoder.prefix :]
                guess = self.mim_head(patches, masked.encoded, masked.masked)
                values["mim"] = self._mim(guess, masked)
                trivial["mim"] = losses.mim_trivial(masked.target, masked.masked)
            if vicreg or "joint_mim" in active:
                guess, pooled["masked_image"] = self._joint(masked, text)
                if "joint_mim" in active:
                    values["joint_mim"] = self._mim(guess, masked)
                    trivial["joint_mim"] = losses.mim_trivial(masked.target, masked.masked)
        if vicreg or "mlm" in active:
            mlm, guess, pooled["masked_text"] = self._mlm(batch, image, noise)
            if "mlm" in active:
                values["mlm"], trivial["mlm"] = mlm, guess
        if vicreg:
            z = {name: gather(x.float()) for name, x in pooled.items()}
            pairs = [(z["clean"], z["masked_image"]), (z["clean"], z["masked_text"])]
            terms, guesses = vicreg_terms(list(z.values()), pairs, active)
            values, trivial = {**values, **terms}, {**trivial, **guesses}
        return values, trivial

    def after_step(self) -> None:
        """Bound the temperature and move the target network; once an optimiser step."""
        clamp_temperature(self.model)
        if self.target is not None:
            self.target.update(self.model.image_encoder)

    def _mask_image(self, batch: Batch, noise: Noise) -> _MaskedImage:
        encoder, cfg = self.model.image_encoder, self.config
        pixels = self.model.normalize(batch.image)
        blocks = encoder.num_patches // cfg.mask_block**2
        draw = noise.rand(len(pixels), blocks)
        keep, masked = mask_patches(draw, encoder.grid, cfg.mask_block, cfg.image_mask)
        with torch.no_grad():
            if self.target is None:
                target = targets.normalized_pixels(pixels, encoder.grid)
            else:
                tokens = self.target.module(pixels, begun=batch.begun)
                target = targets.standardize_patches(tokens[:, encoder.prefix :])
        if self.mask_token is None:
            return _MaskedImage(encoder(pixels, keep), keep, masked, target)
        everywhere = torch.arange(encoder.num_patches, device=draw.device).expand(len(draw), -1)
        hidden = torch.zeros_like(everywhere, dtype=torch.bool).scatter(1, masked, True)
        tokens = encoder(pixels, hidden=hidden, mask_token=self.mask_token)
        return _MaskedImage(tokens, everywhere, masked, target)

    def _mim(self, guess: Tensor, masked: _MaskedImage) -> Tensor:
        total = losses.mim_sum(guess, take(masked.target, masked.masked))
        return global_mean(total, masked.masked.numel())

    def _joint(self, masked: _MaskedImage, text: Encoded) -> tuple[Tensor, Tensor]:
        """Predictions [R, M, T] from the multimodal encoder, and (I', T) pooled [R, D]."""
        assert text.mask is not None
        prefix = self.model.image_encoder.prefix
        if isinstance(self.joint_head, JointPatchHead):
            tokens, at = self.joint_head.places(
                masked.tokens, prefix, masked.encoded, masked.masked
            )
            fused = self.model.fuse(tokens, None, text.tokens, text.mask, want="image", at=at)
            assert fused.image is not None
            return self.joint_head(fused.image), fused.pooled
        fused = self.model.fuse(masked.tokens, None, text.tokens, text.mask)
        patches = masked.tokens[:, prefix:]
        guess = self.joint_head(patches, masked.encoded, masked.masked, fused.text, text.mask)
        return guess, fused.pooled

    def _mlm(self, batch: Batch, image: Encoded, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Masked language modelling with the picture in view.

        Returns:
            The loss, the trivial value, and (I, T') pooled [R, D].
        """
        ids, hidden = hide_words(
            batch,
            self.special,
            self.continuation,
            noise,
            ratio=self.config.text_mask,
            max_tokens=self.model.config.max_tokens,
            mask_id=self.mask_id,
        )
        text = self.model.encode_text(ids, batch.attention_mask)
        mask = batch.attention_mask
        at, real = positions(hidden)
        fused = self.model.fuse(image.tokens, None, text.tokens, mask, want="text", at=at)
        loss, guess = word_loss(
            self.mlm_head,
            fused.text[real],
            self.model.text_encoder.word_embeddings,
            batch.input_ids[hidden],
            self.token_counts,
            count=self.training,
        )
        return loss, guess, fused.pooled
