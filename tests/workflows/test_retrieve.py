from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from PIL import Image

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.embed import embed
from vicvlm_cli.workflows.retrieve import retrieve

QUIET = Progress(quiet=True)
WORDS = "a red circle above a blue square"


@pytest.fixture(scope="module")
def gallery(tiny_data, tiny_checkpoint, tmp_path_factory):
    """The gallery of the whole tiny data set, 26 pictures."""
    path = tmp_path_factory.mktemp("galleries") / "scenes"
    return embed(tiny_data, tiny_checkpoint, output=path, progress=QUIET).path


@pytest.fixture
def photos(tiny_data, tmp_path):
    """Five of the scenes as files in a folder."""
    split = PreparedDataset.open(tiny_data).split("test")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        split.image(i).save(folder / f"{i}.png")
    return folder


def test_words_find_the_most_similar_pictures(gallery, tiny_checkpoint, capsys):
    result = retrieve(gallery, WORDS, top_k=4, rerank=False, progress=Progress())
    stored, model = Gallery.open(gallery), load_model(tiny_checkpoint)
    cosines = stored.features @ model.encode_texts([WORDS])[0]
    order = cosines.argsort(descending=True)[:4].tolist()
    assert [hit.row for hit in result.hits] == order
    assert [hit.rank for hit in result.hits] == [1, 2, 3, 4]
    assert [hit.score for hit in result.hits] == pytest.approx(cosines[order].tolist(), abs=1e-5)
    first = result.hits[0]
    assert first.captions == stored.items[first.row].captions
    assert (first.caption, first.path) == (first.captions[0], stored.items[first.row].path)
    assert result.searched == 26 and not result.reranked
    notes = capsys.readouterr()
    assert notes.out == ""
    assert f"checkpoint: {tiny_checkpoint} (made this gallery" in notes.err
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["query"] == WORDS and plain["hits"][0]["caption"] == first.caption


def test_a_picture_finds_itself(photos, tiny_checkpoint, tmp_path):
    path = embed(photos, tiny_checkpoint, output=tmp_path / "g", progress=QUIET).path
    result = retrieve(path, image=photos / "3.png", progress=QUIET)
    assert result.hits[0].path == str(photos.resolve() / "3.png")
    assert result.hits[0].score == pytest.approx(1, abs=1e-3)
    assert (result.hits[0].caption, result.hits[0].id) == ("", "3")
    assert len(result.hits) == 5  # as many as there are, though ten are the default
    assert result.to_dict()["image"] == str(photos / "3.png")


def test_a_picture_is_seen_in_as_many_views_as_the_gallerys(photos, tiny_checkpoint, tmp_path):
    path = embed(photos, tiny_checkpoint, views=7, output=tmp_path / "g", progress=QUIET).path
    stored, model = Gallery.open(path), load_model(tiny_checkpoint)
    pictures = [photos / f"{i}.png" for i in range(5)]
    assert model.vlm.config.eval_views == 1
    single = stored.features @ model.encode_images(pictures).T
    assert single.diagonal().max() < 1 - 1e-4
    again = model.encode_images(pictures, views=7)
    torch.testing.assert_close(again, stored.features, rtol=0, atol=1e-2)
    found = retrieve(path, image=photos / "3.png", progress=QUIET).hits[0]
    assert found.id == "3" and found.score == pytest.approx(1, abs=1e-5)


def test_reranking_orders_the_candidates_by_the_combined_score(gallery, tiny_checkpoint):
    result = retrieve(gallery, WORDS, top_k=6, rerank=True, progress=QUIET)
    stored, model = Gallery.open(gallery), load_model(tiny_checkpoint)
    scores = model.score_pairs([stored.image(row) for row in range(26)], [WORDS] * 26)
    order = scores.argsort(descending=True)[:6].tolist()
    assert [hit.row for hit in result.hits] == order
    assert [hit.score for hit in result.hits] == pytest.approx(scores[order].tolist(), abs=1e-4)
    cosines = stored.features @ model.encode_texts([WORDS])[0]
    assert [hit.cosine for hit in result.hits] == pytest.approx(cosines[order].tolist(), abs=1e-5)
    assert result.reranked


def test_the_checkpoint_says_whether_to_rerank(make_checkpoint, tiny_data, tmp_path):
    for weight in (0.0, 0.5):
        checkpoint = make_checkpoint(weights=(weight, 0.3))
        path = embed(tiny_data, checkpoint, output=tmp_path / f"{weight}", progress=QUIET).path
        found = {
            asked: retrieve(path, WORDS, rerank=asked, progress=QUIET)
            for asked in (None, False, True)
        }
        assert found[None].reranked == (weight > 0) and found[True].reranked
        assert not found[False].reranked
        assert found[None].hits == found[weight > 0].hits


def test_cosines_beside_itm_are_the_gallerys(tiny_data, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(weights=(0.5, 0.5))
    path = embed(tiny_data, checkpoint, views=2, output=tmp_path / "g", progress=QUIET).path
    stored, model = Gallery.open(path), load_model(checkpoint)
    hits = retrieve(path, WORDS, top_k=3, progress=QUIET).hits
    cosines = stored.features @ model.encode_texts([WORDS])[0]
    pictures = [stored.image(hit.row) for hit in hits]
    # ITM reads the features too, and they are the gallery's.
    features = stored.features[[hit.row for hit in hits]]
    itm = model.match_pairs(pictures, [WORDS] * 3, features)
    assert not torch.allclose(itm, model.match_pairs(pictures, [WORDS] * 3), atol=1e-6)
    for hit, logit in zip(hits, itm.tolist(), strict=True):
        cosine = float(cosines[hit.row])
        assert hit.cosine == pytest.approx(cosine, abs=1e-5)
        assert hit.score == pytest.approx(model.logit_scale * cosine + 0.5 * logit, abs=1e-3)


def test_only_the_candidates_are_reranked(gallery, monkeypatch):
    monkeypatch.setattr("vicvlm_cli.workflows.retrieve.CANDIDATES", 3)
    top = {hit.row for hit in retrieve(gallery, WORDS, top_k=3, rerank=False, progress=QUIET).hits}
    found = retrieve(gallery, WORDS, top_k=2, rerank=True, progress=QUIET).hits
    assert len(found) == 2 and {hit.row for hit in found} < top


def test_pictures_that_are_gone(photos, tiny_checkpoint, tmp_path, capsys):
    path = embed(photos, tiny_checkpoint, output=tmp_path / "g", progress=QUIET).path
    sheet = tmp_path / "sheet.png"
    (photos / "2.png").unlink()
    assert len(retrieve(path, WORDS, rerank=False, sheet=sheet, progress=QUIET).hits) == 5
    capsys.readouterr()
    found = retrieve(path, WORDS, rerank=True, progress=Progress()).hits
    assert sorted(hit.id for hit in found) == ["0", "1", "3", "4"]
    assert [hit.rank for hit in found] == [1, 2, 3, 4]
    assert "2.png is missing and was left out\n" in capsys.readouterr().err
    (photos / "4.png").write_text("no picture")
    assert len(retrieve(path, WORDS, progress=Progress()).hits) == 3
    assert "was left out, and 1 others" in capsys.readouterr().err
    shutil.rmtree(photos)
    found = retrieve(path, WORDS, progress=Progress())
    assert len(found.hits) == 5 and not found.reranked
    assert "the order is that of the vectors, without ITM" in capsys.readouterr().err
    with pytest.raises(UserError, match="no candidate's picture can be read"):
        retrieve(path, WORDS, rerank=True, progress=QUIET)


def test_a_data_set_that_is_gone(tiny_data, tiny_checkpoint, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    path = embed(data, tiny_checkpoint, output=tmp_path / "g", progress=QUIET).path
    shutil.rmtree(data)
    found = retrieve(path, WORDS, top_k=3, progress=Progress())
    assert len(found.hits) == 3 and not found.reranked
    assert "note: the order is that of the vectors alone: " in capsys.readouterr().err
    with pytest.raises(UserError, match="not a prepared data set"):
        retrieve(path, WORDS, rerank=True, progress=QUIET)


def test_a_contact_sheet(gallery, photos, tmp_path):
    sheet = tmp_path / "out" / "sheet.png"
    result = retrieve(gallery, WORDS, top_k=7, rerank=True, sheet=sheet, progress=QUIET)
    assert result.to_dict()["sheet"] == str(sheet)
    with Image.open(sheet) as drawn:
        by_words = drawn.size
    retrieve(gallery, image=photos / "0.png", top_k=7, sheet=sheet, progress=QUIET)
    with Image.open(sheet) as drawn:
        # Two rows either way; a query picture takes more room above than a line of words.
        assert drawn.width == by_words[0] and drawn.height > by_words[1]


def test_the_hits_are_there_without_their_sheet(gallery, tmp_path):
    (tmp_path / "file").touch()
    found = retrieve(gallery, WORDS, sheet=tmp_path / "file" / "sheet.png", progress=QUIET)
    assert len(found.hits) == 10 and found.sheet is None
    assert "cannot write the sheet" in str(found.sheet_error)
    assert retrieve(gallery, WORDS, progress=QUIET).sheet_error is None


def test_a_data_set_that_is_gone_cannot_be_drawn(tiny_data, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    path = embed(tmp_path / "data", tiny_checkpoint, output=tmp_path / "g", progress=QUIET).path
    shutil.rmtree(tmp_path / "data")
    found = retrieve(path, WORDS, rerank=False, sheet=tmp_path / "sheet.png", progress=QUIET)
    assert len(found.hits) == 10 and "not a prepared data set" in str(found.sheet_error)


def test_a_gallery_of_another_model_is_refused(gallery, make_checkpoint, tiny_checkpoint, tmp_path):
    other = make_checkpoint(seed=9)
    with pytest.raises(UserError, match="was made by another model") as caught:
        retrieve(gallery, WORDS, checkpoint=other, progress=QUIET)
    stored = Gallery.open(gallery)
    for words in (stored.model_sha256[:8], str(other), "vicvlm embed"):
        assert words in str(caught.value)
    # The same model at another place is the same model.
    moved = tmp_path / "moved.safetensors"
    shutil.copy(tiny_checkpoint, moved)
    found = retrieve(gallery, WORDS, checkpoint=moved, progress=QUIET)
    assert found.hits == retrieve(gallery, WORDS, progress=QUIET).hits


def test_the_galleries_model_may_be_gone_or_replaced(tiny_data, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(seed=11)
    path = embed(tiny_data, checkpoint, split="val", output=tmp_path / "g", progress=QUIET).path
    shutil.copy(make_checkpoint(seed=12), checkpoint)
    with pytest.raises(UserError, match="was made by another model"):
        retrieve(path, WORDS, progress=QUIET)
    checkpoint.unlink()
    with pytest.raises(UserError, match="is gone: name its new place with --checkpoint"):
        retrieve(path, WORDS, progress=QUIET)
    header = json.loads((path / "gallery.json").read_text())
    header["model"]["path"] = "long" * 99  # as a path that may not be looked at
    (path / "gallery.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="long, .* is gone: name its new place with --checkpoint"):
        retrieve(path, WORDS, progress=QUIET)


def test_words_that_the_model_does_not_know(gallery, capsys):
    retrieve(gallery, "雪 山", progress=Progress())
    assert "no word of the query is in the model's vocabulary" in capsys.readouterr().err
    retrieve(gallery, "red 雪", progress=Progress())
    assert "no word" not in capsys.readouterr().err


def test_mistakes_get_a_sentence(gallery, photos, tmp_path, tiny_checkpoint, monkeypatch):
    for query in ("", "  \n"):
        with pytest.raises(UsageError, match="query is empty"):
            retrieve(gallery, query, progress=QUIET)
    # What the shell makes of a word in Latin-1.
    with pytest.raises(UsageError, match=r"the query 'caf\?' is not in UTF-8: set the terminal to"):
        retrieve(gallery, os.fsdecode(b"caf\xe9"), progress=QUIET)
    with pytest.raises(UsageError, match="either a text or --image"):
        retrieve(gallery, progress=QUIET)
    with pytest.raises(UsageError, match="either a text or --image"):
        retrieve(gallery, WORDS, photos / "0.png", progress=QUIET)
    with pytest.raises(UsageError, match="--rerank compares words with pictures"):
        retrieve(gallery, image=photos / "0.png", rerank=True, progress=QUIET)
    with pytest.raises(UsageError, match="--top-k"):
        retrieve(gallery, WORDS, top_k=0, progress=QUIET)
    with pytest.raises(UsageError, match=r"such as sheet\.png"):
        retrieve(gallery, WORDS, sheet=tmp_path / "sheet.txt", progress=QUIET)
    with pytest.raises(UserError, match=r"x\.png cannot be read: missing"):
        retrieve(gallery, image=photos / "x.png", progress=QUIET)
    with pytest.raises(UserError, match="is not a gallery"):
        retrieve(tmp_path, WORDS, progress=QUIET)
    loaded = load_model(tiny_checkpoint)
    loaded.vlm.itm_head = None
    monkeypatch.setattr("vicvlm_cli.workflows.retrieve.load_model", lambda _: loaded)
    with pytest.raises(UsageError, match="no matching head"):
        retrieve(gallery, WORDS, rerank=True, progress=QUIET)
