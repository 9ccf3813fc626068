"""prepare: which pictures and captions are left out, and which of them count."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from raw_files import QUIET, jpeg, run, stop_after

from vicvlm_cli.data import shards
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.sources.listing import Item, Picture
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.workflows import prepare as workflow
from vicvlm_cli.workflows.prepare import prepare


def test_a_picture_that_lost_a_caption_is_stored_by_the_run_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    rows = []
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(10 * i))
        rows.append({"file_name": f"{i}.jpg", "captions": ["good"], "split": "train"})
    rows[4]["captions"] = ["good", " "]
    rows.append({"file_name": "5.jpg", "captions": ["good"], "split": "val"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = workflow.encode_image
    stop_after(3, [], monkeypatch)
    monkeypatch.setattr(workflow, "_encoded", _one_by_one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source="folder", max_bad=1)
    assert len(list((tmp_path / "prepared" / "train").glob("*.arrow"))) == 1
    monkeypatch.setattr(workflow, "encode_image", real)
    result = run(tmp_path, source="folder", max_bad=1)
    assert result.manifest.images == {"train": 6}
    assert result.manifest.rejected == {}
    assert result.manifest.rejected_captions == {"empty caption": 1, "in two splits": 1}


def test_lost_captions_are_told_without_a_limit(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(10 * i))
        rows.append({"file_name": f"{i}.jpg", "captions": ["one", "two", "" if i < 3 else "three"]})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(tmp_path, source="folder")
    assert sum(result.manifest.images.values()) == 20
    assert sum(result.manifest.captions.values()) == 57
    assert result.to_dict()["rejected_captions"] == {"empty caption": 3}
    assert result.manifest.rejected == {}
    told = "captions left out of pictures that are kept: 3 empty caption (listed in rejected.jsonl)"
    assert result.warnings == [told] == run(tmp_path, source="folder").warnings


def test_a_picture_without_any_caption_counts_once(tmp_path: Path) -> None:
    rows = [{"file_name": "0.jpg", "captions": ["", " ", "\ud83d"]}]
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(10 * i))
        rows.append({"file_name": f"{i}.jpg", "captions": ["one"] if i else []})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(tmp_path, source="folder", max_bad=0.1)
    assert result.manifest.rejected == {"no caption": 1}
    assert result.manifest.rejected_captions == {}
    with pytest.raises(UserError, match=r"least 1 of 10 images are bad, .*: 0\.jpg \(no caption"):
        prepare("folder", tmp_path, image_side=16, max_bad=0.09, progress=QUIET)


def test_captions_outside_the_folder_are_no_success_of_an_older_data_set(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    captions = tmp_path / "captions.csv"
    captions.write_text("file_name,caption\n0.jpg,one\n")
    first = run(tmp_path, source="folder")
    captions.write_text(f"file_name,caption\n{tmp_path / '0.jpg'},one\n")
    with pytest.raises(UserError, match="the folder \\(the first is .*0.jpg\\): name each picture"):
        run(tmp_path, source="folder")
    assert PreparedDataset.open(first.path).manifest == first.manifest


def _one_by_one(pictures: Iterator[tuple[Item, Picture]], side: int, _: int) -> Iterator[object]:
    for item, picture in pictures:
        yield item, workflow.encode_image(picture, side)  # type: ignore[arg-type]


def test_odd_pictures_and_odd_text_stop_nothing(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    rows = []
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(10 * i))
        rows.append({"file_name": f"{i}.jpg", "captions": ["good", "\ud83d"], "split": "train"})
    Image.new("RGB", (70_000, 2)).save(folder / "long.png")
    rows.append({"file_name": "long.png", "caption": "a thread", "split": "train"})
    rows.append({"file_name": "\ud83d.png", "caption": "x", "split": "train"})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, source="folder", max_bad=1, output=tmp_path / "out")
    assert result.manifest.images == {"train": 3}
    assert result.manifest.rejected == {"name is not UTF-8": 1, "no JPEG can hold it": 1}
    assert result.manifest.rejected_captions == {"caption is not UTF-8": 3}
    train = PreparedDataset.open(result.path).split("train")
    assert train.captions == [["good"]] * 3
    assert train.paths[0] == str(tmp_path / r"caf\udce9" / "0.jpg")
    with pytest.raises(UserError, match=r"1 of 5 images are bad, .*: \\ud83d\.png \(name is not"):
        prepare("folder", folder, image_side=31, output=tmp_path / "out", progress=QUIET)
    with pytest.raises(UsageError, match=r"caf\\udce9/prepared is no name in UTF-8"):
        run(folder, source="folder")
