"""Contrast and matching of a batch, against the plain way of doing them."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import make_batch, make_model, pad
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, match
from vicvlm_cli.objectives.negatives import hard_negatives
from vicvlm_cli.objectives.ranks import Noise

CPU = torch.device("cpu")


def encode(model: VLM, batch: Batch) -> tuple[Encoded, Encoded]:
    return model.encode_image(batch.image), model.encode_text(batch.input_ids, batch.attention_mask)


def test_contrast_is_itc_on_scaled_cosines() -> None:
    model, batch = make_model(), make_batch()
    batch.image_id[3] = batch.image_id[1]
    image, text = encode(model, batch)
    got = contrast(model, image, text, batch)
    cosine = torch.nn.functional.cosine_similarity(
        image.features[:, None], text.features[None], dim=2
    )
    expected = cosine * model.logit_scale.exp()
    torch.testing.assert_close(got.similarity, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, losses.itc(expected, batch.image_id))
    got.loss.backward()
    assert model.logit_scale.grad is not None and float(model.logit_scale.grad) != 0


@torch.no_grad()
def test_half_precision_does_not_blunt_the_contrast() -> None:
    model, batch = make_model(), make_batch()
    image, text = encode(model, batch)
    # Every pair at a cosine of 1, all others just below: logits of 100 and of 99.5 to 99.9.
    close = torch.nn.functional.normalize(image.features * 0.03 + image.features[:1], dim=-1)
    image, text = image._replace(features=close), text._replace(features=close)
    model.logit_scale.fill_(math.log(100))
    plain = contrast(model, image, text, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = contrast(model, image, text, batch)
        covariance = losses.covariance(image.features)
    torch.testing.assert_close(half.loss, plain.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(half.similarity, plain.similarity, rtol=1e-6, atol=0)
    torch.testing.assert_close(covariance, losses.covariance(image.features), rtol=1e-6, atol=0)


def test_contrast_takes_further_captions_in() -> None:
    model, batch = make_model(), make_batch(4)
    batch.image_id[2] = batch.image_id[0]
    ids, mask = batch.input_ids, batch.attention_mask
    plain = contrast(model, *encode(model, batch), batch)
    # Each picture's further captions are those of the next two.
    batch.more_ids = torch.stack([ids.roll(-1, 0), ids.roll(-2, 0)], 1)
    batch.more_mask = torch.stack([mask.roll(-1, 0), mask.roll(-2, 0)], 1)
    got = contrast(model, *encode(model, batch), batch)
    s = plain.similarity
    whole = torch.cat([s, s.roll(-1, 1), s.roll(-2, 1)], 1)
    torch.testing.assert_close(got.loss, losses.itc(whole, batch.image_id), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.similarity, s)  # what hard negatives are drawn by
    assert float(got.trivial) > float(plain.trivial) == pytest.approx(math.log(4))


def slow_match(
    model: VLM, image: Encoded, text: Encoded, similarity: Tensor, ids: Tensor, number: int
) -> Tensor:
    """Every pair scored alone, without a batch."""
    noise, rows = Noise(3, 5, CPU), len(ids)
    same = ids[:, None] == ids[None, :]
    wrong_text = hard_negatives(similarity, same, noise.rand(rows, rows), number)
    wrong_image = hard_negatives(similarity.T, same, noise.rand(rows, rows), number)
    assert text.mask is not None

    def score(i: int, t: int) -> Tensor:
        length = int(text.mask[t].sum()) if text.mask is not None else 0
        picture = Encoded(image.features[i : i + 1], image.tokens[i : i + 1], None)
        words = Encoded(
            text.features[t : t + 1],
            text.tokens[t : t + 1, :length],
            torch.ones(1, length, dtype=torch.bool),
        )
        return model.match(picture, words)[0]

    positive = [score(i, i) for i in range(rows)]
    negative = [score(i, int(t)) for i in range(rows) for t in wrong_text[i]]
    negative += [score(int(i), t) for t in range(rows) for i in wrong_image[t]]
    return losses.itm(torch.stack(positive), torch.stack(negative))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_matching_equals_scoring_every_pair_alone(fusion: str, number: int) -> None:
    model, batch = make_model(fusion=fusion), make_batch()
    batch.image_id[4] = batch.image_id[0]
    gradients = []
    values = []
    for slow in (False, True):
        model.zero_grad()
        image, text = encode(model, batch)
        contrasted = contrast(model, image, text, batch)
        if slow:
            loss = slow_match(model, image, text, contrasted.similarity, batch.image_id, number)
        else:
            loss, pooled = match(model, image, text, contrasted, Noise(3, 5, CPU), number)
            matched = model.fuse(image.tokens, None, text.tokens, batch.attention_mask)
            torch.testing.assert_close(pooled, matched.pooled, rtol=1e-4, atol=1e-5)
        loss.backward()
        values.append(loss.detach())
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("image_encoder.") for name in gradients[0])
    assert any(name.startswith("text_encoder.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_does_not_change_matching(fusion: str) -> None:
    model, batch = make_model(fusion=fusion), make_batch()
    results = []
    for each in (batch, pad(batch, 6)):
        image, text = encode(model, each)
        contrasted = contrast(model, image, text, each)
        results.append(match(model, image, text, contrasted, Noise(0, 0, CPU), 1)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_the_temperature_stays_at_or_above_its_bound() -> None:
    model = make_model()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    clamp_temperature(model)
    assert float(model.logit_scale.exp()) == pytest.approx(100, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20))
    clamp_temperature(model)
    assert float(model.logit_scale.exp()) == pytest.approx(20, rel=1e-5)
