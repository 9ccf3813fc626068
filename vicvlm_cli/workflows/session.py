"""What happens around a training's steps: validation, keeping the weights, saving the state."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vicvlm_cli import config as configs
from vicvlm_cli.checkpoint import FILE_NAME, load_model, save_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights, RetrievalModel
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import Config, TrainConfig
from vicvlm_cli.workflows.bank import make_bank
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.state import Position, save_run_state
from vicvlm_cli.workflows.views import drop_views


@dataclass
class Job:
    """One training, ready to run."""

    kind: str  # "pretrain" or "finetune"
    config: Config
    model: RetrievalModel
    tokenizer: Tokenizer
    dataset: PreparedDataset
    run: Path
    position: Position
    state: Path | None = None

    @property
    def train(self) -> TrainConfig:
        return self.config.pretrain if self.kind == "pretrain" else self.config.finetune

    @property
    def origin(self) -> dict[str, Any]:
        split, manifest = self.dataset.split("train"), self.dataset.manifest
        return {
            "source": manifest.source,
            "split_name": manifest.split_name,
            "split": "train",
            "split_hash": split.hash,
            "partial": manifest.partial,
        }


class Session:
    """What happens between steps: validation, keeping the weights, saving the state."""

    def __init__(
        self, job: Job, accelerator: Accelerator, metrics: Metrics, progress: Progress
    ) -> None:
        self.job, self.accelerator, self.metrics = job, accelerator, metrics
        self.progress = progress
        self.checkpoint = job.run / FILE_NAME
        self.split = job.dataset.split("val") if "val" in job.dataset.splits else None
        if self.split is None:
            progress.say(f"{job.dataset.path} has no val split: the last weights will be kept")

    def validate(self) -> None:
        """Recall on validation by the first process, the others wait; keeps the better weights."""
        if self.accelerator.is_main_process:
            self._measure_and_keep(self._top_k if self._alone else 0)
        self.accelerator.wait_for_everyone()

    def finish(self) -> RerankWeights:
        """Validate once more, choose the weights of scoring, write the final checkpoint."""
        weights = RerankWeights()
        if self.accelerator.is_main_process:
            rows = self.job.position.validation
            top_k = self._top_k if self._alone or "itm" in self.metrics.history else 0
            row = self._measure_and_keep(top_k, banked=not self._alone)
            # Earlier weights may be the better ones.
            if row is None and rows and not self._alone:
                at = max(range(len(rows)), key=lambda i: rows[i]["rsum"])
                kept = load_model(self.checkpoint, device=self.accelerator.device).vlm
                facts = {name: rows[at][name] for name in ("step", "seconds", "pairs")}
                bank = self._bank(kept)
                row = rows[at] = self._measure(kept, top_k, facts, bank)
                self._keep(kept, row, bank)
            weights = _weights_of(row) if row else RerankWeights()
            shutil.rmtree(self.job.run / "state", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:  # each machine has its own
            drop_views(self.job.run)
        return RerankWeights(*broadcast_object_list([tuple(weights)])[0])

    @property
    def _alone(self) -> bool:
        """Whether the model's pair score stands alone: it is then what validations go by."""
        own = self.job.model.pair_score
        return own is not None and own.alone

    @property
    def _top_k(self) -> int:
        return self.job.train.rerank_top_k

    def save_state(self) -> None:
        """Write what resuming needs."""
        job = self.job
        description = {
            "kind": job.kind,
            "config": configs.to_dict(job.config),
            "model": configs.to_dict(job.model.config),
            "split_hash": job.dataset.split("train").hash,
            "position": asdict(job.position),
        }
        save_run_state(self.accelerator, job.run / "state", job.tokenizer, description)

    def _measure_and_keep(self, top_k: int, banked: bool = False) -> dict[str, Any] | None:
        """Validates the model as it is; its row if its weights were kept and there is one."""
        job = self.job
        if self.split is None:
            self._keep(job.model)
            return None
        position = job.position
        facts = {"step": position.step, "seconds": round(position.seconds, 1)}
        bank = self._bank(job.model) if banked else None
        row = self._measure(job.model, top_k, facts | {"pairs": position.pairs}, bank)
        position.validation.append(row)
        better = row["rsum"] > position.best
        position.best = max(position.best, row["rsum"])
        if job.train.select == "best" and not better:
            return None
        self._keep(job.model, row, bank)
        return row

    def _bank(self, model: RetrievalModel) -> QueryBank:
        """The query bank of ``model``, without weights yet."""
        return make_bank(
            model,
            self.job.tokenizer,
            self.job.dataset.split("train"),
            device=self.accelerator.device,
            precision=self.accelerator.mixed_precision,
            progress=self.progress,
        )

    def _measure(
        self,
        model: RetrievalModel,
        top_k: int,
        facts: dict[str, Any],
        bank: QueryBank | None = None,
    ) -> dict[str, Any]:
        assert self.split is not None
        result = evaluate_split(
            model,
            self.job.tokenizer,
            self.split,
            device=self.accelerator.device,
            precision=self.accelerator.mixed_precision,
            top_k=top_k,
            bank=bank,
            images=self.job.train.validation_images,
            progress=self.progress,
        )
        row = facts | result.to_dict()
        self.metrics.write({"kind": "validation", **row})
        own = result.own
        self.progress.say(
            f"validation at step {row['step']}: R@1 {own.image_retrieval.r1:.1f} text to image, "
            f"{own.text_retrieval.r1:.1f} image to text, RSUM {own.rsum:.1f}"
        )
        return row

    def _keep(
        self,
        model: RetrievalModel,
        row: dict[str, Any] | None = None,
        bank: QueryBank | None = None,
    ) -> None:
        """Writes the checkpoint, with the weights of scoring that its validation chose."""
        job = self.job
        if bank is not None and row is not None:
            bank = bank.at(RerankWeights(**row["bank_weights"]))
        save_model(
            self.checkpoint,
            model,
            job.tokenizer,
            config=configs.to_dict(job.config),
            data=job.origin,
            objective=job.train.objective,
            rerank_weights=_weights_of(row) if row else RerankWeights(),
            bank=bank,
        )


def _weights_of(row: dict[str, Any]) -> RerankWeights:
    return RerankWeights(**row["rerank_weights"])
