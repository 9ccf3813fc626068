"""The state that resuming needs: whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import make_tokenizer
from torch import nn

from vicvlm_cli.workflows.state import find_run_state, save_run_state


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
