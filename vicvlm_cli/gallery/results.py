"""What embedding and searching return."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vicvlm_cli.errors import UserError


@dataclass(frozen=True)
class EmbedResult:
    """A gallery that was written: how many pictures, and which could not be read and why."""

    path: Path
    source: Path
    model_path: Path
    model_sha256: str
    count: int
    dim: int
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """Skipped pictures by reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.skipped).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "gallery": str(self.path),
            "source": str(self.source),
            "model": {"path": str(self.model_path), "sha256": self.model_sha256},
            "count": self.count,
            "dim": self.dim,
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
        }


@dataclass(frozen=True)
class Hit:
    """One picture found. `score` orders the hits; without re-ranking it is the cosine, for words
    less what the model's query bank takes off a hub.

    `row` is the picture's row in the gallery and `path` where a person finds it.
    """

    rank: int
    score: float
    cosine: float
    path: str
    id: str
    captions: list[str]
    row: int

    @property
    def caption(self) -> str:
        """The first caption, or nothing."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class RetrieveResult:
    """The hits of one query, best first; `query` is its text or its picture's path.

    `sheet` is where they are drawn, `sheet_error` why they are not, though that was asked for.
    """

    query: str
    by_image: bool
    gallery: Path
    searched: int
    reranked: bool
    hits: list[Hit]
    sheet: Path | None = None
    sheet_error: UserError | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "image" if self.by_image else "query": self.query,
            "gallery": str(self.gallery),
            "searched": self.searched,
            "reranked": self.reranked,
            "hits": [{**asdict(hit), "caption": hit.caption} for hit in self.hits],
            "sheet": str(self.sheet) if self.sheet else None,
        }
