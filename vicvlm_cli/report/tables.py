"""Results as Rich tables. Nothing here prints: a function returns what a console can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Group
from rich.table import Table

from vicvlm_cli.data.prepared import Manifest
from vicvlm_cli.evaluation.evaluate import EvaluationReport
from vicvlm_cli.evaluation.recall import RetrievalMetrics
from vicvlm_cli.gallery.results import EmbedResult, RetrieveResult
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.blocks import block as _block
from vicvlm_cli.report.blocks import table as _table
from vicvlm_cli.report.blocks import words as _words
from vicvlm_cli.report.profile import Profile, profile_blocks

CLEARLY = 0.9  # of its trivial value: where a loss counts as learned
VALIDATIONS = 10


class Prepared(Protocol):
    """What `prepare_tables` needs of a prepared data set."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Manifest: ...


class Loss(Protocol):
    """One loss of a training; `trivial` is what a constant or mean guess gives (NaN: unknown)."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    @property
    def trivial(self) -> float: ...


class Trained(Protocol):
    """What `training_tables` needs of a training; `validation` rows are `Evaluation.to_dict`s."""

    @property
    def checkpoint(self) -> Path: ...
    @property
    def losses(self) -> Sequence[Loss]: ...
    @property
    def validation(self) -> list[dict[str, Any]]: ...
    @property
    def best(self) -> Mapping[str, Any] | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def rerank_weights(self) -> RerankWeights: ...
    @property
    def profile(self) -> Profile | None: ...


def prepare_tables(result: Prepared) -> list[Group]:
    """Images, captions and hash of every split of a prepared data set."""
    manifest = result.manifest
    table = _table("split", right=("images", "captions", "hash"))
    for split, images in manifest.images.items():
        table.add_row(
            split, f"{images:,}", f"{manifest.captions[split]:,}", manifest.split_hash[split][:8]
        )
    lines = [f"in {result.path}"]
    if manifest.partial:
        lines.append(f"partial: {manifest.partial}")
    if manifest.rejected:
        lines.append(f"left out: {_counted(manifest.rejected)}")
    if manifest.rejected_captions:
        kept = "captions left out of pictures that are kept"
        lines.append(f"{kept}: {_counted(manifest.rejected_captions)}")
    return [_block(f"{manifest.source} ({manifest.split_name})", table, lines)]


def training_tables(result: Trained) -> list[Group]:
    """The loss summary and the validations of a training, and its profile if one was made."""
    rate = result.pairs / max(result.seconds, 1e-9)
    lines = [
        f"{result.steps:,} steps, {result.pairs:,} pairs in {result.seconds / 60:.1f} minutes "
        f"({rate:,.0f} pairs/s)"
    ]
    blocks = [_block("Losses", loss_summary_table(result.losses), lines)]
    lines = [f"weights in {result.checkpoint}"]
    if result.validation:
        own = result.validation[-1].get("pair_score") or {}
        if any(result.rerank_weights) and not own.get("alone"):
            lines.append(f"ITM weight in re-ranking: {result.rerank_weights}")
        blocks.append(
            _block("Validation", _validation_table(result.validation, result.best), lines)
        )
    else:
        blocks.append(_block("Weights", None, lines))
    return blocks + (profile_blocks(result.profile) if result.profile else [])


def loss_summary_table(rows: Iterable[Loss]) -> Table:
    """Every loss beside what a constant or mean guess gives, and whether it beat that."""
    table = _table("loss", right=("weight", "first", "last", "trivial"))
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.weight:g}",
            f"{row.first:.4f}",
            f"{row.last:.4f}",
            f"{row.trivial:.4f}" if math.isfinite(row.trivial) else "",
            _verdict(row.last, row.trivial),
        )
    return table


def evaluation_tables(report: EvaluationReport) -> list[Group]:
    """The features' table and, if there are, those with the query bank and of pair scores."""
    evaluation = report.evaluation
    own = evaluation.pair_score
    alone = own is not None and own.alone
    lines = [report.data_title, *(f"note: {note}" for note in report.notes)]
    title = "Shortlist alone (cosine of the features)" if alone else "Dual encoder alone"
    blocks = [_block(title, metrics_table(evaluation.dual), lines)]
    if evaluation.banked is not None:
        title = f"With the query bank (weight {evaluation.bank_weights})"
        blocks.append(_block(title, metrics_table(evaluation.banked), lines))
    # At weight 0 it orders as the table above does, and a note says so.
    if evaluation.reranked is not None and (alone or any(evaluation.rerank_weights)):
        name = own.name if own else "ITM"
        among = f"top {evaluation.top_k}" if evaluation.top_k else "all pairs"
        title = (
            f"{name[0].upper()}{name[1:]} ({among})"
            if alone
            else f"Re-ranked by {name} ({among}, weight {evaluation.rerank_weights})"
        )
        blocks.append(_block(title, metrics_table(evaluation.reranked), lines))
    return blocks


def metrics_table(metrics: RetrievalMetrics) -> Table:
    """Recall and median rank of both directions, and their RSUM."""
    table = _table("", right=("R@1", "R@5", "R@10", "median rank", "queries"))
    for name, recall in (
        ("image retrieval (text to image)", metrics.image_retrieval),
        ("text retrieval (image to text)", metrics.text_retrieval),
    ):
        table.add_row(
            name,
            *(f"{value:.1f}" for value in (recall.r1, recall.r5, recall.r10)),
            f"{recall.median_rank:g}",
            f"{recall.queries:,}",
        )
    table.add_section()
    table.add_row("RSUM", "", "", f"{metrics.rsum:.1f}")
    return table


def gallery_tables(result: EmbedResult) -> list[Group]:
    """What was embedded, and how many pictures were not."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("directory", str(result.path)),
        ("pictures", f"{result.count:,} from {result.source}"),
        ("skipped", _counted(result.reasons) or "none"),
        ("dimensions", str(result.dim)),
        ("model", f"{result.model_path} ({result.model_sha256[:8]})"),
    ):
        table.add_row(name, _words(value))
    return [_block("Gallery", table, [])]


def hits_tables(result: RetrieveResult) -> list[Group]:
    """The pictures found, best first."""
    differ = result.reranked or any(hit.score != hit.cosine for hit in result.hits)
    table = _table("", right=("score", *(("cosine",) if differ else ())))
    table.add_column("picture", overflow="fold")
    captioned = any(hit.caption for hit in result.hits)
    if captioned:
        table.add_column("caption")
    for hit in result.hits:
        cells = [str(hit.rank), f"{hit.score:.3f}"]
        cells += [f"{hit.cosine:.3f}"] if differ else []
        words = [hit.path, hit.caption] if captioned else [hit.path]
        table.add_row(*cells, *map(_words, words))
    title = f"Pictures like {result.query}" if result.by_image else result.query
    lines = [f"the best {len(result.hits):,} of {result.searched:,} pictures in {result.gallery}"]
    if result.sheet is not None:
        lines.append(f"drawn in {result.sheet}")
    return [_block(title, table, lines)]


def _validation_table(rows: list[dict[str, Any]], best: Mapping[str, Any] | None) -> Table:
    """The last validations, and what the weights kept reach by all that scores them."""
    table = _table("step", right=("minutes", "text to image R@1", "image to text R@1", "RSUM"))
    table.add_column("")
    shown = [row for row in rows[-VALIDATIONS:] if row is not best]
    for row in [*shown, best] if best else shown:
        for kind, remark in (
            ("dual", "kept" if row is best else ""),
            ("banked", "query bank"),
            ("reranked", "re-ranked"),
        ):
            if (metrics := row.get(kind)) is None:
                continue
            table.add_row(
                f"{row['step']:,}",
                f"{row['seconds'] / 60:.1f}",
                f"{metrics['image_retrieval']['r1']:.1f}",
                f"{metrics['text_retrieval']['r1']:.1f}",
                f"{metrics['rsum']:.1f}",
                remark,
            )
    return table


def _verdict(last: float, trivial: float) -> str:
    if not math.isfinite(trivial):
        return ""
    if last <= CLEARLY * trivial:
        return "learned"
    return "hardly below trivial" if last < trivial else "not below trivial"


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
