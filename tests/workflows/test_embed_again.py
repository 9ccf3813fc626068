"""Embedding once more: what is taken over, what a stopped run keeps, and what stays as it is."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_pictures import draw, same

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.errors import UserError
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.embed import embed

QUIET = Progress(quiet=True)


def stop():
    raise KeyboardInterrupt


def test_the_output_is_checked_before_a_picture_is_read(eight, tiny_checkpoint, tmp_path, reading):
    (tmp_path / "file").write_text("precious")
    for output, words in (
        (eight, "not a gallery: choose another"),
        (tmp_path / "file", "not a gallery: choose another"),
        (tmp_path / "file" / "g", "cannot write the gallery .*file.* choose another directory"),
    ):
        with pytest.raises(UserError, match=words):
            embed(eight, tiny_checkpoint, output=output, progress=QUIET)
    assert reading[0] == []


def test_a_stopped_run_goes_on_where_it_was(eight, tiny_checkpoint, tmp_path, reading, capsys):
    names, at = reading
    embed(eight, tiny_checkpoint, output=tmp_path / "whole", progress=QUIET)
    at["5.png"] = stop
    out = tmp_path / "g"
    with pytest.raises(KeyboardInterrupt):
        embed(eight, tiny_checkpoint, output=out, batch_size=1, progress=QUIET)
    assert not out.exists() and (tmp_path / ".g.partial").is_dir()
    names.clear()
    at.clear()
    embed(eight, tiny_checkpoint, output=out, progress=Progress())
    assert names == ["5.png", "6.png", "7.png"]
    assert "5 of 8 pictures are as they were embedded before" in capsys.readouterr().err
    assert same(out, tmp_path / "whole")
    assert not (tmp_path / ".g.partial").exists()


def test_a_stopped_run_outlasts_one_of_other_views(
    eight, tiny_checkpoint, tmp_path, reading, capsys
):
    names, at = reading
    out = tmp_path / "g"
    at["5.png"] = stop
    with pytest.raises(KeyboardInterrupt):
        embed(eight, tiny_checkpoint, output=out, views=7, batch_size=1, progress=QUIET)
    at.clear()
    assert embed(eight, tiny_checkpoint, output=out, views=1, progress=QUIET).count == 8
    names.clear()
    embed(eight, tiny_checkpoint, output=out, views=7, progress=Progress())
    assert names == ["5.png", "6.png", "7.png"]
    assert (
        f"replaced: {out} is of --views 1 and will be of --views 7 (another --output keeps it)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / ".g.partial").exists()
    embed(eight, tiny_checkpoint, output=out, views=7, progress=Progress())
    assert "replaced" not in capsys.readouterr().err


def test_a_stopped_run_outlasts_one_of_another_split(
    tiny_data, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    out, read, at = tmp_path / "g", [], {17: stop}

    def load(data, at_least=None):
        read.append(data)
        return at.pop(len(read), lambda: load_rgb(data, at_least))()

    monkeypatch.setattr("vicvlm_cli.data.prepared.load_rgb", load)
    monkeypatch.setattr("vicvlm_cli.inference.os.cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        embed(tiny_data, tiny_checkpoint, output=out, batch_size=1, progress=QUIET)
    read.clear()
    assert embed(tiny_data, tiny_checkpoint, output=out, split="val", progress=QUIET).count == 6
    assert read == []
    embed(tiny_data, tiny_checkpoint, output=out, progress=Progress())
    assert len(read) == 10
    assert "16 of 26 pictures are as they were embedded before" in capsys.readouterr().err
    assert not (tmp_path / ".g.partial").exists()


def test_a_killed_run_goes_on_after_its_last_block(
    eight, tiny_checkpoint, tmp_path, reading, monkeypatch
):
    names, at = reading
    monkeypatch.setattr("vicvlm_cli.gallery.unfinished.BLOCK", 2)
    blocks, out = tmp_path / ".g.partial", tmp_path / "g"
    at["7.png"] = lambda: shutil.copytree(blocks, tmp_path / "left")  # six are embedded by then
    embed(eight, tiny_checkpoint, output=out, batch_size=1, progress=QUIET)
    shutil.rmtree(out)
    (tmp_path / "left").rename(blocks)
    assert len(list(blocks.iterdir())) == 3
    (blocks / ".0.new").mkdir()  # what was being written
    draw(eight / "0.png", 99)
    names.clear()
    at.clear()
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    assert names == ["0.png", "6.png", "7.png"]
    embed(eight, tiny_checkpoint, output=tmp_path / "whole", progress=QUIET)
    assert same(out, tmp_path / "whole")
    assert not blocks.exists()


def test_a_block_is_written_after_a_while(eight, tiny_checkpoint, tmp_path, reading, monkeypatch):
    monkeypatch.setattr("vicvlm_cli.gallery.unfinished.SECONDS", 0)
    found = []
    reading[1]["7.png"] = lambda: found.extend((tmp_path / ".g.partial").iterdir())
    embed(eight, tiny_checkpoint, output=tmp_path / "g", batch_size=1, progress=QUIET)
    assert len(found) >= 6  # a thread reads ahead


def test_only_what_is_new_or_changed_is_embedded(eight, tiny_checkpoint, tmp_path, reading, capsys):
    names, _ = reading
    out = tmp_path / "g"
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    draw(eight / "a.png", 8)  # new
    draw(eight / "2.png", 9)  # changed
    os.utime(eight / "sub" / "5.png", ns=(1, 1))  # perhaps changed
    (eight / "3.png").unlink()
    names.clear()
    embed(eight, tiny_checkpoint, output=out, progress=Progress())
    assert names == ["2.png", "a.png", "5.png"]
    notes = capsys.readouterr().err
    assert "5 of 8 pictures are as they were embedded before" in notes
    assert f"dropped: 1 of the 8 pictures in {out}" in notes
    embed(eight, tiny_checkpoint, output=tmp_path / "anew", progress=QUIET)
    assert same(out, tmp_path / "anew")
    names.clear()
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    assert names == [] and same(out, tmp_path / "anew")


def test_all_is_embedded_again_by_another_model_or_views_or_from_elsewhere(
    eight, tiny_checkpoint, make_checkpoint, tmp_path, reading
):
    names, _ = reading
    out = tmp_path / "g"
    shutil.copytree(eight, tmp_path / "copy")
    other = make_checkpoint(seed=21)
    for source, checkpoint, views, count in (
        (eight, tiny_checkpoint, None, 8),
        (eight, tiny_checkpoint, 2, 8),
        (eight, tiny_checkpoint, 2, 0),
        (eight, other, 2, 8),
        (tmp_path / "copy", other, 2, 8),
    ):
        names.clear()
        embed(source, checkpoint, output=out, views=views, progress=QUIET)
        assert len(names) == count


def test_a_gallery_of_another_source_is_replaced_only_where_it_is_named(
    eight, make_checkpoint, tmp_path, reading
):
    names, _ = reading
    checkpoint = make_checkpoint(seed=24)
    out = checkpoint.parent / "gallery"
    embed(eight, checkpoint, progress=QUIET)
    shutil.copytree(eight / "sub", tmp_path / "small")
    names.clear()
    with pytest.raises(UserError) as told:
        embed(tmp_path / "small", checkpoint, progress=QUIET)
    assert names == [] and len(Gallery.open(out)) == 8
    assert str(told.value) == (
        f"the gallery {out} is of {eight.resolve()} and not of {tmp_path / 'small'}: renew "
        f"it with `vicvlm embed {eight.resolve()}`, choose another place with --output FOLDER, or "
        f"replace it with --output {out}"
    )
    (tmp_path / "link").symlink_to(eight)
    assert embed(tmp_path / "link", checkpoint, progress=QUIET).count == 8  # the same source
    assert embed(tmp_path / "small", checkpoint, output=out, progress=QUIET).count == 4


def test_what_else_lies_in_the_gallerys_folder_is_told_before_a_picture_is_read(
    eight, tiny_checkpoint, tmp_path, reading
):
    embed(eight, tiny_checkpoint, output=tmp_path / "g", progress=QUIET)
    (tmp_path / "g" / "sheet.png").touch()
    reading[0].clear()
    draw(eight / "a.png", 8)
    with pytest.raises(UserError, match=r"g holds sheet\.png, which is not the gallery's"):
        embed(eight, tiny_checkpoint, output=tmp_path / "g", progress=QUIET)
    assert reading[0] == [] and (tmp_path / "g" / "sheet.png").exists()


def test_a_model_may_be_of_another_width_than_the_one_before(
    eight, tiny_checkpoint, tmp_path, reading
):
    out, blocks = tmp_path / "g", tmp_path / ".g.partial"
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    made = Gallery.open(out)
    wide = torch.nn.functional.pad(made.features, (0, 8))
    made = replace(made, features=wide, model_sha256="0" * 64)
    made.save(out)
    made.save(blocks / "0")
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    assert Gallery.open(out).features.shape == (8, 24)
    assert [path.name for path in blocks.iterdir()] == ["0"]  # the other model's


def test_all_is_embedded_again_in_another_precision(eight, tiny_checkpoint, tmp_path, reading):
    names, _ = reading
    out = tmp_path / "g"
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    header = json.loads((out / "gallery.json").read_text())
    assert header.pop("precision") == "float32"
    for precision, count in (("bfloat16", 8), (None, 8), ("float32", 0)):
        (out / "gallery.json").write_text(json.dumps(header | {"precision": precision}))
        names.clear()
        embed(eight, tiny_checkpoint, output=out, progress=QUIET)
        assert len(names) == count


def test_a_block_is_written_again_where_another_call_removes_its_folder(
    eight, tiny_checkpoint, tmp_path, reading, monkeypatch
):
    blocks, calls = tmp_path / ".g.partial", []

    def removed(tensors, path):
        calls.append(path)
        if len(calls) == 1:
            shutil.rmtree(blocks)
        save_file(tensors, path)

    monkeypatch.setattr("vicvlm_cli.gallery.store.save_file", removed)
    reading[1]["5.png"] = stop
    with pytest.raises(KeyboardInterrupt):
        embed(eight, tiny_checkpoint, output=tmp_path / "g", batch_size=1, progress=QUIET)
    (block,) = blocks.iterdir()
    assert len(calls) == 2 and len(Gallery.open(block)) == 5


def test_what_is_off_is_taken_over(eight, tiny_checkpoint, tmp_path, reading, monkeypatch):
    rows, features = [], torch.eye(24)[:2]
    bank = QueryBank(features, features, torch.arange(2), RerankWeights(1, 1))

    def with_bank(*args, **options):
        model = load_model(*args, **options)
        model.bank = bank
        return model

    def off_images(self, images):
        rows.append(len(images))
        return bank.off_images(images)

    monkeypatch.setattr("vicvlm_cli.workflows.embed.load_model", with_bank)
    monkeypatch.setattr("vicvlm_cli.inference.LoadedModel.off_images", off_images)
    out = tmp_path / "g"
    reading[1]["5.png"] = stop
    with pytest.raises(KeyboardInterrupt):
        embed(eight, tiny_checkpoint, output=out, batch_size=1, progress=QUIET)
    reading[1].clear()
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    draw(eight / "a.png", 8)
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    made = Gallery.open(out)
    assert rows == [8, 1] and len(made) == 9
    assert torch.allclose(made.off, bank.off_images(made.features))


def test_galleries_without_stamps_are_embedded_again(eight, tiny_checkpoint, tmp_path, reading):
    names, _ = reading
    out = tmp_path / "g"
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    lines = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    whole = [json.dumps(line) for line in lines]
    bare = [json.dumps({k: v for k, v in line.items() if k != "stamp"}) for line in lines]
    for content, count in ((bare, 8), ([*whole[:5], "{", *whole[6:]], 3)):
        (out / "items.jsonl").write_text("\n".join(content) + "\n")
        names.clear()
        assert embed(eight, tiny_checkpoint, output=out, progress=QUIET).count == 8
        assert len(names) == count


def test_a_prepared_data_set_is_embedded_again_once_it_is_another(
    tiny_data, tiny_checkpoint, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "g"
    shutil.copytree(tiny_data, data)
    embed(data, tiny_checkpoint, split="val", output=out, progress=QUIET)
    embed(data, tiny_checkpoint, output=out, progress=Progress())
    assert "6 of 26 pictures are as they were embedded before" in capsys.readouterr().err
    embed(tiny_data, tiny_checkpoint, output=tmp_path / "whole", progress=QUIET)
    assert torch.allclose(
        Gallery.open(out).features, Gallery.open(tmp_path / "whole").features, atol=1e-5
    )
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
    embed(data, tiny_checkpoint, output=out, progress=Progress())
    assert "embedded before" not in capsys.readouterr().err
