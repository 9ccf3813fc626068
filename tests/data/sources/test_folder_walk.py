"""Which pictures of a folder are found: links, hidden files, folders that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_folder import captions, jsonl, pictures

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import NothingFound


def test_links_to_folders_list_no_picture_twice(tmp_path: Path) -> None:
    pictures(tmp_path, "z/a.png")
    (tmp_path / "z" / "a.txt").write_text("x")
    (tmp_path / "latest").symlink_to(".")
    (tmp_path / "beside").symlink_to("z")
    (tmp_path / "itself").symlink_to("itself")
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {"z/a.png": ("x",)}
    assert listing.warnings == []


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    pictures(tmp_path, "away/a.png", "raw/b.png", "raw/m/c.png")
    (tmp_path / "raw" / "l").symlink_to(tmp_path / "away")
    names = ["b.png", "l/a.png", "m/c.png"]
    for name in names:
        (tmp_path / "raw" / name).with_suffix(".txt").write_text(name)
    assert list(captions(find_source("folder", tmp_path / "raw"))) == names


def test_captions_may_name_a_picture_through_a_link(tmp_path: Path) -> None:
    pictures(tmp_path, "z/a.png")
    (tmp_path / "latest").symlink_to("z")
    jsonl(tmp_path / "captions.jsonl", {"file_name": "latest/a.png", "caption": "x"})
    listing = find_source("folder", tmp_path)
    ((item, picture),) = listing.stream(set())
    assert (item.image_id, picture) == ("z/a.png", tmp_path / "z" / "a.png")
    assert listing.warnings == []
    jsonl(
        tmp_path / "captions.jsonl",
        {"file_name": "latest/a.png", "caption": "x"},
        {"file_name": "z/a.png", "caption": "y"},
        {"file_name": "lat\0est/a.png", "caption": "no name of a file"},
    )
    assert captions(find_source("folder", tmp_path))["z/a.png"] == ("x", "y")


def test_captions_admit_nothing_that_is_left_out(tmp_path: Path) -> None:
    names = [".h/a.png", "z/.a.png", "latest/.a.png"]
    pictures(tmp_path, "z/a.png", *names[:2])
    (tmp_path / "latest").symlink_to("z")
    rows = [{"file_name": name, "caption": "x"} for name in ["z/a.png", *names]]
    jsonl(tmp_path / "captions.jsonl", *rows)
    ((item, _),) = find_source("folder", tmp_path).stream(set())
    assert item.image_id == "z/a.png"


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path, "a.png", "shut/b.png")
    (tmp_path / "a.txt").write_text("x")
    scan = os.scandir

    def scandir(place: Path) -> object:
        if Path(place) == tmp_path / "shut":
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    told = rf"cannot read the folder {tmp_path / 'shut'} (Permission denied): make it readable"
    assert told in find_source("folder", tmp_path).warnings[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(NothingFound) as error:
        find_source("folder", tmp_path)
    assert told in str(error.value)


def test_a_folder_called_prepared_is_read_like_any_other(tmp_path: Path) -> None:
    pictures(tmp_path, "prepared/a.png")
    jsonl(tmp_path / "captions.jsonl", {"file_name": "prepared/a.png", "caption": "x"})
    listing = find_source("folder", tmp_path)
    assert len(list(listing.stream(set()))) == 1
    assert listing.warnings == []
