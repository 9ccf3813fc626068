"""Run configuration: frozen dataclasses filled from a preset, then a file, then ``key=value``.

Keys are strict: an unknown one is refused with the closest known name. Nothing here imports
torch, so that ``--help`` and configuration errors are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from vicvlm_cli.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


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
    image_options: dict[str, Any] = field(default_factory=dict)
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
    flip: bool = True  # only where the caption names no side
    color_jitter: float = 0.0  # off: captions name colours
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
    frozen_blocks: int = 0  # lowest blocks of the image encoder that keep their weights
    weight_decay: float = 0.01
    warmup: float = 0.05  # share of the run
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
        return self.contrastive_batch > self.batch_size and self.step_batches > 1


@dataclass(frozen=True)
class Config:
    """Everything a run needs; what a preset, a file and ``--set`` fill in."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(objective="retrieval"))


CHOICES = {
    "model.image_pool": ("mean", "max"),
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
    *(
        "temperature",
        "eval_image_scale",
        "crop_scale",
        "batch_size",
        "accumulate",
        "epochs",
        "lr",
        "grad_clip",
    ),
    *("itm_negatives", "masked_stride", "predictor_width", "every"),
)
NOT_NEGATIVE = (
    *("weight", "start", "ramp", "seed", "max_minutes", "image_lr", "weight_decay", "warmup"),
    *("validate_every", "validation_images", "rerank_top_k", "color_jitter", "text_dropout"),
    *("more_captions", "frozen_blocks", "contrastive_batch"),
)


def from_dict(cls: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build the frozen dataclass ``cls`` from nested plain data, checking every key and type.

    Raises:
        UsageError: every unknown key, wrong type or wrong choice, named together.
    """
    if not isinstance(mapping, Mapping):
        raise UsageError(f"the configuration {where} is {mapping!r}, not a table")
    problems: list[str] = []
    value = _build(cls, mapping, where, problems)
    if problems:
        raise UsageError("the configuration does not fit: " + "; ".join(problems))
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data for TOML, JSON or a checkpoint header; the inverse of :func:`from_dict`."""
    return dataclasses.asdict(config)


def _build(cls: type[T], mapping: Mapping[str, Any], where: str, problems: list[str]) -> T:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, raw in mapping.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"
            problems.append(f"{path!r} is not a setting{hint}")
            continue
        values[key] = _coerce(hints[key], raw, path, problems)
        if path in CHOICES and values[key] not in CHOICES[path]:
            problems.append(f"{path} is {raw!r}, not one of {', '.join(CHOICES[path])}")
        number = values[key] if isinstance(values[key], (int, float)) else 1
        if key in POSITIVE and number <= 0:
            problems.append(f"{path} is {raw!r}, and must be above 0")
        if key in NOT_NEGATIVE and number < 0:
            problems.append(f"{path} is {raw!r}, and must not be below 0")
    return cls(**values)


def _coerce(hint: Any, raw: Any, path: str, problems: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(raw, Mapping):
            problems.append(f"{path} is {raw!r}, not a table")
            return None
        return _build(hint, raw, path, problems)
    if origin is dict:
        if not isinstance(raw, Mapping):
            problems.append(f"{path} is {raw!r}, not a table")
            return {}
        inner = typing.get_args(hint)[1]
        return {k: _coerce(inner, v, f"{path}.{k}", problems) for k, v in raw.items()}
    if origin is tuple:
        if not isinstance(raw, Sequence) or isinstance(raw, str):
            problems.append(f"{path} is {raw!r}, not a list")
            return ()
        return tuple(_coerce(typing.get_args(hint)[0], v, path, problems) for v in raw)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if raw is None else _coerce(inner, raw, path, problems)
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if hint is not Any and (not isinstance(raw, hint) or (hint is int and isinstance(raw, bool))):
        problems.append(f"{path} is {raw!r}, not {_TYPE_NAMES.get(hint, hint.__name__)}")
    return raw


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``over`` laid on top; tables merge, all else is replaced."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """``pretrain.lr=1e-3`` as a nested table. Values are TOML; bare words are text.

    Raises:
        UsageError: there is no ``=`` or no key.
    """
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise UsageError(f"--set {text!r} is not KEY=VALUE, such as --set pretrain.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def preset_names() -> list[str]:
    """Names of the built-in presets."""
    folder = resources.files("vicvlm_cli") / "presets"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The plain table of a built-in preset.

    Raises:
        UsageError: there is no such preset; the message names those there are.
    """
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UsageError(f"there is no preset {name!r}: {hint}there are {', '.join(names)}")
    text = (resources.files("vicvlm_cli") / "presets" / f"{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def read_file(path: Path) -> dict[str, Any]:
    """The plain table of a TOML configuration file.

    Raises:
        UsageError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def load_config(
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    recipe_of: Callable[[str], Mapping[str, Any]] | None = None,
) -> Config:
    """Resolve ``base`` < preset < recipe < file < overrides into a checked :class:`Config`.

    Where the pretraining objective asked for is not the preset's own (or there is no preset),
    ``recipe_of`` gives that method's table. Encoders, data and schedule remain the preset's; its
    losses and options, which are of its own method, go.
    """
    table: dict[str, Any] = dict(base or {})
    if preset:
        table = merge(table, read_preset(preset))
    over: dict[str, Any] = read_file(file) if file else {}
    for text in overrides:
        over = merge(over, parse_override(text))
    wanted = _objective(over) or _objective(table) or TrainConfig.objective
    if recipe_of and wanted != _objective(table):
        for kind in ("pretrain", "finetune"):
            stage = {k: v for k, v in table.get(kind, {}).items() if k not in METHOD_SETTINGS}
            table = {**table, kind: stage}
        table = merge(table, recipe_of(str(wanted)))
    return from_dict(Config, merge(table, over))


METHOD_SETTINGS = ("objective", "losses", "options")


def _objective(table: Mapping[str, Any]) -> Any:
    stage = table.get("pretrain", {})
    return stage.get("objective") if isinstance(stage, Mapping) else None
