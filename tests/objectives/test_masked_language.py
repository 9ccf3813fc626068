"""Masked language modelling of every method, one hidden token at a time."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from gradients import assert_same
from test_albef import drawn
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.masking import mask_words
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize(
    ("name", "fusion", "options", "beside"),
    [
        ("vicvlm", "concat", {"predictor_width": 32}, ""),
        ("vicvlm", "cross_attention", {"predictor_width": 32}, ""),
        ("vicvlm", "co_attention", {"predictor_width": 32}, ""),
        ("mamo", "concat", {"variant": "paper"}, ""),
        ("mamo", "concat", {"variant": "seed"}, ""),
        ("mamo", "concat", {"variant": "paper"}, "mrm"),  # which reads the fused words too
        ("mamo", "concat", {"variant": "seed"}, "mrm"),
        ("maskvlm", "co_attention", {}, ""),
        ("vilt", "single_stream", {}, ""),
    ],
)


def make(name: str, fusion: str, options: dict[str, Any]) -> Any:
    config = TrainConfig(objective=name, options=options, losses={"itc": LossConfig()})
    objective: Any = create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()
    with torch.no_grad():
        objective.mlm_head.bias.normal_()  # it starts at 0
    return objective


def hidden_tokens(objective: Any, batch: Batch, beside: str, step: int = 0) -> Tensor:
    """Bool [B, L], of Noise(0, step); a loss of patches ``beside`` hides 4 blocks of them first."""
    noise, rows = Noise(0, step, CPU), len(batch.input_ids)
    if beside:
        noise.rand(rows, 4)
    draw = noise.rand(rows, 40)[:, : batch.input_ids.shape[1]]
    kinds = (objective.continuation, objective.special)
    ratio = objective.config.text_mask
    return mask_words(batch.input_ids, batch.attention_mask, *kinds, draw, ratio)


def read(objective: Any, image: Tensor, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """What the model makes of one token of one pair without padding, [D], and its word table."""
    model = objective.model
    real = torch.ones(ids.shape, dtype=torch.bool)
    tokens = model.encode_image(image).tokens
    if hasattr(model, "word_embedding"):
        stream = model.run(tokens, model.embed_text(ids), real)
        return stream.text[0, place], model.word_embedding.words.weight
    words, table = model.text_encoder(ids, real), model.text_encoder.word_embeddings
    if getattr(objective.config, "variant", "") == "seed":  # without the picture
        return words[0, place], table
    return model.fuse(tokens, None, words, real).text[0, place], table


@EVERY
def test_mlm_is_the_mean_cross_entropy_of_the_hidden_tokens(
    name: str, fusion: str, options: dict[str, Any], beside: str
) -> None:
    objective, batch = make(name, fusion, options), make_batch()
    hidden = hidden_tokens(objective, batch, beside)
    assert bool(hidden.any(1).all()) and len(set(hidden.sum(1).tolist())) > 1
    shown = batch.input_ids.masked_fill(hidden, objective.mask_id)
    if name == "vilt":  # as BERT shows them
        shown, _ = drawn(objective, batch)
    terms = []
    for row, place in hidden.nonzero().tolist():
        n = int(batch.attention_mask[row].sum())
        ids = shown[row : row + 1, :n]
        token, table = read(objective, batch.image[row : row + 1], ids, place)
        guess = objective.mlm_head.transform(token)
        biases = objective.mlm_head.bias
        logits = [guess @ word + bias for word, bias in zip(table, biases, strict=True)]
        own = logits[int(batch.input_ids[row, place])]
        terms.append(torch.stack(logits).exp().sum().log() - own)
    values, _ = objective(batch, Noise(0, 0, CPU), {"mlm", beside} - {""})
    assert_same(values["mlm"], torch.stack(terms).mean(), objective)


@EVERY
def test_the_trivial_guess_is_how_often_each_token_was_hidden(
    name: str, fusion: str, options: dict[str, Any], beside: str
) -> None:
    objective, batch = make(name, fusion, options), make_batch()
    size = objective.model.config.vocab_size
    seen = Counter(range(size))  # each token once, to begin with
    for step, training in enumerate([True, True, False]):
        target = batch.input_ids[hidden_tokens(objective, batch, beside, step)].tolist()
        if training:
            seen.update(target)
        expected = -sum(math.log(seen[t] / seen.total()) for t in target) / len(target)
        _, trivial = objective.train(training)(batch, Noise(0, step, CPU), {"mlm", beside} - {""})
        assert float(trivial["mlm"]) == pytest.approx(expected, rel=1e-5)
        assert objective.token_counts.tolist() == [seen[t] for t in range(size)]
