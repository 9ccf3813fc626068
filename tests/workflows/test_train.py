"""pretrain on a few drawn scenes: what it writes, its schedule, what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import BARE, LOSSES, QUIET, Heard, equal, rows, run, weights
from torch import Tensor

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UserError
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.cached import CachedContrast
from vicvlm_cli.objectives.clip import CLIP
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.train import finetune, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_pretraining_leaves_a_checkpoint_metrics_and_a_result(
    pretrained: TrainResult, scenes: Path
) -> None:
    files = {path.name for path in pretrained.run.iterdir()}
    assert files == {"model.safetensors", "metrics.jsonl", "result.json"}
    assert json.loads((pretrained.run / "result.json").read_text()) == pretrained.to_dict()
    assert pretrained.checkpoint == pretrained.run / "model.safetensors"
    assert (pretrained.steps, pretrained.pairs) == (12, 192)
    loaded = load_model(pretrained.checkpoint, device="cpu")
    split = PreparedDataset.open(scenes).split("train")
    assert loaded.info.data["split_hash"] == split.hash
    assert loaded.info.data["source"] == "scenes"
    assert loaded.info.objective == "vicvlm"
    assert loaded.info.rerank_weights == pretrained.rerank_weights
    assert loaded.info.config["pretrain"]["batch_size"] == 16
    assert loaded.tokenizer.vocab_size == loaded.vlm.config.vocab_size <= 200
    assert all(bool(v.isfinite().all()) for v in weights(pretrained.run).values())


@pytest.mark.parametrize("weight", [0, 0.1])
def test_a_target_of_masked_pictures_where_none_is_masked_is_warned_of(
    scenes: Path, tmp_path: Path, weight: float
) -> None:
    heard = Heard()
    settings = ("pretrain.options.target=byol", "pretrain.losses.joint_mim.weight=0")
    asked = (*settings, f"pretrain.losses.mim.weight={weight}", "pretrain.epochs=0.2")
    run(scenes, tmp_path / "run", *asked, progress=heard)
    assert any("turns it on" in note for note in heard.notes) == (weight == 0)


@pytest.mark.parametrize("tokens", [9, 40])
def test_captions_that_are_cut_are_warned_of(scenes: Path, tmp_path: Path, tokens: int) -> None:
    heard = Heard()
    short = (f"model.max_tokens={tokens}", "model.vocab_size=400", "pretrain.epochs=0.2")
    run(scenes, tmp_path / "run", *short, progress=heard)
    told = [note for note in heard.notes if f"are cut at {tokens} tokens: --set model.max" in note]
    assert len(told) == (tokens == 9)


def test_every_loss_has_its_first_last_and_trivial_value(pretrained: TrainResult) -> None:
    assert {row.name for row in pretrained.losses} == set(LOSSES)
    table = {row.name: row for row in pretrained.losses}
    assert all(math.isfinite(x) for r in pretrained.losses for x in (r.first, r.last, r.trivial))
    assert table["itc"].weight == 1.0 and table["itm"].weight == 0.5
    assert table["itc"].trivial == pytest.approx(math.log(16), rel=1e-4)
    assert table["itm"].trivial == pytest.approx(losses.itm_base_rate(2), rel=1e-4)
    assert table["itc"].last < table["itc"].first
    lines = rows(pretrained.run)
    assert {row["step"] for row in lines} == {6, 10, 12}  # a validation, ten steps, the end
    for line in lines:
        assert set(line["losses"]) == set(line["trivial"]) == set(LOSSES)
        assert line["weights"]["itm"] == 0.5
    assert lines[0]["losses"]["itc"] == table["itc"].first
    assert [line["pairs"] for line in lines] == [96, 160, 192]
    assert lines[-1]["progress"] == 1.0 and lines[-1]["epoch"] == 2.0
    assert lines[-1]["lr"] < lines[0]["lr"]


def test_the_same_seed_gives_the_same_model_and_another_another(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    run(scenes, tmp_path / "same", "pretrain.validate_every=1")
    assert equal(weights(tmp_path / "same"), weights(pretrained.run))
    run(scenes, tmp_path / "other", "pretrain.seed=1", "pretrain.epochs=0.1")
    assert not equal(weights(tmp_path / "other"), weights(pretrained.run))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_accumulation_makes_fewer_larger_steps(
    accumulate: int,
    steps: int,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[str] = []
    for owner, method in ((torch.optim.AdamW, "step"), (VicVLM, "after_step")):
        monkeypatch.setattr(owner, method, counting(counted, method, getattr(owner, method)))
    result = run(scenes, tmp_path / "run", "pretrain.epochs=1", f"pretrain.accumulate={accumulate}")
    assert result.steps == steps
    assert counted.count("step") == counted.count("after_step") == steps
    assert result.pairs == steps * accumulate * 16  # the fourth goes on into the next epoch
    assert rows(result.run)[-1]["step"] == steps


def test_cached_gradients_train_like_one_large_batch(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Crops and flips are drawn batch by batch: without them the pictures are the same.
    clip = ["pretrain.objective=clip", "data.flip=false", "pretrain.validate_every=1"]
    plain = [*BARE, *clip]
    large = pretrain(
        scenes, overrides=[*plain, "pretrain.batch_size=32"], output=tmp_path / "l", progress=QUIET
    )
    counted: list[str] = []
    for owner, method in ((torch.optim.AdamW, "step"), (CLIP, "after_step"), (CLIP, "forward")):
        monkeypatch.setattr(owner, method, counting(counted, method, getattr(owner, method)))
    heard = Heard()
    small = pretrain(
        scenes,
        overrides=[*plain, "pretrain.batch_size=8", "pretrain.contrastive_batch=32"],
        output=tmp_path / "s",
        progress=heard,
    )
    assert (small.steps, small.pairs) == (large.steps, large.pairs) == (6, 192)
    assert counted.count("step") == counted.count("after_step") == 6
    assert counted.count("forward") == 6 * 2 * 4  # twice each batch
    assert any("6 steps of 32 pairs" in note for note in heard.notes)
    for mine, other in zip(rows(small.run), rows(large.run), strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-3)
        assert mine["trivial"] == other["trivial"]
        for key in ("step", "pairs", "epoch", "lr", "progress"):
            assert mine[key] == other[key]
    assert [v["step"] for v in small.validation] == [v["step"] for v in large.validation] == [3, 6]
    last = weights(large.run)
    for name, value in weights(small.run).items():
        torch.testing.assert_close(value, last[name], rtol=0.01, atol=2e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_batch_is_the_same_both_times(
    precision: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    real = CachedContrast.__call__

    def call(self: CachedContrast, loss: Any, *given: Tensor) -> Any:
        seen.append(tuple(x.detach() for x in given))
        return real(self, loss, *given)

    monkeypatch.setattr(CachedContrast, "__call__", call)
    run(
        scenes,
        tmp_path / "run",
        "pretrain.batch_size=8",
        "pretrain.contrastive_batch=24",
        "pretrain.epochs=1",
        f"pretrain.precision={precision}",
        "model.text_dropout=0.3",
        "data.crop_scale=0.5",
        "data.color_jitter=0.2",
    )
    assert len(seen) == 4 * 2 * 3
    for first in range(0, len(seen), 6):
        step = seen[first : first + 6]
        for before, after in zip(step[:3], step[3:], strict=True):
            for x, y in zip(before, after, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    assert not torch.allclose(seen[0][0], seen[6][0], atol=1e-3)


def counting(counted: list[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def counts(*arguments: Any, **options: Any) -> Any:
        counted.append(name)
        return real(*arguments, **options)

    return counts


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_good_weights(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    real = losses.itc

    def itc(*arguments: Any) -> Tensor:
        calls.append(0.0)
        return real(*arguments) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(losses, "itc", itc)
    with pytest.raises(UserError, match="the loss itc is not finite at step 8: lower the"):
        run(scenes, tmp_path / "run", "pretrain.validate_every=0.5", "pretrain.select=last")
    # Validated after steps 3 and 6, and stopped before a third time.
    assert [row["step"] for row in rows(tmp_path / "run", "validation")] == [3, 6]
    assert all(bool(v.isfinite().all()) for v in weights(tmp_path / "run").values())


@pytest.mark.parametrize("call", [1, 13])
def test_a_device_without_memory_is_a_smaller_batch(
    call: int, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    real = losses.itc

    def itc(*arguments: Any) -> Tensor:
        calls.append(0.0)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(losses, "itc", itc)
    folder = tmp_path / "run"
    with pytest.raises(UserError) as told:
        run(scenes, folder, "pretrain.epochs=3", "pretrain.state_minutes=0")
    lower = (
        "out of memory on cpu: lower --batch-size, which is 16 (--contrastive-batch 16 keeps the "
        "size of the contrast)"
    )
    kept = f"; the state of step 10 is kept, for --resume {folder} with more memory free"
    assert str(told.value) == lower + (kept if call == 13 else "")
    assert folder.exists() == (call == 13)


def test_a_fine_tuning_that_fails_at_once_leaves_its_folder_to_another_try(
    pretrained: TrainResult, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(losses, "itc", full)
    with pytest.raises(UserError, match="out of memory"):
        finetune(pretrained.checkpoint, scenes, output=tmp_path / "run", progress=QUIET)
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_written_is_a_warning(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vicvlm_cli.workflows.run.write_whole", full)
    heard = Heard()
    result = run(scenes, tmp_path / "run", "pretrain.epochs=0.5", progress=heard)
    assert result.checkpoint.is_file()
    file = tmp_path / "run" / "result.json"
    assert f"warning: {file} was not written: No space left on device" in heard.notes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pretrain.batch_size=1"], "too few other pictures to draw 1 hard negatives"),
        (["pretrain.contrastive_batch=40"], "40, not a multiple of --batch-size, which is 16"),
        (["pretrain.objective=clib"], "there is no objective 'clib'"),
        (["pretrain.options.mask_block=3"], "mask_block=3 does not tile the grid of 4x4"),
        (["model.image_size=36"], "image_size=36 is not a multiple of .* patch of 8"),
        (
            ["model.eval_image_scale=1.25", "model.fusion=concat"],
            "fusion=concat numbers the patches of model.image_size and no others",
        ),
        (["pretrain.objective=albef", "data.more_captions=1"], "albef contrasts one caption of"),
        (["pretrain.rate=1"], "'pretrain.rate' is not a setting"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    overrides: list[str], words: str, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run(scenes, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_too_large_a_batch_is_refused_before_the_training_is_announced(
    scenes: Path, tmp_path: Path
) -> None:
    heard = Heard()
    with pytest.raises(UserError, match="does not fill one batch of 97 x 1 processes"):
        run(scenes, tmp_path / "run", "pretrain.batch_size=97", progress=heard)
    assert not [note for note in heard.notes if note.startswith("training ")]
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_data_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a prepared data set"):
        run(tmp_path, tmp_path / "run")


def test_training_from_the_decoded_file_is_the_same_training(scenes: Path, tmp_path: Path) -> None:
    crops = "data.crop_scale=0.5"
    plain = run(scenes, tmp_path / "plain", crops, "data.cache_mb=0")
    heard = Heard()
    cached = run(scenes, tmp_path / "cached", crops, "data.cache=true", progress=heard)
    assert equal(weights(plain.run), weights(cached.run))
    files = list((scenes / "train").glob("*.npy"))
    assert [file.stat().st_size for file in files] == [128 + 96 * 3 * 36 * 36]  # 32 and a margin
    assert any("decoding 96 pictures" in note for note in heard.notes)
    again = Heard()
    run(scenes, tmp_path / "again", crops, "data.cache=true", progress=again)
    assert not any("decoding" in note for note in again.notes)
