"""--from-hub, tested on local repositories, which HF datasets loads by path."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import draw
from vicvlm_cli.errors import UsageError, UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(repo: Path, name: str, columns: dict[str, list[object]]) -> None:
    import datasets

    repo.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        data = data.cast_column("image", datasets.Image())
    data.to_parquet(str(repo / f"{name}-00000-of-00001.parquet"))


def test_parquet_with_a_split_column(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    columns = {
        "image": [{"bytes": picture(50 * i), "path": None} for i in range(4)],
        "caption": [[f"picture {i}", f"number {i}"] for i in range(4)],
        "split": ["train", "train", "val", "test"],
        "filename": [f"{i}.jpg" for i in range(4)],
    }
    parquet(repo, "test", columns)
    listing = find_source("flickr30k", tmp_path, from_hub=str(repo))
    assert [(item.image_id, item.split, item.captions) for item in listing.items()] == [
        ("0.jpg", "train", ("picture 0", "number 0")),
        ("1.jpg", "train", ("picture 1", "number 1")),
        ("2.jpg", "val", ("picture 2", "number 2")),
        ("3.jpg", "test", ("picture 3", "number 3")),
    ]
    assert (listing.source, listing.split_name) == ("flickr30k", "hub")
    assert listing.expected == {"train": 29_000, "val": 1_014, "test": 1_000}
    shades = [load_rgb(draw(pic)).getpixel((0, 0))[0] for _, pic in listing.stream({"1.jpg"})]
    assert shades == [0, 100, 150]
    assert listing.digest == find_source("flickr30k", tmp_path, from_hub=str(repo)).digest


def test_a_caption_a_row_and_splits_of_the_repository(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    for split, numbers in (("train", [0, 0, 1]), ("validation", [2, 2])):
        columns = {
            "image": [{"bytes": picture(n), "path": None} for n in numbers],
            "text": [f"{n}, row {i}" for i, n in enumerate(numbers)],
            "image_id": list(numbers),
        }
        parquet(repo, split, columns)  # type: ignore[arg-type]
    listing = find_source("folder", tmp_path, from_hub=str(repo))
    assert {item.image_id: (item.split, item.captions) for item in listing.items()} == {
        "0": ("train", ("0, row 0", "0, row 1")),
        "1": ("train", ("1, row 2",)),
        "2": ("val", ("2, row 0", "2, row 1")),
    }
    assert listing.expected is None


def test_a_folder_of_pictures_without_a_split_gets_one_by_chance(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    repo.mkdir()
    rows = []
    for i in range(10):
        (repo / f"{i}.png").write_bytes(picture(i))
        rows.append(json.dumps({"file_name": f"{i}.png", "caption_0": f"a{i}", "caption_1": "b"}))
    (repo / "metadata.jsonl").write_text("\n".join(rows))
    listing = find_source("folder", tmp_path, from_hub=str(repo))
    assert listing.split_name == "random-hash-seed0"
    assert Counter(item.split for item in listing.items()) == {"train": 8, "val": 1, "test": 1}
    for item, pic in listing.stream(set()):
        assert item.captions == (f"a{load_rgb(draw(pic)).getpixel((0, 0))[0]}", "b")


def test_unknown_splits_of_rows_are_told(tmp_path: Path) -> None:
    columns = {
        "image": [{"bytes": picture(50 * i), "path": None} for i in range(2)],
        "caption": [["x", None], ["y", None]],
        "split": ["fold1", "fold2"],
    }
    repo = tmp_path / "repo"
    parquet(repo, "train", columns)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"unknown splits in {repo}: fold1, fold2 "):
        find_source("folder", tmp_path, from_hub=str(repo))
    listing = find_source("folder", tmp_path, from_hub=str(repo), split_scheme="random")
    assert [item.captions for item in listing.items()] == [("x",), ("y",)]


def test_what_cannot_be_loaded_or_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load .*nowhere.*check the name"):
        find_source("folder", tmp_path, from_hub=str(tmp_path / "nowhere"))
    parquet(tmp_path / "repo", "train", {"caption": ["x"], "label": [1]})
    with pytest.raises(UserError, match=r"has no images .*its columns: caption, label"):
        find_source("folder", tmp_path, from_hub=str(tmp_path / "repo"))
    with pytest.raises(UsageError, match="scenes are drawn"):
        find_source("scenes", tmp_path, from_hub="x/y")
