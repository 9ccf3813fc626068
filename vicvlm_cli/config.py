"""Run configuration: settings filled from a preset, then a file, then ``key=value``.

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
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from vicvlm_cli.errors import UsageError
from vicvlm_cli.settings import BELOW_ONE, CHOICES, NOT_NEGATIVE, POSITIVE, Config, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


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
            problems.append(f"{path} is {raw!r}, not one of {', '.join(map(str, CHOICES[path]))}")
        number = values[key] if isinstance(values[key], (int, float)) else 1
        if key in POSITIVE and number <= 0:
            problems.append(f"{path} is {raw!r}, and must be above 0")
        if key in NOT_NEGATIVE and number < 0:
            problems.append(f"{path} is {raw!r}, and must not be below 0")
        if key in BELOW_ONE and number >= 1:
            problems.append(f"{path} is {raw!r}, and must be below 1")
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
    losses and options, which are of its own method, go. Where both are fine-tuned by one objective,
    its losses there count as much and as often as in the preset; one that the preset has off, as
    its own method does without it, is on. A method that is fine-tuned with
    itself has the options of pretraining there too, where it has none of its own.
    """
    table: dict[str, Any] = dict(base or {})
    if preset:
        table = merge(table, read_preset(preset))
    over: dict[str, Any] = read_file(file) if file else {}
    for text in overrides:
        over = merge(over, parse_override(text))
    wanted = _objective(over) or _objective(table) or TrainConfig.objective
    if recipe_of and wanted != _objective(table):
        recipe = recipe_of(str(wanted))
        for kind in ("pretrain", "finetune"):
            preset_stage, own = table.get(kind, {}), recipe.get(kind, {})
            stage = {k: v for k, v in preset_stage.items() if k not in METHOD_SETTINGS}
            method = _objective(recipe, kind)
            if method and method == _objective(table, kind) == (_objective(over, kind) or method):
                losses = preset_stage.get("losses", {})
                stage["losses"] = {k: _on(v) for k, v in losses.items() if k in own["losses"]}
            table = {**table, kind: stage}
        table = merge(table, recipe)
    table = merge(table, over)
    method = _objective(table)
    if method is not None and method == _objective(table, "finetune"):
        options = table["pretrain"].get("options")
        if isinstance(options, Mapping):
            shared = {k: v for k, v in options.items() if k not in BESIDE_OPTIONS}
            table = merge({"finetune": {"options": shared}}, table)
    return from_dict(Config, table)


METHOD_SETTINGS = ("objective", "losses", "options")
BESIDE_OPTIONS = ("expander",)  # of losses beside the method's own, which fine-tuning may not have


def _on(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a loss, without its weight if that is 0."""
    return {k: v for k, v in loss.items() if k != "weight" or v}


def _objective(table: Mapping[str, Any], kind: str = "pretrain") -> Any:
    stage = table.get(kind, {})
    return stage.get("objective") if isinstance(stage, Mapping) else None
