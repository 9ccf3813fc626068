"""All pairs give what a shortlist as long as the gallery gives, and say what they cost."""

from __future__ import annotations

import pytest
import torch
from tiny import make_model, make_tokenizer
from tiny_training import Heard

from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.evaluation import all_pairs
from vicvlm_cli.evaluation.all_pairs import evaluate_all_pairs, ranks_by_score
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.evaluation.recall import ranks, similarity
from vicvlm_cli.evaluation.tokens import encode_split
from vicvlm_cli.model.vlm import RerankWeights

CPU = torch.device("cpu")


def test_ranks_are_those_of_the_features_ties_and_nan_included():
    g = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (20, 3), generator=g).float()
    gallery = torch.randint(-1, 2, (33, 3), generator=g).float()
    gallery[3], queries[2] = torch.nan, torch.nan
    groups = torch.randint(0, 9, (20,), generator=g), torch.randint(0, 9, (33,), generator=g)
    found = ranks_by_score(similarity(queries, gallery), *groups, block=7)
    assert torch.equal(found, ranks(queries, gallery, *groups))


@pytest.mark.parametrize("fusion", ["concat", "stacked_attention", "single_stream"])
def test_all_pairs_are_a_shortlist_of_everything(fusion, tiny_data, monkeypatch):
    monkeypatch.setattr(all_pairs, "PAIRS", 130)  # two pictures at a time
    vlm, tokenizer = make_model(fusion=fusion), make_tokenizer()
    split = PreparedDataset.open(tiny_data).split("test")
    heard = Heard()

    def measured(**options):
        return evaluate_split(
            vlm,
            tokenizer,
            split,
            device=CPU,
            precision="no",
            rerank_weights=RerankWeights(0.7, 0.2),
            progress=heard,
            **options,
        )

    listed, whole = measured(top_k=60), measured(all_pairs=True)
    assert whole.reranked == listed.reranked != whole.dual
    assert whole.dual == listed.dual == measured(top_k=0).dual  # of the cosines, in any case
    assert whole.top_k == 0 and whole.pair_score == vlm.pair_score
    assert any("12 pictures x 60 captions = 720 pairs, about 0." in note for note in heard.notes)
    few = measured(top_k=3)
    assert few.reranked != whole.reranked
    said = [note for note in heard.notes if note.startswith("shortlist: the top 3 hold a match")]
    assert len(said) == (fusion != "concat")
    assert few.own == (few.dual if fusion == "concat" else few.reranked)


def test_a_dual_encoder_has_no_pairs_to_score(tiny_data):
    vlm, split = make_model(fusion="none"), PreparedDataset.open(tiny_data).split("test")
    features = encode_split(vlm, make_tokenizer(), split, device=CPU, progress=Heard())
    with pytest.raises(ValueError, match="a model that can match"):
        evaluate_all_pairs(vlm, features, 1.0, progress=Heard())
