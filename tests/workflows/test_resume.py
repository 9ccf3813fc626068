"""Runs that were stopped, by a person or by a crash, and go on."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import teacher_weights
from tiny_training import BARE, QUIET, TINY, Heard, equal, rows, run, weights

from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.workflows import session
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.prepare import prepare
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.stopping import StopAtStep
from vicvlm_cli.workflows.train import finetune, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


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
    # Accumulation, crops, flips, dropout: all that a position must restore. Stopped in an epoch.
    settings = (
        "model.text_dropout=0.2",
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
    assert parts.rerank_weights == whole.rerank_weights
    assert [row["step"] for row in parts.validation] == [row["step"] for row in whole.validation]
    assert rows(parts.run)[-1]["losses"] == rows(whole.run)[-1]["losses"]
    assert {r.name: r.first for r in parts.losses} == {r.name: r.first for r in whole.losses}
    assert not (tmp_path / "parts" / "state").exists()


@pytest.mark.parametrize("objective", ["vicvlm", "albef", "clip"])
def test_a_resumed_run_caches_the_same_contrast(
    objective: str, scenes: Path, tmp_path: Path
) -> None:
    # With dropout: each batch begins its own numbers, whatever came before it.
    settings = (
        f"pretrain.objective={objective}",
        "pretrain.batch_size=8",
        "pretrain.contrastive_batch=24",
        "pretrain.epochs=3",
        "model.text_dropout=0.2",
        "data.crop_scale=0.6",
    )
    overrides = [*BARE, *settings]
    whole = pretrain(scenes, overrides=overrides, output=tmp_path / "whole", progress=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(5, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            pretrain(scenes, overrides=overrides, output=tmp_path / "parts", progress=QUIET)
    heard = Heard()
    parts = pretrain(scenes, resume=tmp_path / "parts", progress=heard)
    assert f"resuming {tmp_path / 'parts'} at step 5" in heard.notes
    assert (parts.steps, parts.pairs) == (whole.steps, whole.pairs) == (12, 288)
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert rows(parts.run)[-1]["losses"] == rows(whole.run)[-1]["losses"]


def test_a_resumed_run_finds_its_cached_views(scenes: Path, tmp_path: Path) -> None:
    settings = (
        "pretrain.epochs=3",
        "pretrain.frozen_blocks=1",
        "pretrain.cached_views=4",
        "data.crop_scale=0.6",
    )
    whole = run(scenes, tmp_path / "whole", *settings)
    assert not (whole.run / "views.npy").exists()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(8, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(scenes, tmp_path / "parts", *settings)
    made = (tmp_path / "parts" / "views.npy").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(12, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            pretrain(scenes, resume=tmp_path / "parts", progress=QUIET)
    assert (tmp_path / "parts" / "views.npy").stat().st_mtime_ns == made
    (tmp_path / "parts" / "views.npy").unlink()  # makes them again as they were
    pretrain(scenes, resume=tmp_path / "parts", progress=QUIET)
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("at", [3, 7])
def test_a_run_resumed_before_or_after_its_blocks_thaw_goes_on(
    scenes: Path, tmp_path: Path, at: int
) -> None:
    settings = (
        *("pretrain.frozen_blocks=1", "pretrain.frozen_epochs=0.7"),
        *("pretrain.cached_views=2", "pretrain.epochs=3"),
    )
    whole = run(scenes, tmp_path / "whole", *settings)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(at, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            run(scenes, tmp_path / "parts", *settings)
    pretrain(scenes, resume=tmp_path / "parts", progress=QUIET)
    assert whole.steps == 18
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


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


def test_a_run_whose_disk_is_full_says_how_it_goes_on(scenes: Path, tmp_path: Path) -> None:
    settings = ("pretrain.state_minutes=0", "pretrain.epochs=3", "pretrain.validate_every=2")
    run(scenes, tmp_path / "whole", *settings)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "save_model", full)  # at the validation after step 12
        with pytest.raises(UserError) as told:
            run(scenes, folder, *settings)
    assert str(told.value) == (
        f"cannot write {folder}: No space left on device; the state of step 10 is kept: mend that, "
        f"then go on with --resume {folder}"
    )
    pretrain(scenes, resume=folder, progress=QUIET)
    assert equal(weights(folder), weights(tmp_path / "whole"))


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


def test_what_cannot_be_resumed(pretrained: TrainResult, scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be resumed: it has finished"):
        pretrain(scenes, resume=pretrained.run, progress=QUIET)
    with pytest.raises(UserError, match="cannot be resumed: it has no saved state; give the comm"):
        pretrain(scenes, resume=tmp_path, progress=QUIET)
    with pytest.raises(UserError, match="cannot be resumed: there is no such folder; name one of"):
        pretrain(scenes, resume=tmp_path / "none", progress=QUIET)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "model.safetensors").touch()
    with pytest.raises(UserError, match="but no saved state; start a new run in another folder"):
        pretrain(scenes, resume=tmp_path / "killed", progress=QUIET)
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
    told = stopped / "state" / "run.json"
    description = json.loads(told.read_text())
    told.write_text(json.dumps(description | {"num_processes": 4}))
    with pytest.raises(UserError, match="of 4 processes and cannot go on with 1: .*per_node 4 -m"):
        pretrain(scenes, resume=stopped, progress=QUIET)
    told.write_text(json.dumps(description))
    file = stopped / "state" / "model.safetensors"  # as an earlier version may have left it
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "mlm_head" not in k}, file)
    with pytest.raises(UserError, match="holds other weights than this version trains"):
        pretrain(scenes, resume=stopped, progress=QUIET)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_twice_does_not(
    which: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(which)
    stopping = StopAtStep()
    with pytest.raises(KeyboardInterrupt), stopping:
        os.kill(os.getpid(), which)
        os.kill(os.getpid(), which)  # as a launcher and a scheduler tell the same
        assert stopping.asked  # and nothing was raised
        later = time.monotonic() + 3
        monkeypatch.setattr(time, "monotonic", lambda: later)
        os.kill(os.getpid(), which)
    assert signal.getsignal(which) is before


@pytest.mark.parametrize(
    "method",
    [
        (
            "albef",
            "pretrain.options.queue_size=20",
            "pretrain.options.queue_steps=2",
            "pretrain.options.alpha_steps=4",
        ),
        ("albef", "pretrain.options.queue_size=0"),
        ("mamo",),
        ("maskvlm", "pretrain.options.decoder_depth=1"),
        (
            "s_smke",
            "pretrain.options.bank_size=20",
            "pretrain.options.teacher=test_vit",
            f"pretrain.options.teacher_weights={teacher_weights()}",
        ),
        ("vsepp", "pretrain.options.mean_steps=6"),
        ("clip", "pretrain.options.loss=sigmoid", "pretrain.options.fit_bias=true"),
        ("retrieval",),
        ("vilt_ranking", "pretrain.options.negatives=2"),
        ("scan", "pretrain.options.mean_steps=6"),
        ("vilt",),
        ("clip", "pretrain.losses.variance.weight=0.1", "pretrain.options.expander=8"),
        ("clip", "pretrain.losses.words.weight=0.5"),
    ],
    ids=lambda method: "-".join(method[:2]),
)
def test_what_a_method_remembers_is_resumed(
    method: tuple[str, ...], scenes: Path, tmp_path: Path
) -> None:
    name, *settings = method
    tiny = [s for s in TINY if ".losses." not in s and ".options." not in s]
    overrides = [*tiny, f"pretrain.objective={name}", *settings]
    pretrain(scenes, overrides=overrides, output=tmp_path / "whole", progress=QUIET)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(5, patch, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            pretrain(scenes, overrides=overrides, output=tmp_path / "parts", progress=QUIET)
    pretrain(scenes, resume=tmp_path / "parts", progress=QUIET)
    assert equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert rows(tmp_path / "parts")[-1]["losses"] == rows(tmp_path / "whole")[-1]["losses"]
