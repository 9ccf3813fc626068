"""The query bank from the end of a training to the score of a hit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import QUIET

from vicvlm_cli.checkpoint import load_model, save_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.workflows import bank
from vicvlm_cli.workflows.bank import make_bank
from vicvlm_cli.workflows.embed import embed
from vicvlm_cli.workflows.evaluate import evaluate
from vicvlm_cli.workflows.retrieve import retrieve
from vicvlm_cli.workflows.run import TrainResult

CPU = torch.device("cpu")


def test_a_bank_is_spread_over_captions_and_pictures(tiny_model, tiny_data, monkeypatch):
    split = PreparedDataset.open(tiny_data).split("train")
    captions = [caption for group in split.captions for caption in group]

    def made():
        return make_bank(
            tiny_model.vlm, tiny_model.tokenizer, split, device=CPU, precision="no", progress=QUIET
        )

    whole = made()
    assert (len(whole.texts), len(whole.images)) == (len(captions), len(split)) == (40, 8)
    assert whole.text_image.tolist() == [i for i in range(8) for _ in range(5)]
    assert torch.allclose(whole.texts, tiny_model.encode_texts(captions), atol=1e-3)
    monkeypatch.setattr(bank, "CAPTIONS", 17)
    assert made().text_image.tolist() == [i for i in range(8) for _ in range(2)]
    monkeypatch.setattr(bank, "PICTURES", 4)
    monkeypatch.setattr(bank, "CAPTIONS", 3)
    few = made()
    assert few.weights is None and few.text_image.tolist() == [0, 1, 2, 3]
    texts = tiny_model.encode_texts(captions[::10])
    images = tiny_model.encode_images([split.image(i) for i in (0, 2, 4, 6)])
    assert torch.allclose(few.texts, texts, atol=1e-3)
    assert torch.allclose(few.images, images, atol=1e-3)


@pytest.fixture(scope="module")
def balanced(pretrained: TrainResult, tmp_path_factory) -> Path:
    """A trained checkpoint whose bank counts in both directions, whatever its validation chose."""
    loaded = load_model(pretrained.checkpoint, device="cpu")
    assert loaded.bank is not None  # the end of a training made it
    path = tmp_path_factory.mktemp("balanced") / "model.safetensors"
    save_model(
        path,
        loaded.vlm,
        loaded.tokenizer,
        config=loaded.info.config,
        data=loaded.info.data,
        objective=loaded.info.objective,
        rerank_weights=RerankWeights(0.3, 0.3),
        bank=loaded.bank.at(RerankWeights(1.0, 0.5)),
    )
    return path


def test_the_end_of_a_training_chooses_its_weights(pretrained: TrainResult):
    row = pretrained.best
    loaded = load_model(pretrained.checkpoint, device="cpu")
    assert row is not None and loaded.bank is not None
    assert loaded.bank.weights == tuple(row["bank_weights"].values())
    for way in ("image_retrieval", "text_retrieval"):
        assert row["banked"][way]["r1"] >= row["dual"][way]["r1"]


def test_evaluation_has_a_table_of_it(balanced: Path, scenes: Path):
    found = evaluate(balanced, scenes, top_k=4, progress=QUIET).evaluation
    assert found.bank_weights == (1.0, 0.5)
    assert found.banked is not None and found.banked != found.dual
    # Re-ranking all candidates or all pairs starts from it, and agrees.
    listed = evaluate(balanced, scenes, top_k=1000, progress=QUIET).evaluation
    whole = evaluate(balanced, scenes, all_pairs=True, progress=QUIET).evaluation
    assert listed.reranked == whole.reranked != listed.banked
    zero = RerankWeights()
    plain = evaluate(balanced, scenes, top_k=4, rerank_weights=zero, progress=QUIET).evaluation
    assert plain.reranked == plain.banked == found.banked and plain.dual == found.dual


def test_words_look_past_hubs_and_pictures_do_not(balanced: Path, scenes: Path, tmp_path: Path):
    path = embed(scenes, balanced, output=tmp_path / "gallery", progress=QUIET).path
    stored, model = Gallery.open(path), load_model(balanced, device="cpu")
    assert stored.off is not None
    assert torch.allclose(stored.off, model.off_images(stored.features), atol=1e-6)
    words = "a red circle above a blue square"
    cosines = stored.features @ model.encode_texts([words])[0]
    scores = cosines - stored.off
    hits = retrieve(path, words, top_k=5, rerank=False, progress=QUIET).hits
    assert [hit.row for hit in hits] == scores.argsort(descending=True)[:5].tolist()
    for hit in hits:
        assert hit.score == pytest.approx(scores[hit.row].item(), abs=1e-5)
        assert hit.cosine == pytest.approx(cosines[hit.row].item(), abs=1e-5)
    picture = tmp_path / "picture.png"
    stored.image(3).save(picture)
    alike = retrieve(path, image=picture, top_k=3, progress=QUIET).hits
    assert alike[0].row == 3 and all(hit.score == hit.cosine for hit in alike)
    # The combined score is that of the same similarity.
    reranked = retrieve(path, words, top_k=2, rerank=True, progress=QUIET).hits
    pair = model.score_pairs([stored.image(reranked[0].row)], [words])
    assert reranked[0].score == pytest.approx(pair.item(), abs=1e-3)
