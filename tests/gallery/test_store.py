from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UserError
from vicvlm_cli.gallery import Gallery, GalleryItem


def make(source="photos", n: int = 4, **options) -> Gallery:
    features = F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    items = [GalleryItem(f"sub/é {i}.jpg", f"sub/é {i}", [f"caption {i}"]) for i in range(n)]
    return Gallery(features, items, "ab" * 32, "runs/model.safetensors", str(source), **options)


def test_a_gallery_comes_back_as_it_was(tmp_path):
    odd = GalleryItem("stray \udce9.jpg", "x", [], "", 0)
    made = make(skipped=[("bad.jpg", "truncated")])
    made.items[3] = odd
    made.save(tmp_path / "new" / "gallery")
    read = Gallery.open(tmp_path / "new" / "gallery")
    assert torch.equal(read.features, made.features)
    assert replace(read, features=None, items=list(read.items)) == replace(made, features=None)
    assert len(read) == 4
    header = json.loads((tmp_path / "new" / "gallery" / "gallery.json").read_text())
    assert (header["count"], header["dim"], header["skipped"]) == (4, 6, 1)
    assert header["model"]["sha256"] == "ab" * 32


def test_search_by_one_or_more_queries():
    gallery = make()
    scores, rows = gallery.search(gallery.features[2], k=2)
    assert rows[0, 0] == 2 and scores[0, 0] == pytest.approx(1)
    scores, rows = gallery.search(gallery.features, k=99)
    assert rows.shape == (4, 4) and rows[:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"7 dimensions and the gallery 6.*runs/model"):
        gallery.search(torch.ones(7))


def test_words_look_for_scores_less_what_is_off(tmp_path):
    gallery = make(off=torch.tensor([0.0, 0.0, 3.0, 0.0]))
    gallery.save(tmp_path / "gallery")
    read = Gallery.open(tmp_path / "gallery")
    assert torch.equal(read.off, gallery.off)
    query = gallery.features[2]
    assert read.search(query, k=1)[1].item() == 2
    scores, rows = read.search(query, k=4, of_words=True)
    assert rows[0, -1] == 2 and scores[0, -1] == pytest.approx(-2, abs=1e-5)
    for off in (torch.zeros(3), torch.zeros(4, 1), torch.tensor(0.0), torch.full((4,), torch.nan)):
        wrong = {"features": gallery.features, "off": off}
        save_file(wrong, tmp_path / "gallery" / "features.safetensors")
        with pytest.raises(UserError, match="damaged"):
            Gallery.open(tmp_path / "gallery")


def test_saving_replaces_a_gallery_and_nothing_else(tmp_path):
    path = tmp_path / "gallery"
    make(n=4).save(path)
    make(n=2).save(path)
    assert len(Gallery.open(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]
    (tmp_path / "photos").mkdir()
    make().save(tmp_path / "photos")  # an empty folder is fair
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("mine", "file"):
        with pytest.raises(UserError, match="not a gallery"):
            make().save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_what_else_lies_in_its_folder_is_named_and_stays(tmp_path):
    path = tmp_path / "gallery"
    make(n=4).save(path)
    (path / ".DS_Store").touch()
    make(n=3).save(path)
    (path / "dogs.png").write_text("precious")
    with pytest.raises(UserError, match=r"gallery holds dogs\.png, which is not .* move it away"):
        make(n=2).save(path)
    assert (path / "dogs.png").read_text() == "precious" and len(Gallery.open(path)) == 3


def test_a_gallery_is_opened_for_the_model_that_made_it(tmp_path):
    make().save(tmp_path)
    own, other = (
        SimpleNamespace(info=SimpleNamespace(sha256=sha256, path=Path("moved.safetensors")))
        for sha256 in ("ab" * 32, "cd" * 32)
    )
    assert len(Gallery.open(tmp_path, model=own)) == 4
    words = r"by another model \(abab.* at runs/model\.safet.*\) than moved\.safet.* \(cdcdcdcd\)"
    with pytest.raises(UserError, match=words):
        Gallery.open(tmp_path, model=other)


def test_a_failed_save_leaves_the_old_gallery(tmp_path, monkeypatch):
    path = tmp_path / "gallery"
    make(n=4).save(path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("vicvlm_cli.gallery.store.save_file", full)
    with pytest.raises(UserError, match="no space left"):
        make(n=2).save(path)
    assert len(Gallery.open(path)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]


def test_a_failed_swap_leaves_the_old_gallery(tmp_path, monkeypatch):
    path = tmp_path / "gallery"
    make(n=4).save(path)
    swap, calls = os.replace, []

    def fails_once(*names):
        calls.append(names)
        if len(calls) == 2:
            raise OSError("in use")
        swap(*names)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(UserError, match="in use"):
        make(n=2).save(path)
    assert len(Gallery.open(path)) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]


def test_a_mount_point_is_no_place_for_a_gallery(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    for name in ("disk", "link"):
        with pytest.raises(UserError, match="is a mount point: choose a folder inside it"):
            make().save(tmp_path / name)
    make().save(tmp_path / "disk" / "gallery")


def test_a_line_is_parsed_when_it_is_asked_for(tmp_path):
    make(n=3).save(tmp_path)
    first, _, last = (tmp_path / "items.jsonl").read_bytes().splitlines()
    (tmp_path / "items.jsonl").write_bytes(first + b'\n{"path": "a.j\n' + last + b"\n")
    gallery = Gallery.open(tmp_path)
    made = make(n=3).items
    assert len(gallery) == len(gallery.items) == 3
    assert (gallery.items[0], gallery.items[-1], gallery.items[::2]) == (
        made[0],
        made[2],
        made[::2],
    )
    assert gallery.location(2) == str(Path("photos") / made[2].path)
    assert gallery.search(gallery.features[2], k=3)[1][0, 0] == 2
    with pytest.raises(IndexError):
        gallery.items[3]
    for read in (lambda: gallery.location(1), lambda: gallery.items[:2], lambda: [*gallery.items]):
        with pytest.raises(UserError, match=r"the gallery .* is damaged: run `vicvlm embed` again"):
            read()


def test_a_gallery_of_the_first_format_is_read(tmp_path):
    make().save(tmp_path)
    header = json.loads((tmp_path / "gallery.json").read_text())
    del header["views"], header["precision"]
    (tmp_path / "gallery.json").write_text(json.dumps(header | {"format_version": 1}))
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert all(line.pop("stamp") == "" for line in lines)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = Gallery.open(tmp_path)
    assert (list(read.items), read.views, read.precision) == (make().items, None, None)


def test_where_no_gallery_can_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    words = r"cannot write the gallery .*: make room there, or choose another directory"
    with pytest.raises(UserError, match=words):
        make().save(tmp_path / "file" / "gallery")


def break_it(path, how):
    header = json.loads((path / "gallery.json").read_text())
    if how == "newer":
        header["format_version"] = 99
    elif how == "other count":
        header["count"] = 7
    elif how == "no model":
        del header["model"]
    (path / "gallery.json").write_text("{" if how == "no JSON" else json.dumps(header))
    if how == "truncated":
        whole = (path / "features.safetensors").read_bytes()
        (path / "features.safetensors").write_bytes(whole[:-8])
    elif how == "items":
        (path / "items.jsonl").write_text('{"path": "a.jpg"}\n')
    elif how == "gone":
        (path / "features.safetensors").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("newer", "upgrade vicvlm"),
        ("other count", "damaged"),
        ("no model", "damaged"),
        ("no JSON", "damaged"),
        ("truncated", "damaged"),
        ("items", "damaged"),
        ("gone", "damaged"),
    ],
)
def test_a_broken_gallery_gets_a_sentence(tmp_path, how, words):
    path = tmp_path / "gallery"
    make().save(path)
    break_it(path, how)
    with pytest.raises(UserError, match=words):
        Gallery.open(path)


def test_what_is_no_gallery(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a gallery"):
            Gallery.open(path)


def test_pictures_of_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (9, 5), "red").save(tmp_path / "sub" / "é 1.jpg")
    gallery = make(source=tmp_path)
    assert gallery.location(1) == str(tmp_path / "sub" / "é 1.jpg")
    assert gallery.image(1).size == (9, 5)
    with pytest.raises(BadImage, match="missing"):
        gallery.image(0)


def test_pictures_of_a_prepared_data_set(tiny_data):
    split = PreparedDataset.open(tiny_data).split("test")
    gallery = make(source=tiny_data, prepared=True)
    gallery.items[0] = GalleryItem(split.paths[7], split.image_ids[7], [], "test", 7)
    assert gallery.image(0).tobytes() == split.image(7).tobytes()
    assert gallery.location(0) == split.paths[7]
    for place in (6, 99):
        gallery.items[1] = GalleryItem(split.paths[7], split.image_ids[7], [], "test", place)
        with pytest.raises(UserError, match="prepared anew"):
            gallery.image(1)
