"""What happens around a training's steps: validation, keeping the weights, saving the state."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from vicvlm_cli import config as configs
from vicvlm_cli.checkpoint import FILE_NAME, load_model, save_model
from vicvlm_cli.data.origins import origin_of
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights, RetrievalModel
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import Config, TrainConfig
from vicvlm_cli.workflows.bank import make_bank
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.state import Position, save_run_state, writing
from vicvlm_cli.workflows.views import drop_views

TOLD = {"validation": "validation at", "kept": "weights kept, of"}  # rows of metrics, for people


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
    before: list[dict[str, Any]] = field(default_factory=list)  # origins of what it starts from

    @property
    def train(self) -> TrainConfig:
        return self.config.pretrain if self.kind == "pretrain" else self.config.finetune

    @property
    def origin(self) -> dict[str, Any]:
        """What the checkpoint says of its data, and of those that it was trained on before."""
        own = origin_of(self.dataset)
        before = [origin for origin in self.before if origin != own]
        return own | ({"before": before} if before else {})


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

    def finish(self) -> dict[str, Any] | None:
        """Validate once more, choose the weights of scoring, write the final checkpoint.

        Returns:
            What the weights kept reach by all that scores them (all views of a picture, the query
            bank, re-ranking); None without validation data.
        """
        best = None
        if self.accelerator.is_main_process:
            self._measure_and_keep(self._top_k if self._alone else 0)
            best = self._measure_kept()
            shutil.rmtree(self.job.run / "state", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:  # each machine has its own
            drop_views(self.job.run)
        kept: dict[str, Any] | None = broadcast_object_list([best])[0]
        return kept

    def _measure_kept(self) -> dict[str, Any] | None:
        """Measure the weights kept by all that scores them, and write them with what that chose."""
        rows = self.job.position.validation
        if not rows:
            return None
        last = self.job.train.select == "last"
        at = len(rows) - 1 if last else max(range(len(rows)), key=lambda i: rows[i]["rsum"])
        if self._alone:  # its validations were by all there is
            return rows[at]
        kept = load_model(self.checkpoint, device=self.accelerator.device).vlm
        top_k = self._top_k if "itm" in self.metrics.history else 0
        facts = {name: rows[at][name] for name in ("step", "seconds", "pairs")}
        bank = self._bank(kept)
        row = self._measure(kept, top_k, facts, bank, views=None, kind="kept")
        self._keep(kept, row, bank)
        return row

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
            "num_processes": self.accelerator.num_processes,
            "before": job.before,
        }
        save_run_state(self.accelerator, job.run / "state", job.tokenizer, description)

    def _measure_and_keep(self, top_k: int) -> None:
        """Validates the model as it is, and keeps its weights if they are the ones to keep."""
        job = self.job
        if self.split is None:
            self._keep(job.model)
            return
        position = job.position
        facts = {"step": position.step, "seconds": round(position.seconds, 1)}
        row = self._measure(job.model, top_k, facts | {"pairs": position.pairs})
        position.validation.append(row)
        better = row["rsum"] > position.best
        position.best = max(position.best, row["rsum"])
        if better or job.train.select == "last":
            self._keep(job.model, row)

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
        views: int | None = 1,
        kind: str = "validation",
    ) -> dict[str, Any]:
        """A row of metrics: of pictures as they are, which takes less time than all views."""
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
            views=views,
            progress=self.progress,
        )
        row = facts | result.to_dict()
        self.metrics.write({"kind": kind, **row})
        own = result.own
        self.progress.say(
            f"{TOLD[kind]} step {row['step']}: R@1 {own.image_retrieval.r1:.1f} text to image, "
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
        with writing(job.run):
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
