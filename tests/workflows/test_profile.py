"""A profile of a training: what it holds, what it leaves alone, what it refuses."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_training import QUIET, Heard, equal, rows, run, weights

from vicvlm_cli.errors import UserError
from vicvlm_cli.report.tables import training_tables
from vicvlm_cli.workflows import profile as profiles
from vicvlm_cli.workflows.profile import Recorder, trace_file
from vicvlm_cli.workflows.run import TrainResult

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PARTS = ["data wait", "augment", "forward", "backward", "optimiser", "EMA", "log", "other"]


def events(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def test_a_profile_names_the_parts_and_changes_nothing(
    scenes: Path, pretrained: TrainResult, tmp_path: Path
) -> None:
    result = run(scenes, tmp_path / "run", "pretrain.validate_every=1", profile=tmp_path)
    assert equal(weights(result.run), weights(pretrained.run))
    told = [[row["losses"] for row in rows(path)] for path in (result.run, pretrained.run)]
    assert told[0] == told[1]

    profile = result.profile
    assert profile is not None and profile.path == tmp_path / "pretrain-trace.json.gz"
    assert {path.name for path in tmp_path.iterdir()} == {"run", profile.path.name}
    assert json.loads((result.run / "result.json").read_text())["profile"] == profile.to_dict()
    assert profile.steps == profiles.RECORDED
    # The sixth step ends an epoch: a validation is among the five.
    assert [part.name for part in profile.parts] == [*PARTS[:-1], "validation", "other"]
    assert sum(part.share for part in profile.parts) == pytest.approx(1, abs=0.02)
    costs = [row.host_ms for row in profile.operators]
    assert len(costs) == profiles.OPERATORS and costs == sorted(costs, reverse=True)
    assert all(row.device_ms is None for row in (*profile.parts, *profile.operators))

    trace = events(profile.path)
    named = [event["name"] for event in trace]
    assert named.count("forward") == named.count("backward") == profiles.RECORDED
    assert any(event.get("args", {}).get("Input Dims") for event in trace)

    console = Console(file=io.StringIO(), width=120)
    for block in training_tables(result):
        console.print(block)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(part in text for part in PARTS) and profile.operators[0].name in text
    assert "5 steps of" in text


def test_a_short_run_writes_what_it_has_or_says_that_it_has_nothing(
    scenes: Path, tmp_path: Path
) -> None:
    file, heard = tmp_path / "trace.json", Heard()
    result = run(scenes, tmp_path / "b", "pretrain.epochs=0.5", profile=file, progress=heard)
    assert result.steps == 3 and result.profile is None and not file.exists()
    assert any("no profile was written: the run was over after 5 steps" in x for x in heard.notes)

    result = run(scenes, tmp_path / "a", "pretrain.epochs=1.1", profile=file, progress=heard)
    assert result.steps == 7 and result.profile is not None and result.profile.steps == 2
    assert [event["name"] for event in events(file)].count("forward") == 2
    assert f"profile: 2 steps in {file}" in heard.notes


def test_where_no_trace_can_go_is_said_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    for given, text in (
        (tmp_path / "none", "there is no folder .*none; make it first, or name a file that ends"),
        (tmp_path / "none" / "a.json", "there is no folder .*none; make it first$"),
        (tmp_path / "folder.json", "is a folder with the name of a file"),
        (tmp_path / f"{300 * 'a'}.json", "cannot be written to .*; choose another place"),
        (tmp_path / "a\0b.json", "cannot be written to .*; choose another place"),
    ):
        with pytest.raises(UserError, match=text):  # the data set is not looked for yet
            run(tmp_path / "no data", tmp_path / "run", profile=given)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    assert trace_file(tmp_path / "a.json.gz", "x") == tmp_path / "a.json.gz"
    monkeypatch.setattr(Path, "touch", refuse)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be written to \(Permission denied\); choose"):
        trace_file(tmp_path, "pretrain")


def test_a_trace_that_is_not_written_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(profiles, "SKIPPED", 1)
    heard = Heard()
    recorder = Recorder(tmp_path / "gone" / "trace.json", torch.device("cpu"), heard)
    with recorder:
        for _ in range(8):
            with recorder.part("forward"):
                torch.ones(3).sum()
            recorder.step()
    assert recorder.profile is None
    assert any(note.startswith("warning: the profile") for note in heard.notes)


def test_a_step_that_is_broken_off_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(profiles, "SKIPPED", 1)
    recorder = Recorder(tmp_path / "trace.json", torch.device("cpu"), QUIET)
    with pytest.raises(KeyboardInterrupt), recorder:
        for step in range(3):
            for _ in range(1 if step < 2 else 50):
                with recorder.part("forward"):
                    torch.ones(3).sum()
            if step == 2:
                raise KeyboardInterrupt
            recorder.step()
    assert recorder.profile is not None and recorder.profile.steps == 1
    (forward,) = [part for part in recorder.profile.parts if part.name == "forward"]
    assert forward.calls == 1 and forward.share <= 1
