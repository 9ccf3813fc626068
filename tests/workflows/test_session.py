"""Validation in a training, and which weights are kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import QUIET, TINY, Heard, equal, rows, run, weights
from torch import Tensor

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.workflows import session
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.train import finetune, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_validations_are_logged_and_told(pretrained: TrainResult) -> None:
    lines = rows(pretrained.run, "validation")
    # After the first epoch and at the end by features alone, then the weights kept by all there is.
    kept = rows(pretrained.run, "kept")
    assert [line["step"] for line in [*lines, *kept]] == [6, 12, 12]
    assert [line["reranked"] is None for line in [*lines, *kept]] == [True, True, False]
    assert [line["banked"] is None for line in [*lines, *kept]] == [True, True, False]
    assert lines[-1]["dual"]["images"] == 16 and lines[-1]["dual"]["captions"] == 80
    told = [{k: v for k, v in line.items() if k != "kind"} for line in [*lines, *kept]]
    assert [*pretrained.validation, pretrained.best] == told
    notes = " | ".join(pretrained.notes)  # type: ignore[attr-defined]
    assert "preset: vicvlm-tiny (default for scenes; --preset to change)" in notes
    assert "12 steps of 16 pairs, cpu no, 1 process," in notes
    assert "validation at step 6: R@1" in notes and "weights kept, of step 12: R@1" in notes


def test_a_file_of_settings_lies_over_the_preset_of_the_data(scenes: Path, tmp_path: Path) -> None:
    own, heard = tmp_path / "own.toml", Heard()
    own.write_text("[pretrain]\nobjective = 3\nlr = 0.25\n", "utf-8")
    with pytest.raises(UsageError, match=r"pretrain\.objective|there is no objective"):
        pretrain(scenes, config_file=own, output=tmp_path / "run", progress=heard)
    assert "preset: vicvlm-tiny (default for scenes; --preset to change)" in heard.notes


def scripted(rsums: list[float], patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Validations that find these figures, and the weights that each has seen.

    One beyond these is a real one.
    """
    seen: list[dict[str, Tensor]] = []
    real = evaluate_split

    def evaluate(model: Any, *arguments: Any, **options: Any) -> Any:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        if len(seen) > len(rsums):
            return real(model, *arguments, **options)
        one = SimpleNamespace(r1=0.0)
        dual = SimpleNamespace(rsum=rsums[len(seen) - 1], image_retrieval=one, text_retrieval=one)
        row = {
            "rsum": dual.rsum,
            "reranked": None,
            "rerank_weights": {"image_retrieval": 7.0, "text_retrieval": 8.0},
        }
        return SimpleNamespace(dual=dual, own=dual, to_dict=lambda: row)

    patch.setattr(session, "evaluate_split", evaluate)
    return seen


@pytest.mark.parametrize(
    ("select", "rsums", "kept"),
    [
        ("best", [0, 10, 30, 20], 2),
        ("best", [10, 20, 20, 30], 3),
        ("best", [30, 10, 30, 20], 0),  # what it came from was better
        ("last", [10, 30, 20], 2),
    ],
)
def test_the_weights_kept_are_the_best_or_the_last(
    select: str,
    rsums: list[float],
    kept: int,
    pretrained: TrainResult,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = scripted(rsums, monkeypatch)
    settings = ["finetune.validate_every=1", "finetune.epochs=3", f"finetune.select={select}"]
    result = finetune(
        pretrained.checkpoint, scenes, overrides=settings, output=tmp_path / "f", progress=QUIET
    )
    number = len(rsums)
    assert all(not equal(seen[i], seen[i + 1]) for i in range(number - 1))
    assert equal(weights(tmp_path / "f"), seen[kept])
    # The weights kept are measured by all that scores them after the end.
    assert len(seen) == number + 1 and equal(seen[number], seen[kept])
    assert result.best is not None and result.best["reranked"]
    assert result.best["step"] == result.validation[kept]["step"]
    assert result.rerank_weights == tuple(result.best["rerank_weights"].values()) != (7, 8)
    # Fine-tuning that keeps the best begins by measuring where it starts from.
    assert [row["step"] for row in result.validation] == [0, 6, 12, 18][-number:]
    assert {row.name for row in result.losses} == {"itc", "itm"}
    loaded = load_model(result.checkpoint, device="cpu")
    info, bank = loaded.info, loaded.bank
    assert info.objective == "retrieval"
    assert info.rerank_weights == result.rerank_weights
    # The bank is that of the weights kept, with what their validation chose for it.
    assert bank is not None
    assert bank.weights == tuple(result.best["bank_weights"].values())
    train = PreparedDataset.open(scenes).split("train")
    image = loaded.encode_images([train.image(5)])[0]
    assert torch.allclose(bank.images[5], image, atol=1e-2)


def test_without_validation_data_the_last_weights_are_kept(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreparedDataset, "splits", property(lambda self: ["train", "test"]))
    heard = Heard()
    result = run(
        scenes, tmp_path / "run", "pretrain.select=best", "pretrain.validate_every=1",
        progress=heard,
    )  # fmt: skip
    assert any("has no val split: the last weights will be kept" in note for note in heard.notes)
    assert result.validation == [] and result.best is None
    loaded = load_model(result.checkpoint, device="cpu")
    assert loaded.info.rerank_weights == (0, 0) and loaded.bank is None


def test_a_score_that_stands_alone_is_what_validations_go_by(scenes: Path, tmp_path: Path) -> None:
    tiny = [s for s in TINY if ".losses." not in s and ".options." not in s]
    settings = [*tiny, "pretrain.objective=scan", "pretrain.validate_every=1", "pretrain.epochs=2"]
    result = pretrain(scenes, overrides=settings, output=tmp_path / "run", progress=QUIET)
    for row in result.validation:  # each of them, not the last alone
        assert row["rsum"] == row["reranked"]["rsum"]
        assert row["reranked"] != row["dual"]
    assert result.best is max(result.validation, key=lambda row: row["reranked"]["rsum"])


def test_trainings_validate_on_one_view_and_end_with_all(scenes: Path, tmp_path: Path) -> None:
    settings = ["model.eval_views=7", "pretrain.validate_every=1", "pretrain.epochs=2"]
    result = run(scenes, tmp_path / "run", *settings)
    assert result.best is not None and result.best["step"] == result.validation[-1]["step"]
    assert result.best["dual"] != result.validation[-1]["dual"]
    loaded = load_model(result.checkpoint, device="cpu")
    assert loaded.vlm.config.eval_views == 7 and loaded.bank is not None
    image = loaded.encode_images([PreparedDataset.open(scenes).split("train").image(5)])[0]
    assert torch.allclose(loaded.bank.images[5], image, atol=1e-2)
