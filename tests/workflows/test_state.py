"""The state that resuming needs: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny import make_tokenizer
from torch import nn

from vicvlm_cli.errors import OwnError
from vicvlm_cli.workflows.state import find_run_state, save_run_state, writing


def test_a_saved_state_comes_back(accelerator: Accelerator, tmp_path: Path) -> None:
    module = accelerator.prepare(nn.Linear(2, 2))
    weight = module.weight.detach().clone()
    assert find_run_state(tmp_path) is None
    for step in (1, 2):
        save_run_state(accelerator, tmp_path / "state", make_tokenizer(), {"step": step})
    state = find_run_state(tmp_path)
    assert state == tmp_path / "state" and list(tmp_path.iterdir()) == [state]
    assert json.loads((state / "run.json").read_text()) == {"step": 2}
    assert (state / "tokenizer.json").read_text() == make_tokenizer().to_json()
    with torch.no_grad():
        module.weight.zero_()
    accelerator.load_state(str(state))
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("dies", ["in the middle", "between the renames"])
def test_a_save_that_dies_leaves_the_one_before(
    dies: str, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator.prepare(nn.Linear(2, 2))
    save_run_state(accelerator, tmp_path / "state", make_tokenizer(), {"step": 1})
    moves: list[Path] = []
    real = os.replace

    def die(folder: Path) -> None:
        Path(folder).mkdir()
        raise ZeroDivisionError

    def replace(a: Path, b: Path) -> None:
        if moves:
            raise ZeroDivisionError
        moves.append(a)
        real(a, b)

    if dies == "in the middle":
        monkeypatch.setattr(accelerator, "save_state", die)
    else:
        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ZeroDivisionError):
        save_run_state(accelerator, tmp_path / "state", make_tokenizer(), {"step": 2})
    monkeypatch.undo()
    state = find_run_state(tmp_path)
    assert state is not None
    assert json.loads((state / "run.json").read_text()) == {"step": 1}
    save_run_state(accelerator, tmp_path / "state", make_tokenizer(), {"step": 3})  # and goes on
    assert json.loads((tmp_path / "state" / "run.json").read_text()) == {"step": 3}


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """As on a disk that has this much room."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_there_is_no_room_for_leaves_the_one_before(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    accelerator.prepare(nn.Linear(400, 400))
    for step in (1, None):
        position = {"position": {"step": step}}
        try:
            with no_file_above(10**7 if step else 300_000):
                save_run_state(accelerator, tmp_path / "state", make_tokenizer(), position)
        except OwnError as error:
            assert step is None
            assert str(error) == (
                f"cannot write {tmp_path}: {os.strerror(errno.EFBIG)}; the state of step 1 is "
                f"kept: mend that, then go on with --resume {tmp_path}"
            )
        else:
            assert step == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]  # and half of no other


def test_what_torch_and_safetensors_say_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    large = {"x": torch.zeros(100_000)}
    again = "; mend that, or choose another --output, and start again"
    part, limit = f"the disk is full, or took only a part{again}", os.strerror(errno.EFBIG) + again
    with no_file_above(300_000):
        with pytest.raises(OwnError, match=part), writing(tmp_path):
            torch.save(large, tmp_path / "a.bin")
        with pytest.raises(OwnError, match=limit), writing(tmp_path):
            save_file(large, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a"), "Permission denied"),
        (OSError("a failing disk"), "a failing disk"),
        (
            SafetensorError(
                'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No '
                'space left on device" })'
            ),
            "No space left on device",
        ),
        (SafetensorError("something else"), "something else"),
    ],
)
def test_why_a_run_cannot_be_written(error: Exception, reason: str, tmp_path: Path) -> None:
    told = f"^cannot write {tmp_path}: {reason}; mend that"
    with pytest.raises(OwnError, match=told), writing(tmp_path):
        raise error


def test_errors_about_something_else_stay_what_they_are(tmp_path: Path) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("size mismatch")):
        with pytest.raises(type(error), match=str(error)), writing(tmp_path):
            raise error
