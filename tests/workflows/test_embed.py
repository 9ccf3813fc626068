from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.embed import embed

QUIET = Progress(quiet=True)


@pytest.fixture
def photos(tmp_path):
    """Seven files that look like pictures (three are none) and some that should be left alone."""
    folder = tmp_path / "photos"
    for place in ("", "deep/er", ".thumbnails"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    noise = Image.effect_noise((60, 40), 80)
    noise.convert("RGB").save(folder / "b.JPG", "JPEG")
    noise.convert("CMYK").save(folder / "deep" / "er" / "é ü.jpeg")
    noise.convert("LA").save(folder / "a.png")
    noise.convert("P").save(folder / "deep" / "c.gif")
    whole = (folder / "b.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "deep" / "text.jpg").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a picture, and not named like one")
    (folder / "._b.jpg").write_bytes(b"a Mac's")
    (folder / ".thumbnails" / "b.jpg").write_bytes(whole)
    return folder


def test_a_folder_of_pictures(photos, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "gallery"
    result = embed(photos, tiny_checkpoint, output=out, batch_size=2, progress=Progress())
    gallery = Gallery.open(out)
    names = [
        "a.png",
        "b.JPG",
        os.path.join("deep", "c.gif"),
        os.path.join("deep", "er", "é ü.jpeg"),
    ]
    assert [item.path for item in gallery.items] == names
    assert gallery.items[3].id == os.path.join("deep", "er", "é ü")
    model = load_model(tiny_checkpoint)
    expected = model.encode_images([photos / name for name in names])
    assert torch.allclose(gallery.features, expected, atol=0.02)
    assert torch.allclose(gallery.features.norm(dim=1), torch.ones(4), atol=1e-6)
    assert (gallery.model_sha256, gallery.model_path) == (model.info.sha256, str(model.info.path))
    assert gallery.image(2).size == (60, 40)
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {row["path"]: row["reason"] for row in skipped} == {
        "cut.jpg": "truncated",
        "empty.png": "empty file",
        os.path.join("deep", "text.jpg"): "not an image",
    }
    assert result.count == 4 and len(result.skipped) == 3
    assert result.to_dict()["model"]["sha256"] == model.info.sha256
    notes = capsys.readouterr()
    assert "3 of 7 pictures" in notes.err and "skipped.jsonl" in notes.err
    assert notes.out == ""


def test_a_prepared_data_set_with_its_captions_and_pictures(tiny_data, tiny_checkpoint, tmp_path):
    out = tmp_path / "gallery"
    result = embed(tiny_data, tiny_checkpoint, output=out, progress=QUIET)
    assert (result.count, result.skipped) == (8 + 6 + 12, [])
    gallery = Gallery.open(out)
    split = PreparedDataset.open(tiny_data).split("val")
    row = next(i for i, item in enumerate(gallery.items) if item.split == "val")
    item = gallery.items[row + 2]
    assert (item.id, item.path, item.captions, item.index) == (
        split.image_ids[2],
        split.paths[2],
        split.captions[2],
        2,
    )
    assert gallery.image(row + 2).tobytes() == split.image(2).tobytes()


def test_one_split_beside_the_checkpoint(tiny_data, make_checkpoint, capsys):
    checkpoint = make_checkpoint(seed=5)
    result = embed(tiny_data, checkpoint, split="test", progress=Progress())
    assert result.path == checkpoint.parent / "gallery"
    assert {item.split for item in Gallery.open(result.path).items} == {"test"}
    assert f"gallery: {result.path} (--output to change)" in capsys.readouterr().err
    # Once more replaces it.
    assert embed(tiny_data, checkpoint, split="val", progress=QUIET).count == 6
    assert len(Gallery.open(result.path)) == 6


def test_a_split_means_nothing_to_a_folder(photos, tiny_checkpoint, tmp_path, capsys):
    result = embed(
        photos, tiny_checkpoint, output=tmp_path / "g", split="test", progress=Progress()
    )
    assert result.count == 4
    assert "folder of pictures" in capsys.readouterr().err


def test_a_manifest_of_something_else_is_not_in_the_way(photos, tiny_checkpoint, tmp_path):
    (photos / "manifest.json").write_text('{"name": "My holidays", "icons": []}')
    assert embed(photos, tiny_checkpoint, output=tmp_path / "g", progress=QUIET).count == 4


def test_mistakes_get_a_sentence(photos, tiny_data, tiny_checkpoint, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"format_version": 1, "sha')
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"no picture")
    out = tmp_path / "g"
    with pytest.raises(UserError, match="no folder"):
        embed(tmp_path / "nowhere", tiny_checkpoint, output=out, progress=QUIET)
    with pytest.raises(UserError, match="no folder"):
        embed(tmp_path / ("long" * 99), tiny_checkpoint, output=out, progress=QUIET)
    with pytest.raises(UserError, match="hold no pictures"):
        embed(tmp_path / "bare", tiny_checkpoint, output=out, progress=QUIET)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        embed(tmp_path / "damaged", tiny_checkpoint, output=out, progress=QUIET)
    with pytest.raises(UserError, match=r"none of the 1 pictures .*x\.jpg, is not an image"):
        embed(tmp_path / "bad", tiny_checkpoint, output=out, progress=QUIET)
    with pytest.raises(UserError, match="it has train, val, test"):
        embed(tiny_data, tiny_checkpoint, output=out, split="dev", progress=QUIET)
    with pytest.raises(UserError, match="not a gallery"):
        embed(photos, tiny_checkpoint, output=photos, progress=QUIET)
    with pytest.raises(UserError, match="no checkpoint"):
        embed(photos, tmp_path / "none.safetensors", output=out, progress=QUIET)
    with pytest.raises(UsageError, match="--batch-size"):
        embed(photos, tiny_checkpoint, output=out, batch_size=0, progress=QUIET)
    assert not out.exists()
