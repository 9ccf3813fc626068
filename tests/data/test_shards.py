"""Shards appear whole, and an interrupted run continues after the last of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicvlm_cli.data import shards
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.shards import ShardWriter
from vicvlm_cli.data.sources.listing import Item, Rejected

FACTS = {"source": "folder", "split_name": "given", "partial": "", "image_side": 8}
KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 3)


def add(writer: ShardWriter, numbers: range, split: str = "train") -> None:
    for i in numbers:
        if str(i) not in writer.done:
            writer.add(Item(str(i), split, (f"caption {i}",)), b"jpeg %d" % i)


def test_continues_after_the_last_whole_shard(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    add(first, range(4))
    first.reject(Rejected("bad", "train", "truncated"))
    add(first, range(4, 8))  # 0-5 are on disk, 6 and 7 are lost

    second = ShardWriter(tmp_path, KEY)
    assert second.done == {*"012345", "bad"}
    assert second.counts() == {"train": 6}
    second.reject(Rejected("bad", "train", "truncated"))  # found again: counted once
    add(second, range(10))
    manifest = second.finish(**FACTS)
    assert manifest.images == {"train": 10}
    assert manifest.rejected == {"truncated": 1}
    train = PreparedDataset.open(tmp_path).split("train")
    assert train.image_ids == [str(i) for i in range(10)]
    assert sorted(p.suffix for p in (tmp_path / "train").iterdir()) == [".arrow"] * 4


def test_what_only_lost_a_caption_is_not_done(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    first.reject(Rejected("4", "train", "empty caption"), settled=False)
    add(first, range(3))
    second = ShardWriter(tmp_path, KEY)
    assert second.done == {"0", "1", "2"}
    second.reject(Rejected("4", "train", "empty caption"), settled=False)
    add(second, range(5))
    manifest = second.finish(**FACTS)
    assert manifest.images == {"train": 5}
    assert (manifest.rejected, second.lost) == ({}, {})
    assert "empty caption" in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")


def test_a_picture_that_is_left_out_counts_once(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    first.reject(Rejected("bad", "train", "truncated"))
    add(first, range(3))
    second = ShardWriter(tmp_path, KEY)
    second.reject(Rejected("bad", "train", "empty caption"), settled=False)
    for split in ("train", "val"):
        second.reject(Rejected("../x", split, "outside the folder"), settled=False)
    assert second.lost == {"bad": "truncated", "../x": "outside the folder"}
    assert second.finish(**FACTS).rejected == {"truncated": 1, "outside the folder": 1}


def test_names_that_are_not_utf8_are_listed_as_escapes_and_found_again(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    odd = Rejected("caf\udce9 \ud83d", "train", "truncated")
    first.reject(odd)
    first.add(Item("0", "train", ("x",), "/raw/caf\udce9/0.jpg"), b"jpeg")
    add(first, range(1, 3))
    second = ShardWriter(tmp_path, KEY)
    assert list(second.rejected) == [odd]
    second.finish(**FACTS)
    assert r"caf\udce9 \ud83d" in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")
    assert PreparedDataset.open(tmp_path).split("train").paths[0] == r"/raw/caf\udce9/0.jpg"


def test_noting_many_rejected_items_compares_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    same = Rejected.__eq__
    monkeypatch.setattr(Rejected, "__eq__", lambda a, b: compared.append(a) or same(a, b))
    writer = ShardWriter(tmp_path, KEY)
    for i in range(500):
        writer.reject(Rejected(f"{i}", "train", "missing"))
    assert len(compared) < 500


def test_another_fingerprint_begins_anew_and_replaces_at_the_end(tmp_path: Path) -> None:
    old = ShardWriter(tmp_path, KEY)
    add(old, range(4))
    old.finish(**FACTS)
    foreign = tmp_path / "train" / "train-of-mine.arrow"
    foreign.write_text("not ours")
    (tmp_path / "train" / "train-01234567-89abcdef-20.npy.my-host.1.tmp").touch()

    new = ShardWriter(tmp_path, "f" * 16)
    assert new.done == set()
    add(new, range(3))
    reader = PreparedDataset.open(tmp_path).split("train")
    assert len(reader.captions) == 4  # the old one still stands
    new.finish(**FACTS)
    assert len(PreparedDataset.open(tmp_path).split("train").captions) == 3
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert names == ["train-ffffffff-00000.arrow", "train-of-mine.arrow"]


def test_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    add(first, range(9))
    shard = tmp_path / "train" / "train-01234567-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:100])
    second = ShardWriter(tmp_path, KEY)
    assert second.done == {"0", "1", "2"}
    add(second, range(9))
    assert second.finish(**FACTS).images == {"train": 9}


def test_splits_and_bytes_are_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)
    writer = ShardWriter(tmp_path, KEY)
    add(writer, range(4))
    add(writer, range(4, 5), "test")
    manifest = writer.finish(**FACTS)
    assert {split: len(files) for split, files in manifest.shards.items()} == {
        "train": 2,
        "test": 1,
    }
    assert manifest.captions == {"train": 4, "test": 1}
    size = (tmp_path / manifest.shards["test"][0]).stat().st_size
    assert manifest.size_bytes["test"] == size


def test_rejected_items_are_listed_with_their_reason(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, KEY)
    writer.reject(Rejected("ü.jpg", "train", "missing"))
    writer.reject(Rejected("../x", "", "archive member outside the folder"))
    writer.write_rejected()
    lines = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"image_id": "ü.jpg", "split": "train", "reason": "missing"}
    assert len(lines) == 2


def test_a_data_set_that_is_there_keeps_its_list(tmp_path: Path) -> None:
    first = ShardWriter(tmp_path, KEY)
    first.reject(Rejected("a", "train", "missing"))
    add(first, range(2))
    first.finish(**FACTS)
    listed = (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")
    second = ShardWriter(tmp_path, "f" * 16)
    second.reject(Rejected("b", "train", "missing"))
    assert second.write_rejected() == tmp_path / "rejected-ffffffff.jsonl"
    assert (tmp_path / "rejected.jsonl").read_text(encoding="utf-8") == listed
    add(second, range(2))
    second.finish(**FACTS)
    assert [path.name for path in tmp_path.glob("rejected*")] == ["rejected.jsonl"]
    assert '"b"' in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8")
