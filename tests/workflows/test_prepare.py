"""prepare, from raw files to a prepared data set, with everything that can go wrong on the way."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.data import shards
from vicvlm_cli.data.decoded import decode
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.sources.listing import Item, Picture
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows import prepare as workflow
from vicvlm_cli.workflows.prepare import PrepareResult, prepare

QUIET = Progress(quiet=True)


def jpeg(shade: int, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def flickr8k(folder: Path, number: int = 20, broken: dict[int, bytes | None] | None = None) -> Path:
    """A tar.gz of `number` pictures, the last two for val, and a Karpathy JSON."""
    folder.mkdir(exist_ok=True)
    images = []
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        for i in reversed(range(number)):  # not in the order of the captions
            data = (broken or {}).get(i, jpeg(10 * i))
            if data is not None:
                info = tarfile.TarInfo(f"images/{i}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for i in range(number):
        split = "val" if i >= number - 2 else "train"
        sentences = [{"raw": f"picture {i}, {k}"} for k in range(5)]
        images.append({"filename": f"{i}.jpg", "split": split, "sentences": sentences})
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    return folder


def run(folder: Path, **options: object) -> PrepareResult:
    source = options.pop("source", "flickr8k")
    return prepare(source, folder, image_side=32, progress=QUIET, **options)  # type: ignore[arg-type]


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


def stop_after(pictures: int, calls: list[object], patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many pictures are encoded; ``calls`` are those that were begun."""
    real = workflow.encode_image

    def encode(source: object, side: int) -> bytes:
        calls.append(source)
        if len(calls) > pictures:
            raise KeyboardInterrupt
        return real(source, side)  # type: ignore[arg-type]

    patch.setattr(workflow, "encode_image", encode)


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
    with pytest.raises(UserError, match="no image of flickr8k is usable"):
        run(tmp_path, max_bad=1)
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
    again = run(tmp_path)
    assert again.skipped_work
    assert again.manifest == first.manifest
    assert "no longer in" in again.warnings[0]
    with pytest.raises(UserError, match="no pictures of flickr8k"):
        prepare("flickr8k", tmp_path, image_side=99, progress=QUIET)


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
    assert result.manifest.rejected == {"empty caption": 1, "in two splits": 1}


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
    assert result.manifest.rejected == {
        "caption is not UTF-8": 3,
        "name is not UTF-8": 1,
        "no JPEG can hold it": 1,
    }
    train = PreparedDataset.open(result.path).split("train")
    assert train.captions == [["good"]] * 3
    assert train.paths[0] == str(tmp_path / r"caf\udce9" / "0.jpg")
    with pytest.raises(UserError, match=r"are bad, .*0\.jpg \(caption is not UTF-8\)"):
        prepare("folder", folder, image_side=31, output=tmp_path / "out", progress=QUIET)
    with pytest.raises(UsageError, match=r"caf\\udce9/prepared is no name in UTF-8"):
        run(folder, source="folder")


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
