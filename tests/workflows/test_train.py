"""pretrain and finetune on a few drawn scenes: what they write, keep, refuse and go on with."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny_training import LOSSES, TINY, rows
from torch import Tensor

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows import loop, session
from vicvlm_cli.workflows.launch import join
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.prepare import prepare
from vicvlm_cli.workflows.train import TrainResult, finetune, pretrain

QUIET = Progress(quiet=True)


class Heard(Progress):
    """Keeps what is said instead of printing it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU whatever the machine; the library's singletons as in a new process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run(data: Path, output: Path, *overrides: str, **options: Any) -> TrainResult:
    options = {"progress": QUIET, **options}
    return pretrain(data, overrides=[*TINY, *overrides], output=output, **options)


@pytest.fixture(scope="module")
def pretrained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A whole pretraining of 12 steps, a validation after each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        output = tmp_path_factory.mktemp("pretrained") / "run"
        heard = Heard()
        result = run(scenes, output, "pretrain.validate_every=1", progress=heard)
        result.notes = heard.notes  # type: ignore[attr-defined]
        return result


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
    assert loaded.info.rerank_weight == pretrained.rerank_weight
    assert loaded.info.config["pretrain"]["batch_size"] == 16
    assert loaded.tokenizer.vocab_size == loaded.vlm.config.vocab_size <= 200
    assert all(bool(v.isfinite().all()) for v in weights(pretrained.run).values())


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


def test_validations_are_logged_and_told(pretrained: TrainResult) -> None:
    lines = rows(pretrained.run, "validation")
    # After the first epoch, at the end, and once more with re-ranking.
    assert [line["step"] for line in lines] == [6, 12, 12]
    assert [line["reranked"] is None for line in lines] == [True, True, False]
    assert lines[-1]["dual"]["images"] == 16 and lines[-1]["dual"]["captions"] == 80
    assert pretrained.validation == [
        {k: v for k, v in line.items() if k != "kind"} for line in lines
    ]
    notes = " | ".join(pretrained.notes)  # type: ignore[attr-defined]
    assert "preset: vicvlm-tiny (default for scenes; --preset to change)" in notes
    assert "12 steps of 16 pairs, cpu no, 1 process," in notes
    assert "validation at step 6: R@1" in notes


def test_the_same_seed_gives_the_same_model_and_another_another(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    run(scenes, tmp_path / "same", "pretrain.validate_every=1")
    assert equal(weights(tmp_path / "same"), weights(pretrained.run))
    run(scenes, tmp_path / "other", "pretrain.seed=1", "pretrain.epochs=0.1")
    assert not equal(weights(tmp_path / "other"), weights(pretrained.run))


def interrupt_at(step: int, patch: pytest.MonkeyPatch, stop: Callable[[], None]) -> None:
    """Call ``stop`` in the midst of a step."""
    add = Metrics.add
    stopped: list[int] = []

    def stopping(self: Metrics, number: int, *values: Any) -> None:
        add(self, number, *values)
        if number == step and not stopped:
            stopped.append(step)
            stop()

    patch.setattr(Metrics, "add", stopping)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("target", ["byol", "pixel"])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    target: str, scenes: Path, tmp_path: Path
) -> None:
    # Accumulation, crops and flips: all that a position must restore. Stopped within an epoch.
    settings = (
        "pretrain.batch_size=8",
        "pretrain.accumulate=2",
        "data.crop_scale=0.6",
        f"pretrain.options.target={target}",
        "pretrain.losses.mlm.start=0.7",
        "pretrain.validate_every=1",
    )
    whole = run(scenes, tmp_path / "whole", *settings)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(8, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(scenes, tmp_path / "parts", *settings)
    assert not (tmp_path / "parts" / "result.json").exists()
    heard = Heard()
    parts = pretrain(scenes, resume=tmp_path / "parts", progress=heard)
    assert f"resuming {tmp_path / 'parts'} at step 8" in heard.notes
    assert (parts.steps, parts.pairs) == (whole.steps, whole.pairs) == (12, 192)
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert parts.rerank_weight == whole.rerank_weight
    assert [row["step"] for row in parts.validation] == [row["step"] for row in whole.validation]
    assert rows(parts.run)[-1]["losses"] == rows(whole.run)[-1]["losses"]
    assert {r.name: r.first for r in parts.losses} == {r.name: r.first for r in whole.losses}
    assert not (tmp_path / "parts" / "state").exists()


def test_a_run_that_dies_goes_on_from_its_last_save(scenes: Path, tmp_path: Path) -> None:
    settings = ("pretrain.state_minutes=0", "pretrain.epochs=3")
    run(scenes, tmp_path / "whole", *settings)

    def power_cut() -> None:
        raise OSError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(15, patch, power_cut)
        with pytest.raises(OSError, match="power cut"):
            run(scenes, tmp_path / "parts", *settings)
    heard = Heard()
    pretrain(scenes, resume=tmp_path / "parts", progress=heard)
    assert f"resuming {tmp_path / 'parts'} at step 10" in heard.notes  # saved every ten
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_what_cannot_be_resumed(pretrained: TrainResult, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be resumed: it has finished"):
        pretrain(scenes, resume=pretrained.run, progress=QUIET)
    with pytest.raises(UserError, match="cannot be resumed: it has no saved state"):
        pretrain(scenes, resume=tmp_path, progress=QUIET)
    with pytest.raises(UsageError, match="--resume goes on with a run's own settings"):
        pretrain(scenes, resume=tmp_path, overrides=["pretrain.lr=1"], progress=QUIET)
    with pytest.raises(UsageError, match="--resume goes on with a run's own settings"):
        finetune(pretrained.checkpoint, scenes, resume=tmp_path, output=tmp_path, progress=QUIET)
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(1, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(scenes, stopped)
    with pytest.raises(UserError, match="is a pretrain run: use vicvlm pretrain"):
        finetune(pretrained.checkpoint, scenes, resume=stopped, progress=QUIET)
    sizes = {"train": 20, "val": 5, "test": 5}
    other = prepare(
        "scenes", tmp_path, image_side=32, sizes=sizes, seed=3, workers=1, progress=QUIET
    )
    with pytest.raises(UserError, match="was trained on another data set than"):
        pretrain(other.path, resume=stopped, progress=QUIET)
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        run(scenes, stopped)


def scripted(rsums: list[float], patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Validations that find these figures, and the weights that each of them saw."""
    seen: list[dict[str, Tensor]] = []
    real = evaluate_split

    def evaluate(model: Any, *arguments: Any, top_k: int, **options: Any) -> Any:
        if top_k:
            return real(model, *arguments, top_k=top_k, **options)
        rsum = rsums[len(seen)]
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        one = SimpleNamespace(r1=0.0)
        return SimpleNamespace(
            dual=SimpleNamespace(rsum=rsum, image_retrieval=one, text_retrieval=one),
            to_dict=lambda: {"dual": {"rsum": rsum}, "reranked": None},
        )

    patch.setattr(session, "evaluate_split", evaluate)
    return seen


@pytest.mark.parametrize(
    ("select", "rsums", "kept"),
    [("best", [10, 30, 20], 1), ("best", [30, 10, 30], 0), ("last", [10, 30, 20], 2)],
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
    assert len(seen) == 3 and not equal(seen[0], seen[1]) and not equal(seen[1], seen[2])
    assert equal(weights(tmp_path / "f"), seen[kept])
    assert {row.name for row in result.losses} == {"itc", "itm"}
    info = load_model(result.checkpoint, device="cpu").info
    assert info.objective == "retrieval"
    assert info.rerank_weight == result.rerank_weight


def test_fine_tuning_starts_from_the_checkpoint(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    still = ["finetune.lr=1e-30", "finetune.epochs=0.2"]
    finetune(pretrained.checkpoint, scenes, overrides=still, output=tmp_path / "f", progress=QUIET)
    assert equal(weights(tmp_path / "f"), weights(pretrained.run))
    loaded = load_model(tmp_path / "f", device="cpu")
    before = load_model(pretrained.checkpoint, device="cpu")
    assert loaded.tokenizer.to_json() == before.tokenizer.to_json()
    assert loaded.info.config["pretrain"] == before.info.config["pretrain"]


def test_a_checkpoints_model_cannot_be_changed(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a checkpoint's model cannot be changed"):
        finetune(
            pretrained.checkpoint,
            scenes,
            overrides=["model.image_size=64"],
            output=tmp_path,
            progress=QUIET,
        )


def test_a_stopped_fine_tuning_goes_on(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    def tune(name: str, **options: Any) -> TrainResult:
        return finetune(
            pretrained.checkpoint,
            scenes,
            progress=QUIET,
            **(options or {"output": tmp_path / name}),
        )

    tune("whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(4, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            tune("parts")
    tune("parts", resume=tmp_path / "parts")
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


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


def test_the_schedule_ends_with_the_time(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))  # every look at the clock finds it a second later
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    result = run(scenes, tmp_path / "run", "pretrain.epochs=1000", "pretrain.max_minutes=0.5")
    assert 5 < result.steps < 30
    assert 30 <= result.seconds < 40
    last = rows(result.run)[-1]
    assert last["progress"] == 1.0
    rates = [line["lr"] for line in rows(result.run)]
    assert rates[-1] == pytest.approx(0.05 * 2e-3)  # down to its end, not cut off
    assert load_model(result.checkpoint, device="cpu").info.objective == "vicvlm"


def test_the_shortest_of_limits_counts(scenes: Path, tmp_path: Path) -> None:
    result = run(scenes, tmp_path / "run", "pretrain.epochs=0.5", "pretrain.max_minutes=60")
    assert result.steps == 3


def test_a_loss_every_third_step_is_logged_and_weighed_as_such(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = Metrics.add

    def add(self: Metrics, step: int, values: Any, trivial: Any) -> None:
        if "itm" in values:
            steps.append(step)
        real(self, step, values, trivial)

    monkeypatch.setattr(Metrics, "add", add)
    result = run(scenes, tmp_path / "run", "pretrain.losses.itm.every=3")
    assert steps == [1, 4, 7, 10]
    assert [line["weights"]["itm"] for line in rows(result.run)] == [0.5, 0.5]


def test_losses_come_in_on_schedule(scenes: Path, tmp_path: Path) -> None:
    result = run(
        scenes,
        tmp_path / "run",
        "pretrain.losses.itm.start=0.5",
        "pretrain.losses.mim.weight=0",
        "pretrain.validate_every=0.5",
        "pretrain.rerank_top_k=0",
    )
    lines = rows(result.run)
    assert [line["step"] for line in lines] == [3, 6, 9, 10, 12]
    assert [line["weights"]["itm"] for line in lines] == [0, 0, 0.5, 0.5, 0.5]
    assert ["itm" in line["losses"] for line in lines] == [False, False, True, True, True]
    assert {row.name for row in result.losses} == set(LOSSES) - {"mim"}
    assert result.rerank_weight == 0.0


def test_a_folder_that_holds_a_run_is_refused(pretrained: TrainResult, scenes: Path) -> None:
    before = weights(pretrained.run)
    with pytest.raises(UserError, match="already holds a run: choose another --output"):
        run(scenes, pretrained.run)
    assert equal(weights(pretrained.run), before)


def test_runs_get_folders_of_their_own(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain-scenes", "pretrain-scenes-2"):
        result = pretrain(scenes, overrides=[*TINY, "pretrain.epochs=0.1"], progress=QUIET)
        assert result.run == Path("runs") / name
        assert (tmp_path / "runs" / name / "model.safetensors").is_file()


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
    assert load_model(result.checkpoint, device="cpu").info.rerank_weight == 0.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pretrain.batch_size=97"], "does not fill one batch of 97 x 1 processes"),
        (["pretrain.batch_size=1"], "too few other pictures to draw 1 hard negatives"),
        (["pretrain.objective=clip"], "there is no objective 'clip'"),
        (["pretrain.options.mask_block=3"], "mask_block=3 does not tile the grid of 4x4"),
        (["model.image_size=36"], "image_size=36 is not a multiple of .* patch of 8"),
        (["pretrain.rate=1"], "'pretrain.rate' is not a setting"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(
    overrides: list[str], words: str, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        run(scenes, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_precision_that_cannot_be_had_is_named(scenes: Path, tmp_path: Path) -> None:
    Accelerator(cpu=True, mixed_precision="no")  # and it cannot be changed in this process
    with pytest.raises(UsageError, match="--precision bf16 does not work here"):
        run(scenes, tmp_path / "run", "pretrain.precision=bf16")


def test_a_tracker_that_is_not_installed_is_named(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--track wandb needs its package"):
        run(scenes, tmp_path / "run", track="wandb")


def test_a_launch_that_got_fewer_processes_than_asked_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched and 1 came together"):
        join()


def test_data_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a prepared data set"):
        run(tmp_path, tmp_path / "run")


def test_ctrl_c_waits_for_the_step_and_twice_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    stopping = loop._StopAtStep(enabled=True)
    with pytest.raises(KeyboardInterrupt), stopping:
        ctrl_c()
        assert stopping.asked  # and nothing was raised
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is before
