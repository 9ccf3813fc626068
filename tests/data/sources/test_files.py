"""Which files are found below a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vicvlm_cli.data.sources.files import escapes, is_absolute, walk


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk(folder, 9, {})]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder in which two links lead to one beside it, and one goes round."""
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "x").touch()
    (tmp_path / "top" / "sub").mkdir(parents=True)
    for link in ("b", "a", "sub/0"):
        (tmp_path / "top" / link).symlink_to(tmp_path / "away")
    (tmp_path / "top" / "sub" / "round").symlink_to(tmp_path / "top")
    return tmp_path / "top"


@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_links_the_same_counts_everywhere(
    linked: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    scan = os.scandir

    def scandir(place: Path) -> list[os.DirEntry[str]]:
        return sorted(scan(place), key=lambda entry: entry.name, reverse=backwards)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(linked) == ["a/x"]


def test_folders_without_numbers_are_told_apart(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "stat", lambda _: SimpleNamespace(st_dev=1, st_ino=0))
    assert names(linked) == ["a/x"]


def test_a_folder_whose_entries_cannot_be_looked_at_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dir(**_: bool) -> bool:
        raise PermissionError(13, "Permission denied")

    entry = SimpleNamespace(
        name="x", path=str(tmp_path / "x"), is_symlink=lambda: False, is_dir=is_dir
    )
    monkeypatch.setattr(os, "scandir", lambda _: [entry])
    unread: dict[Path, str] = {}
    assert walk(tmp_path, 9, unread) == []
    assert list(unread) == [tmp_path]
    assert f"cannot read the folder {tmp_path} (Permission denied)" in unread[tmp_path]


@pytest.mark.parametrize(
    ("name", "absolute", "out"),
    [
        ("a/b.jpg", False, False),
        ("9:41.png", False, False),
        ("C:a.png", True, True),
        ("\\\\server\\a.png", True, True),
        ("/a.png", True, True),
        ("a/../../b.png", False, True),
        ("..a.png", False, False),
    ],
)
def test_names_that_lead_out_of_a_folder(name: str, absolute: bool, out: bool) -> None:
    assert (is_absolute(name), escapes(name)) == (absolute, out)
