"""Embedding what cannot be read, pictures, folders or all: what is told, and what stays."""

from __future__ import annotations

import os
import shutil

import pytest
from tiny_pictures import draw

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import BadImage
from vicvlm_cli.errors import UserError
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.embed import embed

QUIET = Progress(quiet=True)


def test_links_to_folders_are_followed_once(eight, tiny_checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    draw(tmp_path / "elsewhere" / "x.png", 30)
    (eight / "link").symlink_to(tmp_path / "elsewhere")
    (eight / "sub" / "round").symlink_to(eight)
    embed(eight, tiny_checkpoint, output=tmp_path / "g", progress=QUIET)
    paths = [item.path for item in Gallery.open(tmp_path / "g").items]
    assert len(paths) == 9 and os.path.join("link", "x.png") in paths


@pytest.fixture
def shut(eight, monkeypatch):
    """Makes a subfolder of ``eight`` one that cannot be read."""
    scan = os.scandir

    def shut(name="sub"):
        def scandir(place):
            if place == eight / name:
                raise PermissionError(13, "Permission denied")
            return scan(place)

        monkeypatch.setattr(os, "scandir", scandir)

    return shut


def test_a_folder_that_cannot_be_read_is_told(eight, tiny_checkpoint, tmp_path, shut, capsys):
    shut()
    told = f"cannot read the folder {eight / 'sub'} (Permission denied)"
    assert embed(eight, tiny_checkpoint, output=tmp_path / "g", progress=Progress()).count == 4
    assert f"warning: {told}" in capsys.readouterr().err
    for i in range(4):
        (eight / f"{i}.png").unlink()
    with pytest.raises(UserError) as error:
        embed(eight, tiny_checkpoint, output=tmp_path / "g", progress=QUIET)
    assert "hold no pictures" in str(error.value) and told in str(error.value)


def test_a_gallery_stays_where_most_of_its_folders_cannot_be_read(
    eight, tiny_checkpoint, tmp_path, shut, reading
):
    out = tmp_path / "g"
    (eight / "0.png").unlink()
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    shut()
    reading[0].clear()
    with pytest.raises(UserError, match=r"4 of the 7 pictures .*folders cannot .*stays as it is"):
        embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    assert reading[0] == [] and len(Gallery.open(out)) == 7
    draw(eight / "0.png", 0)
    (eight / "sub" / "4.png").unlink()
    embed(eight, tiny_checkpoint, output=tmp_path / "new", progress=QUIET)


def test_pictures_that_were_deleted_are_not_lost(eight, tiny_checkpoint, tmp_path, shut):
    out = tmp_path / "g"
    (eight / "lost+found").mkdir()
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    shutil.rmtree(eight / "sub")
    (eight / "0.png").unlink()
    shut("lost+found")
    assert embed(eight, tiny_checkpoint, output=out, progress=QUIET).count == 3


def test_a_source_that_goes_away_leaves_the_gallery(
    eight, tiny_checkpoint, make_checkpoint, tmp_path, reading
):
    names, at = reading
    out, other = tmp_path / "g", make_checkpoint(seed=22)
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)

    def unmounted():
        eight.rename(tmp_path / "away")
        eight.mkdir()

    for gone in (unmounted, lambda: eight.rename(tmp_path / "away")):
        at["6.png"] = gone
        with pytest.raises(UserError, match=r"eight went away .*bring it back and run `vicvlm emb"):
            embed(eight, other, output=out, batch_size=1, progress=QUIET)
        assert Gallery.open(out).model_sha256 == load_model(tiny_checkpoint).info.sha256
        shutil.rmtree(eight, ignore_errors=True)
        (tmp_path / "away").rename(eight)
    names.clear()
    at.clear()
    assert embed(eight, other, output=out, progress=QUIET).count == 8
    assert names == ["6.png", "7.png"]


def test_a_prepared_data_set_that_goes_away_is_told(
    tiny_data, tiny_checkpoint, tmp_path, monkeypatch
):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)

    def bad(*_):
        (data / "manifest.json").unlink(missing_ok=True)
        raise BadImage("unreadable")

    monkeypatch.setattr("vicvlm_cli.data.prepared.load_rgb", bad)
    with pytest.raises(UserError, match="data went away while"):
        embed(data, tiny_checkpoint, output=tmp_path / "g", progress=QUIET)


def test_a_gallery_stays_where_most_of_its_pictures_fail(
    eight, tiny_checkpoint, make_checkpoint, tmp_path, reading
):
    _, at = reading
    out, other = tmp_path / "g", make_checkpoint(seed=23)
    embed(eight, tiny_checkpoint, output=out, progress=QUIET)
    (eight / "3.png").write_bytes(b"no picture")
    at["3.png"] = lambda: (eight / "sub").rename(tmp_path / "away")  # a disk of its own
    words = r"5 of the 8 pictures in the gallery .*first, 3\.png, is not an image.*another --output"
    with pytest.raises(UserError, match=words):
        embed(eight, other, output=out, batch_size=1, progress=QUIET)
    assert len(Gallery.open(out)) == 8
    assert Gallery.open(out).model_sha256 == load_model(tiny_checkpoint).info.sha256
    # Elsewhere it is a gallery of what there is, and of half of the pictures one too.
    (tmp_path / "away").rename(eight / "sub")
    assert embed(eight, other, output=tmp_path / "h", batch_size=1, progress=QUIET).count == 3
    draw(eight / "3.png", 3)
    (tmp_path / "away").rename(eight / "sub")
    assert embed(eight, other, output=out, batch_size=1, progress=QUIET).count == 4
