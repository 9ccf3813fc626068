"""How a command fails, and which process of a launch says so."""

import sys

import pytest
import torch
from test_cli import run

from vicvlm_cli import cli, console, remembered
from vicvlm_cli.errors import OwnError, UserError
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
