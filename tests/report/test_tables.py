from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console

from vicvlm_cli.evaluation.evaluate import Evaluation, EvaluationReport
from vicvlm_cli.evaluation.recall import Recall, RetrievalMetrics
from vicvlm_cli.gallery.results import EmbedResult, Hit, RetrieveResult
from vicvlm_cli.model.vlm import PairScore, RerankWeights
from vicvlm_cli.report import tables
from vicvlm_cli.report.profile import Cost, Profile, profile_blocks


def shown(blocks) -> str:
    console = Console(file=io.StringIO(), width=100)
    for block in blocks:
        console.print(block)
    return console.file.getvalue()


def metrics(r1: float) -> RetrievalMetrics:
    return RetrievalMetrics(
        image_retrieval=Recall(r1, 60.25, 70.5, 3.0, 9.0, 5000),
        text_retrieval=Recall(r1 + 10, 80.0, 90.0, 1.5, 4.0, 1000),
        images=1000,
        captions=5000,
    )


def report(reranked: bool = True) -> EvaluationReport:
    evaluation = Evaluation(
        metrics(40.0), metrics(45.0) if reranked else None, RerankWeights.of(0.5), 128
    )
    return EvaluationReport(
        evaluation=evaluation,
        checkpoint=Path("model.safetensors"),
        sha256="ab" * 32,
        objective="vicvlm",
        data=Path("data"),
        source="flickr30k",
        split="test",
        split_name="karpathy",
        split_hash="1a2b3c4d5e6f7a8b",
        partial="test has 900 of 1,000 images",
        data_title="flickr30k test (karpathy, 1,000 images, hash 1a2b3c4d, partial: …)",
        precision="float32",
        image_size=224,
        views=7,
        notes=["the model was trained on this very split [test]"],
    )


def test_both_evaluation_tables_carry_the_splits_name_and_the_notes():
    text = shown(tables.evaluation_tables(report()))
    assert text.count("1a2b3c4d, partial") == text.count("very split [test]") == 2
    for words in (
        "Dual encoder alone",
        "top 128",
        "(top 128, weight 0.5)",
        "40.0",
        "55.0",
        "60.2",
        "1.5",
    ):
        assert words in text
    assert "390.8" in text and "400.8" in text  # RSUM
    assert str(RerankWeights(0.3, 2)) == "0.3 text to image and 2 image to text"


def test_the_query_bank_has_a_table_of_its_own():
    one = report()
    banked = replace(one.evaluation, banked=metrics(42.0), bank_weights=RerankWeights(0.5, 1.0))
    one = replace(one, evaluation=banked)
    text = shown(tables.evaluation_tables(one))
    assert "With the query bank (weight 0.5 text to image and 1 image to text)" in text
    assert text.count("RSUM") == 3 and "42.0" in text
    plain = one.to_dict()
    assert plain["banked"]["image_retrieval"]["r1"] == 42.0
    assert plain["bank_weights"] == {"image_retrieval": 0.5, "text_retrieval": 1.0}


def test_without_reranking_there_is_one_table():
    text = shown(tables.evaluation_tables(report(reranked=False)))
    assert text.count("RSUM") == 1
    assert "ITM" not in text


def test_pair_scores_without_weight_have_no_table():
    one = report()
    evaluation = replace(one.evaluation, rerank_weights=RerankWeights())
    one = replace(one, evaluation=evaluation)
    text = shown(tables.evaluation_tables(one))
    assert text.count("RSUM") == 1 and "Re-ranked" not in text
    assert one.to_dict()["reranked"] is not None  # readers find what they look for
    evaluation = replace(evaluation, rerank_weights=RerankWeights(0.0, 0.5))
    text = shown(tables.evaluation_tables(replace(one, evaluation=evaluation)))
    assert "weight 0 text to image and 0.5 image to text" in text


def test_a_score_that_stands_alone_has_its_own_name():
    one = report()
    own = PairScore("stacked cross attention", alone=True)
    for top_k, among in ((128, "top 128"), (0, "all pairs")):
        evaluation = replace(
            one.evaluation, pair_score=own, rerank_weights=RerankWeights.of(1.0), top_k=top_k
        )
        text = shown(tables.evaluation_tables(replace(one, evaluation=evaluation)))
        assert "Shortlist alone (cosine of the features)" in text
        assert f"Stacked cross attention ({among})" in text
        assert "ITM" not in text and "Dual encoder" not in text
    plain = replace(one, evaluation=evaluation).to_dict()
    assert plain["pair_score"] == {"name": "stacked cross attention", "alone": True}
    assert plain["rsum"] == plain["reranked"]["rsum"]  # what validations go by


def test_evaluation_as_json():
    plain = report().to_dict()
    assert plain["dual"]["image_retrieval"]["r1"] == 40.0
    assert plain["dual"]["rsum"] == 390.75
    assert plain["reranked"]["text_retrieval"]["median_rank"] == 1.5
    assert plain["data"]["split_hash"] == "1a2b3c4d5e6f7a8b"
    assert (plain["data"]["images"], plain["data"]["captions"]) == (1000, 5000)
    assert report(reranked=False).to_dict()["reranked"] is None


LOSSES = [
    SimpleNamespace(name="itc", weight=1.0, first=4.2, last=1.2, trivial=4.16),
    SimpleNamespace(name="itm", weight=0.5, first=0.7, last=0.63, trivial=0.6365),
    SimpleNamespace(name="mlm", weight=0.25, first=6.0, last=6.1, trivial=5.5),
    SimpleNamespace(name="odd", weight=0.25, first=6.0, last=6.1, trivial=math.nan),
]


def test_losses_stand_beside_their_trivial_values():
    lines = shown([tables.loss_summary_table(LOSSES)]).splitlines()
    row = {line.split("│")[1].strip(): line for line in lines if line.startswith("│")}
    assert "learned" in row["itc"] and "4.1600" in row["itc"]
    assert "hardly below trivial" in row["itm"]
    assert "not below trivial" in row["mlm"]
    assert "trivial" not in row["odd"] and "nan" not in row["odd"]


def test_a_trainings_summary():
    rows = []
    for step in range(20):
        dual = metrics(float(step)).to_dict()
        rows.append({"step": step * 100, "seconds": 60.0 * step, "dual": dual, "reranked": None})
    rows[-1]["reranked"] = metrics(33.3).to_dict()
    trained = SimpleNamespace(
        checkpoint=Path("runs/one/model.safetensors"),
        losses=LOSSES,
        validation=rows,
        best=rows[4],
        steps=1900,
        pairs=1900 * 64,
        seconds=1200.0,
        rerank_weights=RerankWeights(0.3, 2.0),
        profile=None,
    )
    text = shown(tables.training_tables(trained))
    assert "1,900 steps, 121,600 pairs in 20.0 minutes (101 pairs/s)" in text
    assert "runs/one/model.safetensors" in text
    best = next(line for line in text.splitlines() if "kept" in line)
    assert "400" in best and "4.0" in best
    assert "33.3" in next(line for line in text.splitlines() if "re-ranked" in line)
    assert " 300 " not in text  # neither among the last nor the best
    trained.validation = []
    assert "runs/one/model.safetensors" in shown(tables.training_tables(trained))


def test_a_prepared_data_sets_table():
    manifest = SimpleNamespace(
        source="flickr8k",
        split_name="karpathy",
        partial="test is missing",
        images={"train": 6000, "val": 1000},
        captions={"train": 30000, "val": 5000},
        split_hash={"train": "0123456789abcdef", "val": "fedcba9876543210"},
        rejected={"truncated": 3, "no caption": 1},
        rejected_captions={"empty caption": 2},
    )
    text = shown(tables.prepare_tables(SimpleNamespace(path=Path("out"), manifest=manifest)))
    for words in ("30,000", "01234567", "test is missing", "left out: 3 truncated, 1 no caption"):
        assert words in text
    assert "captions left out of pictures that are kept: 2 empty caption" in text


HIT = Hit(1, 0.31, 0.31, "photos/[a] é.jpg", "a", ["a dog [runs]", "another"], 5)


def test_hits_show_score_path_and_caption_as_they_are():
    result = RetrieveResult("a [bold] dog", False, Path("g"), 1234, False, [HIT])
    text = shown(tables.hits_tables(result))
    for words in ("a [bold] dog", "0.310", "photos/[a] é.jpg", "a dog [runs]", "1 of 1,234"):
        assert words in text
    assert "cosine" not in text and "caption" in text
    past_hubs = replace(result, hits=[replace(HIT, score=0.11)])
    assert "cosine" in shown(tables.hits_tables(past_hubs))
    bare = replace(HIT, captions=[], path="odd-\udce9.jpg")
    result = replace(result, hits=[bare], reranked=True, by_image=True, sheet=Path("s.png"))
    text = shown(tables.hits_tables(result))
    assert "cosine" in text and "caption" not in text and "odd-?.jpg" in text
    assert "Pictures like a [bold] dog" in text and "drawn in s.png" in text


def test_a_gallerys_table_counts_what_was_skipped():
    skipped = [("a.jpg", "truncated"), ("b.jpg", "not an image"), ("c.jpg", "truncated")]
    result = EmbedResult(Path("g"), Path("photos"), Path("m"), "cd" * 32, 2000, 64, skipped)
    text = shown(tables.gallery_tables(result))
    assert "2 truncated, 1 not an image" in text and "2,000 from photos" in text
    assert result.to_dict()["skipped"][1] == {"path": "b.jpg", "reason": "not an image"}
    assert "none" in shown(tables.gallery_tables(replace(result, skipped=[])))


def test_a_profile_has_a_column_for_the_gpu_where_there_is_one():
    for device_ms in (None, 12.5):
        parts = [Cost("forward", 1.0, 30.0, device_ms, 0.6)]
        operators = [Cost("aten::addmm", 48.0, 20.0, device_ms, 0.25)]
        profile = Profile(Path("runs/[a]/trace.json.gz"), 5, 50.0, parts, operators)
        text = shown(profile_blocks(profile))
        assert "5 steps of 50.0 ms recorded in runs/[a]/trace.json.gz" in " ".join(text.split())
        assert "60.0 %" in text and "25.0 %" in text and "aten::addmm" in text
        assert ("GPU ms" in text) == ("12.50" in text) == (device_ms is not None)
        assert profile.to_dict()["parts"][0]["device_ms"] == device_ms
