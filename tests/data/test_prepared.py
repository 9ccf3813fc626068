"""Reading prepared data sets."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.data import shards
from vicvlm_cli.data.images import encode_image
from vicvlm_cli.data.prepared import (
    MANIFEST,
    Manifest,
    PreparedDataset,
    is_prepared,
    split_hash,
)
from vicvlm_cli.data.shards import ShardWriter
from vicvlm_cli.data.sources.listing import Item
from vicvlm_cli.errors import UserError


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path, "1a2b3c4d" * 8)
    for i, split in enumerate(["train", "val", "train", "train"]):
        data = encode_image(Image.new("RGB", (12, 8), (60 * i, 0, 0)), 8)
        captions = tuple(f"caption {i}.{k}" for k in range(i + 1))
        writer.add(Item(f"{i}.jpg", split, captions, f"/raw/{i}.jpg"), data)
    writer.finish(source="flickr8k", split_name="karpathy", partial="test is missing", image_side=8)
    return tmp_path


def test_reads_back_what_was_written(prepared: Path) -> None:
    data = PreparedDataset.open(prepared)
    assert data.splits == ["train", "val"]
    train = data.split("train")
    assert len(train) == 3
    assert train.image_ids == ["0.jpg", "2.jpg", "3.jpg"]
    assert train.captions[1] == ["caption 2.0", "caption 2.1", "caption 2.2"]
    assert train.paths == ["/raw/0.jpg", "/raw/2.jpg", "/raw/3.jpg"]
    image = train.image(2)
    assert (image.mode, image.size) == ("RGB", (12, 8))
    assert abs(image.getpixel((5, 5))[0] - 180) < 4
    assert data.manifest.captions == {"train": 8, "val": 2}


def test_title_says_split_counts_hash_and_that_it_is_partial(prepared: Path) -> None:
    train = PreparedDataset.open(prepared).split("train")
    assert train.title == (
        f"flickr8k train (karpathy, 3 images, 8 captions, hash {train.hash[:8]}, "
        "partial: test is missing)"
    )


def test_a_split_can_be_pickled_before_and_after_use(prepared: Path) -> None:
    train = PreparedDataset.open(prepared).split("train")
    fresh = pickle.dumps(train)
    assert train.image(0).size == (12, 8)
    used = pickle.dumps(train)
    assert len(used) == len(fresh)  # no table travels along
    assert pickle.loads(used).image_ids == train.image_ids


def test_a_shard_is_an_ordinary_data_set_of_images(prepared: Path) -> None:
    import datasets

    (shard,) = PreparedDataset.open(prepared).manifest.shards["val"]
    row = datasets.Dataset.from_file(str(prepared / shard))[0]
    assert row["image"].size == (12, 8)
    assert (row["image_id"], row["split"]) == ("1.jpg", "val")


def test_hash_knows_no_order_but_every_caption() -> None:
    rows = [("a", ["x", "y"]), ("b", ["z"])]
    assert split_hash(rows) == split_hash([("b", ["z"]), ("a", ["y", "x"])])
    assert split_hash(rows) != split_hash([("a", ["x", "y"]), ("b", ["z "])])
    assert split_hash(rows) != split_hash([("a", ["x"]), ("b", ["y", "z"])])
    assert len(split_hash(rows)) == 16


def test_hash_is_in_the_manifest(prepared: Path) -> None:
    manifest = PreparedDataset.open(prepared).manifest
    assert manifest.split_hash["val"] == split_hash([("1.jpg", ["caption 1.0", "caption 1.1"])])


def test_unknown_split_names_those_there_are(prepared: Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        PreparedDataset.open(prepared).split("test")


def test_not_prepared_damaged_or_newer(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a prepared data set"):
        PreparedDataset.open(tmp_path / "nowhere")
    file = prepared / MANIFEST
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "format_version": 99, "vicvlm_version": "7.0"}))
    with pytest.raises(UserError, match="format 99, made by vicvlm 7.0.*upgrade"):
        PreparedDataset.open(prepared)
    file.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(UserError, match="lacks entries"):
        PreparedDataset.open(prepared)
    for text in (json.dumps(content)[:50], '{"manifest_version": 3}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"damaged or not a manifest of vicvlm: .* remove the"):
            PreparedDataset.open(prepared)
    with pytest.raises(UserError, match=r"cannot read x+/manifest\.json: File name too long"):
        PreparedDataset.open("x" * 300)


def test_a_manifest_of_another_program_is_no_prepared_data_set(prepared: Path) -> None:
    assert is_prepared(prepared)
    assert is_prepared(str(prepared))
    for foreign in ("{", "[]", '{"manifest_version": 3}', '{"format_version": 1, "shards": []}'):
        (prepared / MANIFEST).write_text(foreign)
        assert not is_prepared(prepared)
    assert not is_prepared(prepared / "nowhere")


def test_a_lost_shard_is_named(prepared: Path) -> None:
    data = PreparedDataset.open(prepared)
    (prepared / data.manifest.shards["val"][0]).unlink()
    with pytest.raises(UserError, match=r"val-1a2b3c4d-00000\.arrow is gone"):
        data.split("val")
    data.manifest.shards["val"][0] = "x" * 300  # at which os.stat raises
    with pytest.raises(UserError, match="x is gone"):
        data.split("val")


def test_a_shard_cut_short_is_named(prepared: Path) -> None:
    data = PreparedDataset.open(prepared)
    shard = prepared / data.manifest.shards["val"][0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"shards of val in .* are damaged: they have .* bytes, not"
    ):
        data.split("val")


def test_a_damaged_shard_of_the_right_size_is_named(prepared: Path) -> None:
    data = PreparedDataset.open(prepared)
    shard = prepared / data.manifest.shards["val"][0]
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match=r"cannot read .*val-1a2b3c4d-00000\.arrow .*remove it"):
        data.split("val").captions  # noqa: B018


def test_the_shard_of_a_damaged_picture_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 2)
    writer = ShardWriter(tmp_path, "1a2b3c4d" * 8)
    for i in range(5):
        writer.add(Item(f"{i}.jpg", "train", ("x",)), b"jpeg")
    writer.finish(source="flickr8k", split_name="karpathy", partial="", image_side=8)
    train = PreparedDataset.open(tmp_path).split("train")
    for i, number in enumerate((0, 0, 1, 1, 2)):
        message = str(train.damage(i, "truncated"))
        assert message.startswith(f"image {i}.jpg of flickr8k train (")
        assert f"remove {tmp_path}/train/train-1a2b3c4d-0000{number}.arrow and run" in message


def test_manifest_reads_back_equal(prepared: Path) -> None:
    manifest = Manifest.read(prepared)
    assert json.loads(manifest.to_json())["fingerprint"] == "1a2b3c4d" * 8
    assert Manifest(**json.loads(manifest.to_json())) == manifest
