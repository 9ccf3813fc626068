"""The retrieval tables of one split: by features alone, with the query bank, by pair scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.evaluation.all_pairs import evaluate_all_pairs
from vicvlm_cli.evaluation.recall import (
    RetrievalMetrics,
    choose_bank_weights,
    evaluate_features,
)
from vicvlm_cli.evaluation.rerank import TOP_K, rerank
from vicvlm_cli.evaluation.tokens import encode_split
from vicvlm_cli.inference import IMAGE_BATCH
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import PairScore, RerankWeights, RetrievalModel
from vicvlm_cli.report.progress import Progress


@dataclass(frozen=True)
class Evaluation:
    """`reranked` is None where no re-ranking was asked for or the model cannot match pairs.

    `banked`: the features' table with what the query bank takes off hubs, from which re-ranking
    starts; None where the model has no bank. `pair_score` is the model's own; `top_k` is 0 where
    all pairs were scored.
    """

    dual: RetrievalMetrics
    reranked: RetrievalMetrics | None
    rerank_weights: RerankWeights
    top_k: int
    pair_score: PairScore | None = None
    banked: RetrievalMetrics | None = None
    bank_weights: RerankWeights = RerankWeights()

    @property
    def own(self) -> RetrievalMetrics:
        """The table that validations go by: re-ranked only where the features are no method."""
        alone = self.pair_score is not None and self.pair_score.alone
        return self.reranked if alone and self.reranked is not None else self.dual

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "dual": self.dual.to_dict(),
            "banked": self.banked.to_dict() if self.banked else None,
            "bank_weights": self.bank_weights._asdict(),
            "reranked": self.reranked.to_dict() if self.reranked else None,
            "rerank_weights": self.rerank_weights._asdict(),
            "pair_score": asdict(self.pair_score) if self.pair_score else None,
            "rsum": self.own.rsum,
            "top_k": self.top_k,
        }


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation with all that a reader of its figures must know.

    `data_title` names source, split, its name, counts and hash, and says so where it is partial;
    `notes` are further warnings, such as a model that was trained on another split.
    """

    evaluation: Evaluation
    checkpoint: Path
    sha256: str
    objective: str
    data: Path
    source: str
    split: str
    split_name: str
    split_hash: str
    partial: str
    data_title: str
    precision: str
    image_size: int  # side of the pictures as they were embedded
    views: int  # of each picture, whose mean is its feature
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        dual = self.evaluation.dual
        return {
            "checkpoint": {
                "path": str(self.checkpoint),
                "sha256": self.sha256,
                "objective": self.objective,
            },
            "data": {
                "path": str(self.data),
                "source": self.source,
                "split": self.split,
                "split_name": self.split_name,
                "split_hash": self.split_hash,
                "partial": self.partial,
                "images": dual.images,
                "captions": dual.captions,
            },
            **self.evaluation.to_dict(),
            "precision": self.precision,
            "image_size": self.image_size,
            "views": self.views,
            "notes": self.notes,
        }


def evaluate_split(
    vlm: RetrievalModel,
    tokenizer: Tokenizer,
    split: Split,
    *,
    device: torch.device,
    precision: str = "auto",
    top_k: int = TOP_K,
    all_pairs: bool = False,
    rerank_weights: RerankWeights | None = None,
    bank: QueryBank | None = None,
    batch_size: int = IMAGE_BATCH,
    images: int | None = None,
    views: int | None = None,
    progress: Progress,
) -> Evaluation:
    """Encodes a split once and measures both tables on it.

    Serves a live model in training as well: modules are put into evaluation mode and back.

    Args:
        device: where `vlm` is.
        top_k: candidates a query to re-rank; 0 for the dual table only.
        all_pairs: score every pair instead of a shortlist; it takes `rerank_weights`.
        rerank_weights: what ITM counts in the combined score; None chooses it on this split
            (only for validation). Of no account where the pair score stands alone.
        bank: of the model; its weights are chosen on this split where it has none.
        images: evaluate the first so many images only.
        views: of each picture; None is the model's own number.

    Raises:
        UserError: the split is empty or damaged.
    """
    own = vlm.pair_score
    if own is not None and own.alone:
        rerank_weights = RerankWeights.of(1.0)
    top_k = 0 if all_pairs else top_k
    matching = (top_k > 0 or all_pairs) and own is not None
    # At weights of 0 candidates keep their order: the dual table is the re-ranked one.
    scoring = matching and (rerank_weights is None or any(rerank_weights))
    features = encode_split(
        vlm,
        tokenizer,
        split,
        device=device,
        precision=precision,
        batch_size=batch_size,
        keep_tokens=scoring,
        images=images,
        views=views,
        progress=progress,
    )
    plain = features.image, features.text, features.text_image
    if bank is not None and bank.weights is None:
        bank = bank.at(choose_bank_weights(*plain, bank))
    if bank is not None or not scoring or all_pairs:
        dual = evaluate_features(*plain)
    banked = None if bank is None else evaluate_features(*plain, bank=bank)
    of_bank = banked, (bank and bank.weights) or RerankWeights()
    if not scoring:
        table = (banked or dual) if matching else None
        return Evaluation(dual, table, RerankWeights(), top_k if matching else 0, own, *of_bank)
    if all_pairs:
        assert rerank_weights is not None
        table = evaluate_all_pairs(
            vlm, features, rerank_weights, bank, precision=precision, progress=progress
        )
        return Evaluation(dual, table, rerank_weights, 0, own, *of_bank)
    scored = rerank(
        vlm,
        features,
        top_k=top_k,
        weights=rerank_weights,
        bank=bank,
        precision=precision,
        progress=progress,
    )
    if own is not None and own.alone:
        texts, pictures = scored.reach
        progress.say(
            f"shortlist: the top {top_k} hold a match for {texts:.1f} % of captions and "
            f"{pictures:.1f} % of pictures"
        )
    weights = scored.choose_weights() if rerank_weights is None else rerank_weights
    return Evaluation(
        scored.dual if bank is None else dual,
        scored.metrics(weights),
        weights,
        top_k,
        own,
        *of_bank,
    )
