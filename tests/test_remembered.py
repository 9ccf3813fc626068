from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.remembered import last, recall, remember, state_file


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("VICVLM_STATE", str(tmp_path / "deep" / "state.json"))
    return tmp_path / "deep" / "state.json"


def test_remembers_absolute_paths_of_each_kind(tmp_path, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    assert remember("data", Path("photos"))
    assert remember("gallery", tmp_path)
    assert recall("data", "--data") == tmp_path / "photos"
    assert recall("gallery", "--gallery") == tmp_path
    assert last("checkpoint") is None
    assert [p.name for p in state.parent.iterdir()] == ["state.json"]  # nothing half-written


def test_a_later_one_replaces_an_earlier_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        remember("data", tmp_path / name)
    assert recall("data", "--data").name == "two"


def test_nothing_remembered_is_a_usage_error_with_advice():
    with pytest.raises(UsageError, match=r"no prepared data set yet: give --data.*vicvlm prepare"):
        recall("data", "--data")


def test_a_deleted_entry_is_named(tmp_path):
    remember("checkpoint", tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match=r"gone\.safetensors, is no longer there: give CHECKPOINT"):
        recall("checkpoint", "CHECKPOINT")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"data": 3, "x": "y"}'])
def test_a_damaged_file_is_an_empty_one_and_is_mended(content, state, tmp_path):
    state.parent.mkdir()
    state.write_bytes(content)
    assert last("data") is None
    assert remember("data", tmp_path)
    assert json.loads(state.read_text()) == {"data": str(tmp_path)}


def test_an_unwritable_place_is_told_not_raised(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VICVLM_STATE", str(tmp_path / "file" / "state.json"))
    assert not remember("data", tmp_path)


def test_a_place_that_may_not_be_looked_at_is_no_longer_there(tmp_path, state):
    state.parent.mkdir()
    state.write_text(json.dumps({"data": str(tmp_path / ("long" * 99))}))
    with pytest.raises(UserError, match="long, is no longer there: give --data"):
        recall("data", "--data")


def test_nothing_is_remembered_where_there_is_no_home(tmp_path, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VICVLM_STATE")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert state_file() is None and last("data") is None
    assert not remember("data", tmp_path)
    with pytest.raises(UsageError, match="no prepared data set yet"):
        recall("data", "--data")


def test_default_place_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("VICVLM_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_file() == tmp_path / "vicvlm" / "last.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_file() == tmp_path / ".local" / "state" / "vicvlm" / "last.json"
