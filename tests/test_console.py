"""How a command fails, and which process of a launch says so."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_cli import run

from vicvlm_cli import cli, console, remembered
from vicvlm_cli.errors import OwnError, UserError
from vicvlm_cli.gallery.results import Hit, RetrieveResult
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows import embed as embed_workflow
from vicvlm_cli.workflows import evaluate as evaluate_workflow
from vicvlm_cli.workflows import retrieve as retrieve_workflow
from vicvlm_cli.workflows import train as train_workflow

pytestmark = pytest.mark.usefixtures("forgetful")


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("the moon is full"), 1, "error: the moon is full"),
        (KeyboardInterrupt(), 130, "stopped; what was finished before is kept"),
    ],
)
def test_stopping_takes_one_sentence(monkeypatch, error, code, text):
    def stop(*args, **options):
        raise error

    monkeypatch.setattr(evaluate_workflow, "evaluate", stop)
    said = run("evaluate", "model.safetensors", "--data", "data")
    assert (said.exit_code, said.stdout) == (code, "")
    assert said.stderr.startswith(text) and len(said.stderr.splitlines()) == 1


def test_a_bug_is_two_lines_and_the_traceback_is_to_be_had(monkeypatch, capsys):
    def fail(*args, **options):
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(evaluate_workflow, "evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["vicvlm", "evaluate", "model.safetensors", "--data", "data"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: by nought" in shown and "VICVLM_DEBUG=1" in shown
    monkeypatch.setenv("VICVLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_file_that_cannot_be_read_is_no_bug(monkeypatch, capsys):
    def fail(*args, **options):
        raise PermissionError(13, "Permission denied", "/root/shards")

    monkeypatch.setattr(evaluate_workflow, "evaluate", fail)
    monkeypatch.setattr(sys, "argv", ["vicvlm", "evaluate", "model.safetensors", "--data", "data"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = "error: cannot read or write /root/shards: Permission denied\n"
    assert capsys.readouterr().err == said
    monkeypatch.setenv("VICVLM_DEBUG", "1")
    with pytest.raises(PermissionError):
        cli.main()


def test_without_a_home_nothing_is_remembered_and_that_is_said(monkeypatch, tmp_path, capsys):
    for file, why in (
        (None, "neither HOME nor VICVLM_STATE is set"),
        (Path("/proc/last.json"), "/proc/last.json cannot be written"),
    ):
        monkeypatch.setattr(remembered, "state_file", lambda file=file: file)
        monkeypatch.setattr(remembered, "remember", lambda *_: False)
        console.remember("data", tmp_path, Progress())
        assert capsys.readouterr().err == f"note: {why}, so data has no default\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_hits_are_shown_before_what_became_of_their_sheet(monkeypatch, as_json):
    hit = Hit(rank=1, score=0.3, cosine=0.3, path="dog.jpg", id="dog", captions=[], row=0)
    found = RetrieveResult(
        query="dog",
        by_image=False,
        gallery=Path("gallery"),
        searched=1,
        reranked=False,
        hits=[hit],
        sheet_error=UserError("cannot write the sheet dog.png: no space"),
    )
    monkeypatch.setattr(retrieve_workflow, "retrieve", lambda *args, **options: found)
    said = run("retrieve", "dog", "--gallery", "gallery", *["--json"] * as_json)
    assert said.exit_code == 1 and "dog.jpg" in said.stdout
    assert said.stderr == "error: cannot write the sheet dog.png: no space\n"
    if as_json:
        assert json.loads(said.stdout)["sheet"] is None


@pytest.mark.parametrize(
    "line, code, text",
    [
        (["dog", "--sheet", "dog.doc"], 2, "the sheet dog.doc needs the name of a picture"),
        (["--image", "none.jpg"], 1, "picture none.jpg cannot be read: missing"),
        ([" "], 2, "the query is empty"),
        (["--image", "none.jpg", "--rerank"], 2, "--rerank compares words with pictures"),
    ],
)
def test_what_is_looked_for_is_checked_before_a_gallery_is_made(line, code, text):
    said = run("retrieve", *line)
    assert said.exit_code == code and said.stderr.startswith(f"error: {text}")


def test_that_another_process_has_ended_is_no_bug(monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:16044")

    monkeypatch.setattr(train_workflow, "pretrain", fail)
    monkeypatch.setattr(sys, "argv", ["vicvlm", "pretrain", "--data", "data"])
    monkeypatch.setattr(console, "RANK", 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    ended = "process 2: error: another process of the launch has ended, see what it says\n"
    assert capsys.readouterr().err == ended
    monkeypatch.setenv("WORLD_SIZE", "1")  # alone, there is none
    with pytest.raises(SystemExit):
        cli.main()
    assert "unexpected RuntimeError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, text",
    [
        ("evaluate m --data d", "lower --batch-size, or end what else fills the device"),
        ("embed d --checkpoint m", "lower --batch-size, or end what else fills the device"),
        ("retrieve dog --gallery g", "end what else fills the device"),
    ],
)
def test_a_device_without_memory_is_a_sentence(monkeypatch, line, text):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for module, name in (
        (evaluate_workflow, "evaluate"),
        (embed_workflow, "embed"),
        (retrieve_workflow, "retrieve"),
    ):
        monkeypatch.setattr(module, name, fail)
    said = run(*line.split())
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == f"error: out of memory: {text}\n"


@pytest.fixture
def second_process(monkeypatch):
    """As rank 1 of a machine with rank 0; the seconds that it waits."""
    waits = []
    monkeypatch.setattr(console.time, "sleep", waits.append)
    monkeypatch.setattr(console, "LOCAL_RANK", 1)
    for module in (cli, console):
        monkeypatch.setattr(module, "RANK", 1)
    return waits


def test_only_rank_0_speaks(tiny_checkpoint, tiny_data, second_process):
    said = run("evaluate", tiny_checkpoint, "--data", tiny_data)
    assert (said.exit_code, said.output) == (0, "")  # rank 0 does the work alone
    assert second_process == []
    said = run("pretrain", "--data", "nowhere")
    assert (said.exit_code, said.output) == (1, "")
    assert second_process == [console.PATIENCE]  # or rank 0 would be ended before it spoke
    assert remembered.last("checkpoint") is None


def test_the_first_process_of_another_machine_says_what_that_lacks(second_process, monkeypatch):
    monkeypatch.setattr(console, "LOCAL_RANK", 0)
    said = run("pretrain", "--data", "nowhere")
    assert said.stderr.startswith("process 1: error: nowhere is not a prepared data set")
    assert run("pretrain", "--data", "nowhere", "--epochs", "many").exit_code == 2
    said = run("pretrain")  # about the command line, which is the same everywhere
    assert (said.exit_code, said.output) == (2, "")


@pytest.mark.parametrize("error", [OwnError("picture 7 is damaged"), OwnError("no room")])
def test_any_process_says_what_it_alone_has_met(second_process, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(train_workflow, "pretrain", fail)
    said = run("pretrain", "--data", "data")
    assert (said.exit_code, said.stdout) == (1, "")
    assert said.stderr == f"process 1: error: {error}\n" and second_process == []
