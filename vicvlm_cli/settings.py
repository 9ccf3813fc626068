"""What can be set of a run: frozen dataclasses, their defaults, and the values that are allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vicvlm_cli.errors import UsageError


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the two encoders and the fusion encoder.

    ``image_encoder`` is any timm ViT by name (``image_options`` go to ``timm.create_model``) and
    ``image_weights`` is ``""`` (random), ``"hub"`` (timm's own download) or a local file.
    ``text_encoder`` is ``""`` (a BERT of the sizes below, from scratch, with a WordPiece vocabulary
    trained on the captions) or a transformers BERT by name or local folder, of which the first
    ``text_layers`` become the text encoder and the last ``fusion_layers`` the fusion encoder.
    """

    image_encoder: str = "vit_small_patch16_224"
    image_weights: str = ""
    image_size: int = 224
    eval_image_scale: float = 1.0  # side of pictures that are embedded, in that of training
    eval_views: int = 1  # of each picture that is embedded, their mean: see transforms.other_views
    image_options: dict[str, Any] = field(default_factory=dict)
    image_layers: int = 0  # how many first blocks are kept; 0, or more than there are: all
    image_pool: str = "mean"  # or "max", which finds small things sooner; the class token is added
    image_positions: str = "learned"  # or "sincos": fixed-scale start, for short runs from scratch
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    text_encoder: str = ""
    text_layers: int = 2
    fusion_layers: int = 2
    text_width: int = 512
    text_heads: int = 8
    text_dropout: float = 0.1
    vocab_size: int = 8000
    max_tokens: int = 32
    projection_dim: int = 256
    fusion: str = "concat"  # cross_attention, co_attention; of a dual encoder alone: shared, none
    fusion_options: dict[str, Any] = field(default_factory=dict)  # of stacked_attention
    temperature: float = 0.07


@dataclass(frozen=True)
class DataConfig:
    """How prepared pictures become training batches."""

    captions: str = "all"  # "all": every pair once an epoch; "one": every image once, one caption
    more_captions: int = 0  # further captions of each picture that ITC contrasts in the same step
    crop_scale: float = 0.5  # smallest area of a random crop, as a share of the picture
    # Mirroring, where the caption names no side in English, German, French, Spanish, Italian,
    # Portuguese or Dutch; false is for captions in other languages.
    flip: bool = True
    color_jitter: float = 0.0  # off: captions name colours
    word_dropout: float = 0.0  # share of the captions' words that are hidden from training
    workers: int = -1  # loader processes; -1: one a spare core
    # Pictures are decoded once, into a file beside the data set, if cache is on; else once into
    # memory, if all of them fit in cache_mb; else every time.
    cache: bool = False
    cache_mb: int = 2000


@dataclass(frozen=True)
class LossConfig:
    """Weight of one loss: 0 before ``start``, rising linearly over ``ramp`` (shares of the run).

    It is computed on every ``every``-th step only: a dear loss can be had for less.
    """

    weight: float = 1.0
    start: float = 0.0
    ramp: float = 0.0
    every: int = 1

    def at(self, progress: float, step: int = 0) -> float:
        """The weight in force at ``step`` when ``progress`` (0 to 1) of the run is done."""
        if progress < self.start or self.weight == 0 or step % self.every:
            return 0.0
        if self.ramp <= 0:
            return self.weight
        return self.weight * min(1.0, (progress - self.start) / self.ramp)


@dataclass(frozen=True)
class TrainConfig:
    """One training: the objective, its losses and the optimisation."""

    objective: str = "vicvlm"
    options: dict[str, Any] = field(default_factory=dict)  # the objective's own Config
    losses: dict[str, LossConfig] = field(default_factory=dict)
    epochs: float = 15.0
    max_minutes: float = 0.0  # 0: no limit; else the schedule ends with the time
    clock: str = "wall"  # or "cpu": the training's own CPU time a thread, to compare by
    batch_size: int = 96  # pairs a process and step
    accumulate: int = 1
    contrastive_batch: int = 0  # pairs a process that ITC is over, a multiple of batch_size; 0: one
    lr: float = 2.5e-4
    image_lr: float = 0.0  # 0: the same as lr
    # Lowest blocks of the image encoder that keep their weights; where image_layers cuts it, at
    # most those that are left.
    frozen_blocks: int = 0
    # After so many epochs, or a quarter of the run, they train as well; 0: never.
    frozen_epochs: float = 0.0
    # Views of each picture that go through the frozen blocks beforehand, every second one mirrored;
    # 0: each view anew.
    cached_views: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the run
    warmup_steps: int = 0  # at least as many steps, up to a third of the run
    final_lr: float = 0.04  # share of the peak
    grad_clip: float = 1.0
    precision: str = "auto"  # auto, no, bf16, fp16
    seed: int = 0
    validate_every: float = 1.0  # epochs between validations; 0: only at the end
    validation_images: int = 1000  # at most
    select: str = "best"  # "best" on validation recall, or "last"
    rerank_top_k: int = 32  # candidates when choosing the re-ranking weight on validation
    state_minutes: float = 10.0  # between two saves of what resuming needs

    @property
    def step_batches(self) -> int:
        """Batches of an optimiser step.

        Raises:
            UsageError: ``contrastive_batch`` is no multiple of ``batch_size``, or stands beside
                ``accumulate``.
        """
        pairs, size = self.contrastive_batch, self.batch_size
        if pairs in (0, size):  # one batch
            return self.accumulate
        if pairs % size:
            raise UsageError(
                f"--contrastive-batch is {pairs}, not a multiple of --batch-size, which is {size}: "
                f"give {max(round(pairs / size), 1) * size}, or another batch size"
            )
        if self.accumulate > 1:
            raise UsageError(
                f"--contrastive-batch {pairs} accumulates {pairs // size} batches by itself: leave "
                f"accumulate at 1, not {self.accumulate}"
            )
        return pairs // size

    @property
    def caches_contrast(self) -> bool:
        """Whether ITC is over more batches than one."""
        return self.contrastive_batch > self.batch_size

    @property
    def predicts_words(self) -> bool:
        """Whether batches come with the words of all captions of their pictures."""
        return "words" in self.losses and self.losses["words"].weight > 0


@dataclass(frozen=True)
class Config:
    """Everything a run needs; what a preset, a file and ``--set`` fill in."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(objective="retrieval"))


VIEWS = (1, 2, 3, 7)  # of a picture: whole, its mirror image, its centre, its four corners
CHOICES: dict[str, tuple[str | int, ...]] = {
    "model.image_pool": ("mean", "max"),
    "model.eval_views": VIEWS,
    "model.image_positions": ("learned", "sincos"),
    "model.fusion": (
        "concat",
        "cross_attention",
        "co_attention",
        "shared",
        "stacked_attention",
        "single_stream",
        "none",
    ),
    "data.captions": ("all", "one"),
    "pretrain.precision": ("auto", "no", "bf16", "fp16"),
    "finetune.precision": ("auto", "no", "bf16", "fp16"),
    "pretrain.clock": ("wall", "cpu"),
    "finetune.clock": ("wall", "cpu"),
    "pretrain.select": ("best", "last"),
    "finetune.select": ("best", "last"),
}
POSITIVE = (
    *("image_size", "text_width", "text_heads", "vocab_size", "max_tokens", "projection_dim"),
    *("temperature", "eval_image_scale", "crop_scale", "batch_size", "accumulate", "epochs"),
    *("lr", "grad_clip"),
    *("itm_negatives", "masked_stride", "predictor_width", "every"),
)
NOT_NEGATIVE = (
    *("weight", "start", "ramp", "seed", "max_minutes", "image_lr", "weight_decay", "warmup"),
    *("validate_every", "validation_images", "rerank_top_k", "color_jitter", "text_dropout"),
    *("warmup_steps", "more_captions", "word_dropout"),
    *("frozen_blocks", "frozen_epochs", "cached_views", "contrastive_batch", "image_layers"),
)
BELOW_ONE = ("text_dropout", "word_dropout")
