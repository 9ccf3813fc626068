"""Every method goes the whole way, and its checkpoint alone says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import teacher_weights
from tiny_training import QUIET, TINY, Heard

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.errors import UsageError
from vicvlm_cli.gallery import Gallery
from vicvlm_cli.objectives import OBJECTIVES, recipe_of
from vicvlm_cli.workflows.embed import embed
from vicvlm_cli.workflows.evaluate import evaluate
from vicvlm_cli.workflows.retrieve import retrieve
from vicvlm_cli.workflows.train import finetune, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
NAMES = [name for name in OBJECTIVES if name != "vicvlm"]
# Those of the losses and options are of VicVLM.
SETTINGS = [s for s in TINY if ".losses." not in s and ".options." not in s]
OPTIONS = {
    "s_smke": ["teacher=test_vit", f"teacher_weights={teacher_weights()}"],
    "maskvlm": ["decoder_depth=1"],
    "albef": ["queue_size=20", "queue_steps=0"],
}


def make_picture(folder: Path) -> Path:
    """A file to look for others like it."""
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    return folder / "red.png"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_from_pretraining_to_search(name: str, scenes: Path, tmp_path: Path) -> None:
    options = [f"pretrain.options.{option}" for option in OPTIONS.get(name, [])]
    overrides = [*SETTINGS, f"pretrain.objective={name}", "pretrain.epochs=0.5", *options]
    first = pretrain(scenes, overrides=overrides, output=tmp_path / "pre", progress=QUIET)
    assert {row.name for row in first.losses} == set(OBJECTIVES[name].LOSSES)
    tuned = finetune(
        first.checkpoint,
        scenes,
        overrides=["finetune.epochs=0.3"],
        output=tmp_path / "fine",
        progress=QUIET,
    )
    after = recipe_of(name)["finetune"]["objective"]
    assert {row.name for row in tuned.losses} == set(OBJECTIVES[after].LOSSES)
    model = load_model(tuned.checkpoint, device="cpu")
    assert model.info.objective == after
    assert load_model(first.checkpoint, device="cpu").info.objective == name
    of_pair = model.vlm.pair_score
    assert (of_pair is None) == (model.vlm.config.fusion in ("none", "shared"))
    alone = of_pair is not None and of_pair.alone
    report = evaluate(tuned.checkpoint, scenes, top_k=4, progress=QUIET)
    assert (report.evaluation.reranked is None) == (of_pair is None)
    assert any("no matching head" in note for note in report.notes) == (of_pair is None)
    if of_pair is None:
        with pytest.raises(UsageError, match="compares all of them already: leave out --all-pairs"):
            evaluate(tuned.checkpoint, scenes, all_pairs=True, progress=QUIET)
    elif alone:
        whole = evaluate(tuned.checkpoint, scenes, all_pairs=True, progress=QUIET)
        longest = evaluate(tuned.checkpoint, scenes, top_k=10_000, progress=QUIET)
        assert whole.evaluation.reranked == longest.evaluation.reranked
        short = evaluate(tuned.checkpoint, scenes, top_k=0, progress=QUIET)
        assert any(f"not that of {of_pair.name}: raise --top-k" in note for note in short.notes)
    gallery = embed(
        scenes, tuned.checkpoint, output=tmp_path / "g", split="test", progress=QUIET
    ).path
    found = retrieve(gallery, "a red circle", top_k=3, progress=QUIET)
    assert len(found.hits) == 3
    # Its own way of scoring, with no flag.
    assert found.reranked == (alone or model.info.rerank_weights.image_retrieval > 0)
    if alone:  # what orders the hits is what the model says of each pair
        pictures = [Gallery.open(gallery).image(hit.row) for hit in found.hits]
        scores = model.score_pairs(pictures, ["a red circle"] * 3)
        torch.testing.assert_close(
            scores, torch.tensor([hit.score for hit in found.hits]), rtol=0.02, atol=0.02
        )
    if of_pair is not None:
        assert retrieve(gallery, "a red circle", rerank=True, progress=QUIET).reranked
    else:
        with pytest.raises(UsageError, match="this model has no matching head"):
            retrieve(gallery, "a red circle", rerank=True, progress=QUIET)
    heard = Heard()
    alike = retrieve(gallery, image=make_picture(tmp_path), top_k=3, progress=heard)
    assert not alike.reranked and len(alike.hits) == 3
    assert any("is of words with pictures" in note for note in heard.notes) == alone
