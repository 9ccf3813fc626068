"""ViLT: matching, alignment and ranking against one pair at a time."""

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
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.single_stream import Stream
from vicvlm_cli.model.vlm import Encoded
from vicvlm_cli.objectives import OBJECTIVES, create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.transport import alignment_distance
from vicvlm_cli.objectives.vilt import match_half
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
IDS = [0, 1, 0, 3, 0, 5, 1]  # three captions of one picture, two of another


def make(name: str = "vilt", **options: Any) -> Any:
    weights = {loss: LossConfig() for loss in OBJECTIVES[name].LOSSES}
    config = TrainConfig(objective=name, options=options, losses=weights)
    return create_objective(make_model(fusion="single_stream"), make_tokenizer(), config).train()


def some(ids: list[int]) -> Batch:
    batch = make_batch(len(ids))
    batch.image_id = torch.tensor(ids)
    return batch


def encode(model: Any, batch: Batch) -> tuple[Encoded, Encoded]:
    return model.encode_image(batch.image), model.encode_text(batch.input_ids, batch.attention_mask)


def alone(image: Encoded, text: Encoded, i: int, j: int) -> tuple[Encoded, Encoded]:
    """Picture i and caption j, without padding."""
    assert text.mask is not None
    n = int(text.mask[j].sum())
    return (
        Encoded(image.features[i : i + 1], image.tokens[i : i + 1], None),
        Encoded(text.features[j : j + 1], text.tokens[j : j + 1, :n], text.mask[j : j + 1, :n]),
    )


def watch(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Tokens of the pictures and of the captions of each pass over pairs."""
    calls: list[tuple[Tensor, Tensor]] = []
    run = model.run

    def spy(image: Tensor, text: Tensor, mask: Tensor) -> Stream:
        calls.append((image.detach(), text.detach()))
        stream: Stream = run(image, text, mask)
        return stream

    monkeypatch.setattr(model, "run", spy)
    return calls


def which(given: Tensor, known: Tensor) -> list[int]:
    """For each row of ``given``, which of ``known`` it is."""
    distance = (given[:, None] - known.detach()[None]).abs().flatten(2).sum(2)
    assert float(distance.amin(1).max()) < 1e-3
    numbers: list[int] = distance.argmin(1).tolist()
    return numbers


@torch.no_grad()
def test_exactly_half_of_the_captions_are_shown_another_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make().model
    calls = watch(model, monkeypatch)
    for ids in (IDS, IDS[:6]):
        image, text = encode(model, some(ids))
        for step in range(10):
            match_half(model, image, text, torch.tensor(ids), Noise(0, step, CPU))
            pictures, captions = calls[-1]
            assert which(captions, text.tokens) == list(range(len(ids)))
            shown = which(pictures, image.tokens)
            others = [(i, j) for i, j in enumerate(shown) if i != j]
            assert len(others) == 3
            assert all(ids[i] != ids[j] for i, j in others)


@torch.no_grad()
def test_any_caption_may_be_shown_any_other_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().model
    image, text = encode(model, some([0, 1, 2, 3]))
    calls = watch(model, monkeypatch)
    for step in range(60):
        match_half(model, image, text, torch.arange(4), Noise(0, step, CPU))
    seen = Counter(pair for x, _ in calls for pair in enumerate(which(x, image.tokens)))
    assert all(18 <= seen[i, i] <= 42 for i in range(4))  # 30 of 60
    assert all(3 <= seen[i, j] <= 19 for i in range(4) for j in range(4) if i != j)  # 10 of 60


@pytest.mark.parametrize("name", ["vilt", "vilt_ranking"])
@pytest.mark.parametrize("ids", [IDS, IDS[:6]])
def test_itm_is_the_mean_cross_entropy_of_single_pairs(
    name: str, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch = make(name), some(ids)
    model = objective.model
    image, text = encode(model, batch)
    calls = watch(model, monkeypatch)
    values, trivial = objective(batch, Noise(0, 0, CPU), {"itm"})
    shown, terms = which(calls[0][0], image.tokens), []
    for i, j in enumerate(shown):
        p = model.match(*alone(image, text, j, i)).sigmoid()[0]
        terms.append(-p.log() if i == j else -(1 - p).log())
    assert_same(values["itm"], torch.stack(terms).mean(), objective)
    p = 1 - 3 / len(ids)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert float(trivial["itm"]) == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("ids", [IDS, IDS[:6]])
def test_wpa_pulls_words_onto_their_own_patches_and_off_those_of_others(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch = make(), some(ids)
    model = objective.model
    image, text = encode(model, batch)
    calls = watch(model, monkeypatch)
    values, trivial = objective(batch, Noise(0, 0, CPU), {"wpa"})
    shown, terms = which(calls[0][0], image.tokens), []
    for i, j in enumerate(shown):
        picture, caption = alone(image, text, j, i)
        stream = model.run(picture.tokens, caption.tokens, caption.mask)
        words, patches = stream.text[:, 1:-1], stream.image[:, 1:]  # [CLS] and [SEP]; the class
        assert words.shape[1] == int(batch.attention_mask[i].sum()) - 2 and patches.shape[1] == 16
        every = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (words, patches)]
        distance = alignment_distance(words, patches, *every)[0]
        terms.append(distance if i == j else 2 - distance)
    assert_same(values["wpa"], torch.stack(terms).mean(), objective)
    assert float(trivial["wpa"]) == 1.0


def test_hidden_words_are_shown_as_bert_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = make(text_mask=0.5), some(IDS)
    expected, hidden = drawn(objective, batch)
    masked, as_it_is = expected == objective.mask_id, expected == batch.input_ids
    for kind in (masked, as_it_is, ~masked & ~as_it_is):  # the last are other words
        assert bool((kind & hidden).any())
    shown: list[Tensor] = []
    embed = objective.model.embed_text

    def spy(input_ids: Tensor) -> Tensor:
        shown.append(input_ids)
        embedded: Tensor = embed(input_ids)
        return embedded

    monkeypatch.setattr(objective.model, "embed_text", spy)
    objective(batch, Noise(0, 0, CPU), {"mlm"})
    assert torch.equal(shown[-1], expected)


@pytest.mark.parametrize(
    ("ids", "negatives", "number"),
    [(IDS, 2, 2), (IDS, 15, 4), ([0, 1, 2, 3, 4], 15, 4), ([0, 0, 1, 0], 15, 1)],
)
def test_ranking_finds_the_own_caption_among_those_of_other_pictures(
    ids: list[int], negatives: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch = make("vilt_ranking", negatives=negatives), some(ids)
    model = objective.model
    image, text = encode(model, batch)
    calls = watch(model, monkeypatch)
    values, trivial = objective(batch, Noise(0, 0, CPU), {"ranking"})
    pictures, captions = which(calls[0][0], image.tokens), which(calls[0][1], text.tokens)
    assert len(pictures) == len(captions) == len(ids) * (1 + number)
    terms = []
    for i in range(len(ids)):
        group = slice(i * (1 + number), (i + 1) * (1 + number))
        own, *others = captions[group]
        assert pictures[group] == [i] * (1 + number) and own == i
        assert len(set(others)) == number
        assert all(ids[j] != ids[i] for j in others)
        scores = [model.match(*alone(image, text, i, j))[0] for j in captions[group]]
        terms.append(-(scores[0].exp() / torch.stack(scores).exp().sum()).log())
    assert_same(values["ranking"], torch.stack(terms).mean(), objective)
    assert float(trivial["ranking"]) == pytest.approx(math.log(1 + number), rel=1e-5)


@torch.no_grad()
def test_any_caption_of_another_picture_may_be_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = make("vilt_ranking", negatives=1), some([0, 1, 2, 3])
    image, text = encode(objective.model, batch)
    calls = watch(objective.model, monkeypatch)
    for step in range(60):
        objective(batch, Noise(0, step, CPU), {"ranking"})
    seen = Counter(
        pair
        for x, y in calls
        for pair in zip(which(x, image.tokens), which(y, text.tokens), strict=True)
    )
    assert all(seen[i, i] == 60 for i in range(4))
    assert all(8 <= seen[i, j] <= 34 for i in range(4) for j in range(4) if i != j)  # 20 of 60


@pytest.mark.parametrize(("name", "loss"), [("vilt", "itm"), ("vilt_ranking", "ranking")])
def test_captions_of_one_picture_alone_are_refused(name: str, loss: str) -> None:
    with pytest.raises(UserError, match="too few other pictures"):
        make(name)(some([4, 4, 4]), Noise(0, 0, CPU), {loss})


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"options\.text_mask must be between 0 and 1"):
        make(text_mask=1.0)
    with pytest.raises(UsageError, match=r"options\.negatives is 0, and must be above 0"):
        make("vilt_ranking", negatives=0)
