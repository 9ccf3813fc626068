"""prepare, from raw files to a prepared data set, with everything that can go wrong on the way."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from raw_files import QUIET, flickr8k, jpeg, run, stop_after

from vicvlm_cli.data import shards
from vicvlm_cli.data.decoded import decode
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.sources import find_source, folder, listing
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.workflows import prepare as workflow
from vicvlm_cli.workflows.prepare import prepare


def test_raw_files_become_a_prepared_data_set(tmp_path: Path) -> None:
    result = run(flickr8k(tmp_path))
    assert result.path == tmp_path / "flickr8k"
    assert not result.skipped_work
    data = PreparedDataset.open(result.path)
    assert data.manifest == result.manifest
    assert data.manifest.images == {"train": 18, "val": 2}
    assert data.manifest.captions == {"train": 90, "val": 10}
    assert data.manifest.partial == (
        "train has 18 of 6,000 images; val has 2 of 1,000 images; test is missing"
    )
    assert "called partial" in result.warnings[0]
    val = data.split("val")
    assert sorted(val.image_ids) == ["18.jpg", "19.jpg"]
    i = val.image_ids.index("18.jpg")
    assert val.captions[i] == [f"picture 18, {k}" for k in range(5)]
    assert val.image(i).size == (48, 32)
    assert abs(val.image(i).getpixel((9, 9))[0] - 180) < 4
    assert (result.path / "rejected.jsonl").read_text() == ""


def test_running_it_again_does_nothing(tmp_path: Path) -> None:
    first = run(flickr8k(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = run(tmp_path)
    assert second.skipped_work
    assert second.manifest == first.manifest
    assert second.warnings == first.warnings
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before


def test_the_result_depends_neither_on_workers_nor_on_the_archive(tmp_path: Path) -> None:
    one = run(flickr8k(tmp_path / "a"), workers=1)
    many = run(flickr8k(tmp_path / "b"), workers=5)
    assert one.manifest.split_hash == many.manifest.split_hash
    for split in ("train", "val"):
        a, b = (PreparedDataset.open(r.path).split(split) for r in (one, many))
        assert a.image_ids == b.image_ids
        assert all(a.image(i) == b.image(i) for i in range(len(a)))


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    flickr8k(tmp_path, broken={15: b"no picture"})
    real, calls = workflow.encode_image, []
    stop_after(11, calls, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, workers=1, max_bad=0.5)
    output = tmp_path / "flickr8k"
    with pytest.raises(UserError, match="not a prepared data set"):
        PreparedDataset.open(output)
    whole = sorted(path.name for path in (output / "train").glob("*.arrow"))
    assert len(whole) == 2
    stamps = [path.stat().st_mtime_ns for path in sorted((output / "train").glob("*.arrow"))]

    calls.clear()
    monkeypatch.setattr(workflow, "encode_image", lambda s, side: calls.append(s) or real(s, side))
    result = run(tmp_path, max_bad=0.5)
    assert len(calls) == 20 - 8 - 1  # two shards of four and the bad one were settled
    now = sorted((output / "train").glob("*.arrow"))
    assert [path.stat().st_mtime_ns for path in now[:2]] == stamps
    assert result.manifest.images == {"train": 17, "val": 2}
    assert result.manifest.rejected == {"not an image": 1}
    undisturbed = run(flickr8k(tmp_path / "b", broken={15: b"no picture"}), max_bad=0.5)
    assert result.manifest.split_hash == undisturbed.manifest.split_hash


def test_bad_items_are_counted_and_listed(tmp_path: Path) -> None:
    noise = Image.effect_noise((90, 90), 99)
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    broken = {3: buffer.getvalue()[:2000], 4: None, 5: b"<html>", 19: b""}
    result = run(flickr8k(tmp_path, broken=broken), max_bad=0.2)
    assert result.manifest.rejected == {
        "truncated": 1,
        "missing": 1,
        "not an image": 1,
        "empty file": 1,
    }
    assert result.manifest.images == {"train": 15, "val": 1}
    assert any("1 truncated" in warning for warning in result.warnings)
    lines = (result.path / "rejected.jsonl").read_text().splitlines()
    assert {json.loads(line)["image_id"]: json.loads(line)["reason"] for line in lines} == {
        "3.jpg": "truncated",
        "4.jpg": "missing",
        "5.jpg": "not an image",
        "19.jpg": "empty file",
    }


def test_too_many_bad_items_stop_with_five_names_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    flickr8k(tmp_path, broken=dict.fromkeys(range(6), b"no"))
    with pytest.raises(UserError) as error:
        run(tmp_path, max_bad=0.25)
    message = str(error.value)
    assert message.startswith("at least 6 of 20 images are bad, more than --max-bad 0.25 allows: ")
    assert message.count("(not an image)") == 5
    output = tmp_path / "flickr8k"
    assert len((output / "rejected.jsonl").read_text().splitlines()) == 6
    assert len(list((output / "train").glob("*.arrow"))) == 3
    result = run(tmp_path, max_bad=0.5)
    assert result.manifest.images == {"train": 12, "val": 2}
    assert result.manifest.rejected == {"not an image": 6}


def test_nothing_usable_is_no_data_set(tmp_path: Path) -> None:
    flickr8k(tmp_path, number=3, broken=dict.fromkeys(range(3), b"no"))
    with pytest.raises(UserError, match=r"no image of flickr8k is usable; see .*rejected\.jsonl"):
        run(tmp_path, max_bad=1)
    assert len((tmp_path / "flickr8k" / "rejected.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "flickr8k" / "manifest.json").exists()


def test_a_member_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = flickr8k(tmp_path / "raw")
    with tarfile.open(folder / "images2.tar", "w") as archive:
        archive.add(folder / "dataset_flickr8k.json", "../../escaped.jpg", filter=None)
    with (
        tarfile.open(folder / "images.tar.gz") as old,
        tarfile.open(folder / "images.tar", "w") as new,
    ):
        for member in old:
            if member.name != "images/7.jpg":
                new.addfile(member, old.extractfile(member))
    (folder / "images.tar.gz").unlink()
    result = run(folder, max_bad=0.1)
    assert result.manifest.rejected == {"archive member outside the folder": 1, "missing": 1}
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_an_archive_cut_short_is_named_when_the_run_stops(tmp_path: Path) -> None:
    folder = flickr8k(tmp_path)
    archive = folder / "images.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-400])
    with pytest.raises(UserError, match=r"images\.tar\.gz is damaged or cut short"):
        run(folder)


def test_other_options_rebuild_in_place(tmp_path: Path) -> None:
    first = run(flickr8k(tmp_path))
    again = prepare("flickr8k", tmp_path, image_side=20, progress=QUIET)
    assert not again.skipped_work
    assert again.manifest.fingerprint != first.manifest.fingerprint
    assert PreparedDataset.open(again.path).split("val").image(0).size == (30, 20)
    files = {str(path.relative_to(again.path)) for path in again.path.rglob("*") if path.is_file()}
    kept = {file for shards in again.manifest.shards.values() for file in shards}
    assert files == {"manifest.json", "rejected.jsonl"} | kept


def test_prepared_data_outlive_their_raw_files(tmp_path: Path) -> None:
    first = run(flickr8k(tmp_path))
    (tmp_path / "images.tar.gz").unlink()
    with zipfile.ZipFile(tmp_path / "flickr8k_text.zip", "w") as archive:
        archive.writestr("readme.txt", "no picture")
    again = run(tmp_path)
    assert again.skipped_work
    assert again.manifest == first.manifest
    assert "no longer in" in again.warnings[0]
    with pytest.raises(UserError, match="no pictures of flickr8k"):
        prepare("flickr8k", tmp_path, image_side=99, progress=QUIET)


def test_a_run_that_fails_leaves_the_list_of_a_whole_data_set(tmp_path: Path) -> None:
    first = run(flickr8k(tmp_path, broken={3: b"no"}), max_bad=0.1)
    files = {path: path.read_bytes() for path in first.path.iterdir() if path.is_file()}
    flickr8k(tmp_path, broken=dict.fromkeys(range(6), b"no"))
    with pytest.raises(UserError, match=r"see .*/flickr8k/rejected-[0-9a-f]{8}\.jsonl, mend or"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in files} == files
    assert PreparedDataset.open(first.path).manifest == first.manifest


def test_a_manifest_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "extension"
    output.mkdir()
    (output / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(UserError) as error:
        run(tmp_path, source="scenes", sizes={"train": 2}, output=output)
    assert str(error.value) == (
        f"{output}/manifest.json is damaged or not a manifest of vicvlm, which would take its "
        "place: choose another --output, or remove it if nothing needs it"
    )
    assert [path.name for path in output.iterdir()] == ["manifest.json"]


def test_scenes_need_no_files_and_go_where_they_are_told(tmp_path: Path) -> None:
    sizes = {"train": 12, "val": 3, "test": 4}
    result = run(tmp_path / "x", source="scenes", sizes=sizes, output=tmp_path / "y", seed=5)
    assert result.path == tmp_path / "y"
    assert result.manifest.images == sizes
    assert (result.manifest.split_name, result.manifest.partial) == ("seed5", "")
    assert PreparedDataset.open(tmp_path / "y").split("test").image(3).size == (32, 32)
    assert run(tmp_path, source="scenes", sizes=sizes, output=tmp_path / "y", seed=5).skipped_work


def test_a_folder_of_pictures_goes_to_prepared(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"ü{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"ü{i}.txt").write_text(f"picture {i}")
    result = run(tmp_path, source="folder")
    assert result.path == tmp_path / "prepared"
    data = PreparedDataset.open(result.path)
    assert sum(data.manifest.images.values()) == 4
    assert Path(data.split("train").paths[0]).is_file()
    assert run(tmp_path, source="folder").skipped_work


def test_pictures_in_the_folder_of_the_output_are_found_again(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    for i in range(4):
        (tmp_path / "prepared" / f"{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / "prepared" / f"{i}.txt").write_text(f"picture {i}")
    assert sum(run(tmp_path, source="folder").manifest.images.values()) == 4
    assert run(tmp_path, source="folder").skipped_work


def test_a_damaged_data_set_is_mended_by_preparing_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    first = run(flickr8k(tmp_path))
    data = PreparedDataset.open(first.path)
    shard = first.path / data.manifest.shards["train"][1]
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1000])  # a copy that was interrupted
    with pytest.raises(UserError, match="damaged: .*run `vicvlm prepare` again"):
        data.split("train")
    again = run(tmp_path)
    assert not again.skipped_work
    assert again.manifest == first.manifest
    assert shard.read_bytes() == whole

    at = whole.index(b"JFIF") - 6  # its first picture
    shard.write_bytes(whole[:at] + bytes(9) + whole[at + 9 :])
    train = PreparedDataset.open(first.path).split("train")
    with pytest.raises(UserError, match=f"remove {shard} and run") as error:
        decode(train, 4, 16)
    assert "the shards are damaged" in str(error.value)
    shard.unlink()
    assert run(tmp_path).manifest == first.manifest
    assert shard.read_bytes() == whole


def test_a_split_by_chance_of_an_earlier_version_is_not_mixed_with_this(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_IMAGES", 4)
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(8 * i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    real = listing.settle_split

    def earlier(*given: object) -> tuple[object, str, object]:
        items, _, rejected = real(*given)  # type: ignore[arg-type]
        turned = {"train": "val", "val": "test", "test": "train"}
        moved = {key: replace(item, split=turned[item.split]) for key, item in items.items()}
        return moved, "random-seed0", rejected

    with monkeypatch.context() as patch:
        patch.setattr(folder, "settle_split", earlier)
        old = run(tmp_path, source="folder")
        assert (old.manifest.split_name, old.warnings) == ("random-seed0", [])
        stop_after(15, [], patch)
        with pytest.raises(KeyboardInterrupt):
            prepare("folder", tmp_path, image_side=16, workers=1, progress=QUIET)
    # What is there keeps what its manifest says, until all of the other is there.
    assert PreparedDataset.open(old.path).manifest == old.manifest
    result = prepare("folder", tmp_path, image_side=16, progress=QUIET)
    assert not result.skipped_work
    assert result.manifest.split_name == "random-hash-seed0"
    assert "had the split random-seed0, and this one has random-hash-seed0" in result.warnings[0]
    parts = PreparedDataset.open(result.path)
    stored = {split: set(parts.split(split).image_ids) for split in parts.splits}
    assert sum(map(len, stored.values())) == len(set.union(*stored.values())) == 30
    now = find_source("folder", tmp_path).items()
    assert all(item.image_id in stored[item.split] for item in now)
    assert prepare("folder", tmp_path, image_side=16, progress=QUIET).warnings == []


def test_senseless_options_and_places(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1 pixel"):
        prepare("scenes", tmp_path, image_side=0, progress=QUIET)
    with pytest.raises(UsageError, match="between 0 and 1"):
        prepare("scenes", tmp_path, max_bad=2, progress=QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare("scenes", tmp_path, output=tmp_path / "file" / "x", progress=QUIET)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "test").write_text("in the way")
    with pytest.raises(UserError, match="cannot write to"):
        run(tmp_path, source="scenes", sizes={"train": 2}, output=tmp_path / "y")
