"""Compact image-text retrieval models: prepare, pretrain, finetune, evaluate, embed, retrieve.

The names below load on first use, so that importing the package, and with it ``vicvlm --help``,
imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vicvlm_cli.checkpoint import load_model
    from vicvlm_cli.data.prepared import PreparedDataset
    from vicvlm_cli.errors import UsageError, UserError
    from vicvlm_cli.gallery import Gallery

__version__ = "0.1.0"
__all__ = ["Gallery", "PreparedDataset", "UsageError", "UserError", "load_model"]

_HOMES = {
    "Gallery": "vicvlm_cli.gallery",
    "PreparedDataset": "vicvlm_cli.data.prepared",
    "UsageError": "vicvlm_cli.errors",
    "UserError": "vicvlm_cli.errors",
    "load_model": "vicvlm_cli.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
