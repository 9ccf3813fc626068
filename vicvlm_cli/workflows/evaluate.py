"""evaluate: a checkpoint's retrieval tables on one split of a prepared data set."""

from __future__ import annotations

from pathlib import Path

import torch

from vicvlm_cli.checkpoint import CheckpointInfo, load_model
from vicvlm_cli.data.origins import seen_notes
from vicvlm_cli.data.prepared import Manifest, PreparedDataset, Split
from vicvlm_cli.device import keep_few_kernels
from vicvlm_cli.errors import UsageError
from vicvlm_cli.evaluation.evaluate import EvaluationReport, evaluate_split
from vicvlm_cli.evaluation.rerank import TOP_K
from vicvlm_cli.inference import IMAGE_BATCH, autocast_dtype
from vicvlm_cli.model.vlm import PairScore, RerankWeights
from vicvlm_cli.report.progress import Progress

MAX_SCALE = 4.0  # of pictures; attention grows with its fourth power


def evaluate(
    checkpoint: Path,
    data: Path,
    split: str | None = "test",
    *,
    top_k: int = TOP_K,
    all_pairs: bool = False,
    image_scale: float | None = None,
    views: int | None = None,
    batch_size: int = IMAGE_BATCH,
    rerank_weights: RerankWeights | None = None,
    progress: Progress,
) -> EvaluationReport:
    """Measures the features alone, and the model's own score of pairs over the top k candidates.

    Args:
        split: None is "test".
        top_k: candidates a query; 0 for the features' table only.
        all_pairs: score every pair in place of the top k candidates; the cost is said first.
        image_scale: side of the pictures, in that of training; None is the checkpoint's.
        views: of each picture, whose mean is its feature; None is the checkpoint's.
        rerank_weights: what ITM counts beside the similarity; None: the checkpoint's, which were
            chosen on validation in training. Of no account where the pair score stands alone.

    Raises:
        UserError: the checkpoint or data set cannot be read, or has no such split.
    """
    if top_k < 0:
        raise UsageError(f"--top-k must be 0 or more, not {top_k}")
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    if image_scale is not None and not 0 < image_scale <= MAX_SCALE:
        raise UsageError(
            f"--image-scale must be above 0 and at most {MAX_SCALE}, not {image_scale}"
        )
    dataset = PreparedDataset.open(data)
    part = dataset.split(split or "test")
    model = load_model(checkpoint, eval_image_scale=image_scale, eval_views=views)
    if model.device.type == "cpu":
        keep_few_kernels()  # captions of all lengths, sorted: those of one shape come together
    weights = model.info.rerank_weights if rerank_weights is None else rerank_weights
    precision = str(autocast_dtype(model.device, model.precision) or torch.float32)
    precision = precision.removeprefix("torch.")
    progress.say(f"split: {part.title} (--split to change)")
    size = model.vlm.eval_image_size
    shown = model.vlm.config.eval_views
    also = f", {shown} views of each" if shown > 1 else ""
    progress.say(f"computing on: {model.device.type}, {precision}, pictures of {size} px{also}")
    notes = _notes(dataset.manifest, part, model.info)
    own = model.vlm.pair_score
    if all_pairs and own is None:
        raise UsageError(
            "this model scores a pair by its features alone, and compares all of them already: "
            "leave out --all-pairs"
        )
    origin = "from the checkpoint" if rerank_weights is None else "as given"
    said, note = _approach(own, top_k, all_pairs, weights, origin)
    if said:
        progress.say(said)
    notes += [note] if note else []
    evaluation = evaluate_split(
        model.vlm,
        model.tokenizer,
        part,
        device=model.device,
        precision=model.precision,
        top_k=top_k,
        all_pairs=all_pairs,
        rerank_weights=weights,
        bank=model.bank,
        batch_size=batch_size,
        progress=progress,
    )
    return EvaluationReport(
        evaluation=evaluation,
        checkpoint=model.info.path,
        sha256=model.info.sha256,
        objective=model.info.objective,
        data=Path(data),
        source=dataset.manifest.source,
        split=part.name,
        split_name=dataset.manifest.split_name,
        split_hash=part.hash,
        partial=dataset.manifest.partial,
        data_title=part.title,
        precision=precision,
        image_size=size,
        views=shown,
        notes=notes,
    )


def _approach(
    own: PairScore | None, top_k: int, all_pairs: bool, weights: RerankWeights, origin: str
) -> tuple[str, str]:
    """What to say of how pairs are scored, and what to note beside the figures; "": nothing."""
    scored = all_pairs or top_k > 0
    if own is None:
        missing = "the model has no matching head: there is no re-ranked table"
        return "", missing if scored else ""
    if not scored:
        order = f"this is the order of the shortlist and not that of {own.name}: raise --top-k"
        return "", order if own.alone else ""
    if not any(weights) and not own.alone:
        return "", (
            f"{own.name} has weight 0 (untrained, or without gain on validation): "
            "re-ranking would change nothing"
        )
    if all_pairs:  # which is announced with its cost
        return "", ""
    if own.alone:
        return f"{own.name}: orders the top {top_k} of each query (--top-k to change)", ""
    return (
        f"re-ranking: the top {top_k} (--top-k to change), {own.name} weight {weights} {origin}"
    ), ""


def _notes(manifest: Manifest, split: Split, info: CheckpointInfo) -> list[str]:
    """What makes these figures incomparable with others, or too good."""
    notes = [f"the data set is partial ({manifest.partial})"] if manifest.partial else []
    return notes + seen_notes(manifest, split, info.origins)
