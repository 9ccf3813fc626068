"""What the last commands made, so that the next ones need not be told: one small JSON file.

The file is ``$VICVLM_STATE``, or ``vicvlm/last.json`` in ``$XDG_STATE_HOME`` (``~/.local/state``).
It is a convenience only: a damaged file counts as an empty one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from vicvlm_cli.errors import UsageError, UserError

# kind: what it is called, and the command that makes one
KINDS = {
    "data": ("prepared data set", "vicvlm prepare SOURCE DIR"),
    "checkpoint": ("checkpoint", "vicvlm pretrain"),
    "gallery": ("gallery", "vicvlm embed"),
}


def state_file() -> Path | None:
    """Where the memory is kept; the file need not exist. None for a user without a home."""
    if override := os.environ.get("VICVLM_STATE"):
        return Path(override)
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:  # as in a container under any number for a user
        return None
    return Path(base) / "vicvlm" / "last.json"


def last(kind: str) -> Path | None:
    """The path remembered for ``kind``, whether or not it still exists; None if there is none."""
    path = _read().get(kind)
    return Path(path) if path else None


def recall(kind: str, option: str) -> Path:
    """The path remembered for ``kind``; ``option`` is what to name in the advice, as ``--data``.

    Raises:
        UsageError: nothing is remembered.
        UserError: what is remembered has since been moved or deleted.
    """
    name, command = KINDS[kind]
    path = last(kind)
    if path is None:
        raise UsageError(f"there is no {name} yet: give {option}, or make one with `{command}`")
    if not os.path.exists(path):  # Path's own raises where one may not look
        raise UserError(
            f"the last {name}, {path}, is no longer there: give {option}, "
            f"or make one with `{command}`"
        )
    return path


def remember(kind: str, path: Path) -> bool:
    """Note ``path`` as the last of its ``kind``; False if the file cannot be written."""
    if kind not in KINDS:
        raise KeyError(kind)
    if (file := state_file()) is None:
        return False
    content = json.dumps(_read() | {kind: str(path.resolve())}, indent=1)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, file)
    except OSError:
        return False
    return True


def _read() -> dict[str, str]:
    if (file := state_file()) is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if k in KINDS and isinstance(v, str)}
