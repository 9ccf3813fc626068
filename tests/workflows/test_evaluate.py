from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.evaluation.recall import evaluate_features
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.evaluate import evaluate

QUIET = Progress(quiet=True)


def test_both_tables_on_the_test_split(tiny_checkpoint, tiny_data, capsys):
    report = evaluate(tiny_checkpoint, tiny_data, top_k=5, batch_size=5, progress=Progress())
    dual, reranked = report.evaluation.dual, report.evaluation.reranked
    assert (dual.images, dual.captions) == (12, 60)
    assert (dual.text_retrieval.queries, dual.image_retrieval.queries) == (12, 60)
    assert reranked is not None and reranked != dual
    assert reranked.text_retrieval.r10 >= dual.text_retrieval.r5 - 1e-9  # the top 5 stay on top
    split = PreparedDataset.open(tiny_data).split("test")
    assert (report.split, report.split_hash, report.data_title) == ("test", split.hash, split.title)
    notes = capsys.readouterr()
    assert notes.out == ""
    for words in (split.title, "top 5 (--top-k", "weight 0.5 from the checkpoint", "cpu"):
        assert words in notes.err
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["dual"]["image_retrieval"]["r1"] == dual.image_retrieval.r1
    assert plain["reranked"]["rsum"] == pytest.approx(reranked.rsum)
    assert plain["checkpoint"]["sha256"] == load_model(tiny_checkpoint).info.sha256
    assert plain["data"]["images"] == 12 and plain["rerank_weights"]["text_retrieval"] == 0.5


def test_the_dual_table_is_that_of_the_features(tiny_checkpoint, tiny_data):
    model = load_model(tiny_checkpoint)
    split = PreparedDataset.open(tiny_data).split("val")
    images = model.encode_images([split.image(i) for i in range(len(split))])
    texts = [caption for group in split.captions for caption in group]
    of = [i for i, group in enumerate(split.captions) for _ in group]
    expected = evaluate_features(images, model.encode_texts(texts), torch.tensor(of))
    report = evaluate(tiny_checkpoint, tiny_data, "val", top_k=0, progress=QUIET)
    assert report.evaluation.dual == expected
    assert report.evaluation.reranked is None


@pytest.mark.parametrize("top_k", [1, 1000])
def test_weight_0_is_the_dual_table_and_scores_nothing(
    make_checkpoint, tiny_data, top_k, monkeypatch
):
    path = make_checkpoint(weights=(0, 0))
    monkeypatch.setattr("vicvlm_cli.evaluation.evaluate.rerank", None)
    report = evaluate(path, tiny_data, top_k=top_k, progress=QUIET)
    assert report.evaluation.reranked == report.evaluation.dual
    assert any("weight 0" in note for note in report.notes)


def test_a_given_weight_goes_before_the_checkpoints(tiny_checkpoint, tiny_data):
    given = RerankWeights(0.0, 99.0)
    report = evaluate(tiny_checkpoint, tiny_data, top_k=60, rerank_weights=given, progress=QUIET)
    assert report.evaluation.rerank_weights == given
    half = evaluate(tiny_checkpoint, tiny_data, top_k=60, progress=QUIET)
    assert half.evaluation.reranked.text_retrieval != report.evaluation.reranked.text_retrieval
    assert report.evaluation.reranked.image_retrieval == report.evaluation.dual.image_retrieval


def test_candidates_beyond_the_gallery_are_all_of_it(tiny_checkpoint, tiny_data):
    whole = evaluate(tiny_checkpoint, tiny_data, top_k=60, progress=QUIET).evaluation
    more = evaluate(tiny_checkpoint, tiny_data, top_k=5000, progress=QUIET).evaluation
    assert replace(whole, top_k=0) == replace(more, top_k=0)


def test_in_training_the_weight_is_chosen_on_the_split(tiny_model, tiny_data):
    split = PreparedDataset.open(tiny_data).split("val")

    def measured(**options):
        return evaluate_split(
            tiny_model.vlm,
            tiny_model.tokenizer,
            split,
            device=tiny_model.device,
            precision="no",
            progress=QUIET,
            **options,
        )

    chosen = measured(top_k=4)
    assert chosen.reranked.rsum >= chosen.dual.rsum
    again = measured(top_k=4, rerank_weights=chosen.rerank_weights)
    assert again.reranked == chosen.reranked
    few = measured(top_k=0, images=3)
    assert (few.dual.images, few.reranked, few.rerank_weights) == (3, None, (0, 0))


def test_a_model_without_matching_head_has_one_table(tiny_checkpoint, tiny_data, monkeypatch):
    loaded = load_model(tiny_checkpoint)
    loaded.vlm.itm_head = None
    monkeypatch.setattr("vicvlm_cli.workflows.evaluate.load_model", lambda _, **__: loaded)
    report = evaluate(tiny_checkpoint, tiny_data, progress=QUIET)
    assert report.evaluation.reranked is None
    assert any("no matching head" in note for note in report.notes)


def test_figures_that_compare_with_no_others_say_so(tiny_checkpoint, tiny_data, tmp_path):
    report = evaluate(tiny_checkpoint, tiny_data, top_k=0, progress=QUIET)
    # The checkpoint says that it was trained on the split "other" of the same source.
    assert any("trained on the other split of scenes" in note for note in report.notes)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"partial": "train is missing", "source": "flickr30k"}
    manifest["split_hash"]["test"] = "0"  # the split hash that the checkpoint was trained on
    (copy / "manifest.json").write_text(json.dumps(manifest))
    notes = evaluate(tiny_checkpoint, copy, top_k=0, progress=QUIET).notes
    assert notes == [
        "the data set is partial (train is missing)",
        "the model was trained on this very split (test)",
    ]


def test_pictures_that_any_training_has_seen_are_told(tiny_checkpoint, tiny_data, monkeypatch):
    loaded = load_model(tiny_checkpoint)
    manifest = PreparedDataset.open(tiny_data).manifest
    other = {"source": "flickr8k", "split_name": "karpathy", "split_hash": "1"}
    before = {"source": "scenes", "split_name": "seed0", "split_hash": manifest.split_hash["test"]}
    loaded.info = replace(loaded.info, data={**other, "before": [before]})
    monkeypatch.setattr("vicvlm_cli.workflows.evaluate.load_model", lambda _, **__: loaded)
    notes = evaluate(tiny_checkpoint, tiny_data, top_k=0, progress=QUIET).notes
    assert notes == ["the model was trained on this very split (test)"]


def test_mistakes_get_a_sentence(tiny_checkpoint, tiny_data, tmp_path):
    with pytest.raises(UserError, match="it has train, val, test"):
        evaluate(tiny_checkpoint, tiny_data, "dev", progress=QUIET)
    with pytest.raises(UserError, match="not a prepared data set"):
        evaluate(tiny_checkpoint, tmp_path, progress=QUIET)
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate(tmp_path / "none.safetensors", tiny_data, progress=QUIET)
    with pytest.raises(UsageError, match="--top-k"):
        evaluate(tiny_checkpoint, tiny_data, top_k=-1, progress=QUIET)
    with pytest.raises(UsageError, match="--batch-size"):
        evaluate(tiny_checkpoint, tiny_data, batch_size=0, progress=QUIET)


def test_pictures_may_be_evaluated_by_several_views(tiny_checkpoint, tiny_data, capsys):
    own = evaluate(tiny_checkpoint, tiny_data, top_k=4, progress=QUIET)
    mirrored = evaluate(tiny_checkpoint, tiny_data, top_k=4, views=2, progress=Progress())
    assert "2 views of each" in capsys.readouterr().err
    assert mirrored.evaluation.dual != own.evaluation.dual
    cropped = evaluate(tiny_checkpoint, tiny_data, top_k=4, views=7, progress=Progress())
    assert "7 views of each" in capsys.readouterr().err
    assert cropped.evaluation.dual != mirrored.evaluation.dual
    assert [found.to_dict()["views"] for found in (own, mirrored, cropped)] == [1, 2, 7]
    assert evaluate(tiny_checkpoint, tiny_data, top_k=4, views=1, progress=QUIET) == own
    with pytest.raises(UsageError, match="1, 2, 3, 7, not 4"):
        evaluate(tiny_checkpoint, tiny_data, views=4, progress=QUIET)


def test_pictures_may_be_evaluated_at_another_size(make_checkpoint, tiny_data, capsys):
    path = make_checkpoint(fusion="cross_attention")
    own = evaluate(path, tiny_data, top_k=4, progress=QUIET)
    assert own.image_size == 16
    large = evaluate(path, tiny_data, top_k=4, image_scale=1.5, progress=Progress())
    assert large.image_size == large.to_dict()["image_size"] == 24
    assert "pictures of 24 px" in capsys.readouterr().err
    assert large.evaluation.dual != own.evaluation.dual
    assert evaluate(path, tiny_data, top_k=4, image_scale=1.0, progress=QUIET) == own
    for scale in (0.0, -1.0, 5.0):
        with pytest.raises(UsageError, match=r"--image-scale must be above 0 and at most 4"):
            evaluate(path, tiny_data, image_scale=scale, progress=QUIET)
    with pytest.raises(UsageError, match="--image-scale. to 1, or choose another fusion"):
        evaluate(make_checkpoint(), tiny_data, image_scale=1.5, progress=QUIET)
