from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_model

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import BadImage, load_rgb
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.inference import (
    autocast_dtype,
    encode_image_batches,
    encode_text_batches,
    inferring,
)
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights

TEXTS = ["a red square", "blue", "two green circles above a small white triangle", "a red square"]


def pictures(n: int = 5) -> list[Image.Image]:
    return [
        Image.effect_noise((40 + 10 * i, 30), 90).convert("RGB").rotate(90 * i) for i in range(n)
    ]


def test_features_are_unit_vectors_that_batches_do_not_change(tiny_model):
    images = pictures()
    features = tiny_model.encode_images(images, batch_size=2)
    assert features.shape == (5, tiny_model.dim) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    alone = torch.cat([tiny_model.encode_images([image]) for image in images])
    assert torch.allclose(features, alone, atol=1e-6)
    texts = tiny_model.encode_texts(TEXTS, batch_size=3)
    assert torch.allclose(texts.norm(dim=1), torch.ones(4))
    alone = torch.cat([tiny_model.encode_texts([text]) for text in TEXTS])
    assert torch.allclose(texts, alone, atol=1e-6)
    assert torch.equal(texts[0], texts[3]) and not torch.allclose(texts[0], texts[1])
    assert not features.requires_grad


def test_features_are_the_models_own(tiny_model):
    from vicvlm_cli.data.transforms import image_to_array

    images = pictures(3)
    pixels = torch.stack([torch.from_numpy(image_to_array(i, 16)) for i in images])
    with torch.no_grad():
        expected = tiny_model.vlm.encode_image(pixels).features
        ids, mask = tiny_model.tokenizer(TEXTS, tiny_model.vlm.config.max_tokens)
        words = tiny_model.vlm.encode_text(ids, mask).features
    assert torch.allclose(tiny_model.encode_images(images), expected, atol=1e-6)
    assert torch.allclose(tiny_model.encode_texts(TEXTS), words, atol=1e-6)


def test_pictures_are_embedded_at_the_size_for_evaluation():
    vlm = make_model(fusion="cross_attention", eval_image_scale=0.8)
    seen: list[tuple[int, ...]] = []
    encode = vlm.encode_image
    vlm.encode_image = lambda image: seen.append(tuple(image.shape)) or encode(image)
    batches = encode_image_batches(vlm, pictures(2), lambda x: x, device=torch.device("cpu"))
    assert len(list(batches)) == 1
    assert seen == [(2, 3, 24, 24)]


def _embedded(vlm, images, **options):
    # What stands beside it is computed in float32, on any machine.
    options = {"device": torch.device("cpu"), "precision": "no", **options}
    return next(iter(encode_image_batches(vlm, images, lambda x: x, **options))).encoded


@pytest.mark.parametrize("views", [2, 3, 7])
def test_a_picture_may_be_embedded_as_the_mean_of_views_of_it(views):
    from vicvlm_cli.data.transforms import image_to_array

    vlm = make_model(fusion="cross_attention", eval_views=views).eval()
    size = vlm.eval_image_size
    images = pictures(3)
    encoded = _embedded(vlm, images)

    def seen(change=lambda x: x, side=size):
        arrays = [torch.from_numpy(image_to_array(i, side)) for i in images]
        with torch.no_grad():
            return vlm.encode_image(change(torch.stack(arrays)))

    large = round(size / 0.8)
    far, half = large - size, (large - size) // 2
    one = seen()
    each = [
        one,
        seen(lambda x: x.flip(3)),
        seen(lambda x: x[..., half : half + size, half : half + size], large),
        seen(lambda x: x[..., :size, :size], large),
        seen(lambda x: x[..., :size, far:].flip(3), large),
        seen(lambda x: x[..., far:, :size], large),
        seen(lambda x: x[..., far:, far:].flip(3), large),
    ][:views]
    mean = torch.nn.functional.normalize(sum(x.features for x in each), dim=1)
    assert torch.allclose(encoded.features, mean, atol=1e-6)
    assert not torch.allclose(encoded.features, one.features, atol=1e-3)
    assert torch.allclose(encoded.tokens, one.tokens, atol=1e-6)
    assert torch.allclose(_embedded(vlm, images, views=1).features, one.features, atol=1e-6)


def test_a_picture_with_its_mirror_image_is_as_its_mirror_image_with_it():
    vlm = make_model(fusion="cross_attention", eval_views=2).eval()
    images = pictures(3)
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    one, other = _embedded(vlm, images), _embedded(vlm, mirrored)
    assert torch.allclose(one.features, other.features, atol=1e-5)


def test_paths_bytes_and_pictures_are_the_same_to_it(tiny_model, tmp_path):
    image = pictures(1)[0]
    path = tmp_path / "é.png"
    image.save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    features = tiny_model.encode_images([image, path, str(path), buffer.getvalue()])
    assert torch.allclose(features, features[:1].expand(4, -1), atol=1e-6)


def test_a_picture_given_several_times_is_decoded_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("vicvlm_cli.inference.os.cpu_count", lambda: 4)
    path = tmp_path / "a.jpg"
    pictures(1)[0].save(path)
    lazy = Image.open(path)
    load, decoded = lazy.load, []

    def slow():
        if lazy.tile:  # what is not decoded yet
            decoded.append(1)
            time.sleep(0.05)
        return load()

    monkeypatch.setattr(lazy, "load", slow)
    features = tiny_model.encode_images([lazy] * 8, batch_size=4)
    assert len(decoded) == 1
    assert torch.allclose(features, tiny_model.encode_images([path]).expand(8, -1), atol=1e-6)


def test_nothing_in_nothing_out(tiny_model):
    assert tiny_model.encode_images([]).shape == (0, tiny_model.dim)
    assert tiny_model.encode_texts([]).shape == (0, tiny_model.dim)
    assert tiny_model.score_pairs([], []).shape == (0,)


def test_a_pair_scores_similarity_and_itm_together(tiny_model):
    images = pictures(4)
    scores = tiny_model.score_pairs(images, TEXTS, batch_size=3)
    features = tiny_model.encode_images(images), tiny_model.encode_texts(TEXTS)
    vlm = tiny_model.vlm
    scale = vlm.logit_scale.exp().item()
    assert tiny_model.logit_scale == pytest.approx(scale)
    cosine = scale * (features[0] * features[1]).sum(1)
    itm = []
    for image, text in zip(images, TEXTS, strict=True):
        batch = next(encode_image_batches(vlm, [image], load_rgb, device=tiny_model.device))
        _, encoded = next(
            encode_text_batches(vlm, tiny_model.tokenizer, [text], device=tiny_model.device)
        )
        with torch.no_grad():
            itm.append(vlm.match(batch.encoded, encoded))
    expected = cosine + tiny_model.info.rerank_weights.image_retrieval * torch.cat(itm)
    assert torch.allclose(scores, expected, atol=0.05)  # the parts above ran in half precision
    assert not torch.allclose(scores, cosine, atol=0.01)


def test_without_a_matching_head_a_pair_scores_its_similarity(tiny_checkpoint):
    images = pictures(4)
    model = load_model(tiny_checkpoint, device="cpu")
    model.vlm.itm_head = None
    assert not model.vlm.can_match
    cosine = (model.encode_images(images) * model.encode_texts(TEXTS)).sum(1)
    scores = model.score_pairs(images, TEXTS)
    assert torch.allclose(scores, model.logit_scale * cosine, atol=1e-4)


def test_a_picture_of_the_bank_is_told_in_other_views_too(tiny_model):
    images, dim = torch.eye(2, tiny_model.dim), tiny_model.dim
    bank = QueryBank(torch.eye(4, dim), images, torch.arange(4) % 2, RerankWeights.of(1.0))
    seen = torch.nn.functional.normalize(images + 0.1 * torch.eye(2, dim).roll(5, 1), dim=1)
    off = replace(tiny_model, bank=bank).off_images(seen)
    assert torch.allclose(off, bank.off_images(images), atol=0.02)
    assert (bank.off_images(seen) - off > 0.5).all()  # for evaluation they are others


def test_mistakes_get_a_sentence(tiny_model, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.jpg cannot be read: not an image"):
        tiny_model.encode_images([pictures(1)[0], tmp_path / "bad.jpg"])
    with pytest.raises(UserError, match="number 1 cannot be read"):
        tiny_model.encode_images([pictures(1)[0], b"no picture"])
    with pytest.raises(UserError, match="as many texts as pictures, not 1 and 2"):
        tiny_model.score_pairs(pictures(2), ["one"])
    with pytest.raises(UserError, match="list of strings"):
        tiny_model.encode_texts("not a list")


@pytest.mark.parametrize("one", ["dog.jpg", Path("dog.jpg"), b"dog", Image.new("RGB", (8, 8))])
def test_one_picture_is_not_a_list_of_them(tiny_model, one):
    words = r"images must be a list of pictures: write \[image\] for a single one"
    with pytest.raises(UserError, match=words):
        tiny_model.encode_images(one)
    with pytest.raises(UserError, match=words):
        tiny_model.score_pairs(one, ["a dog"])


def test_a_batch_holds_at_least_one(tiny_model):
    images, texts = pictures(1), TEXTS[:1]
    for encode in (
        lambda size: tiny_model.encode_images(images, batch_size=size),
        lambda size: tiny_model.encode_texts(texts, batch_size=size),
        lambda size: tiny_model.score_pairs(images, texts, batch_size=size),
        lambda size: tiny_model.match_pairs(images, texts, batch_size=size),
    ):
        for size in (0, -1):
            with pytest.raises(UsageError, match=f"batch_size must be at least 1, not {size}"):
                encode(size)


def test_bad_pictures_are_left_out_of_their_batch_and_named(tiny_model):
    good = pictures(1)[0]

    def load(source):
        if source in (0, 3, 4, 5):
            raise BadImage("truncated")
        return good

    batches = list(
        encode_image_batches(tiny_model.vlm, range(8), load, device=tiny_model.device, batch_size=3)
    )
    assert [batch.rows for batch in batches] == [[1, 2], [], [6, 7]]
    assert [len(batch.encoded.features) for batch in batches] == [2, 0, 2]
    assert [i for batch in batches for i, _ in batch.bad] == [0, 3, 4, 5]


def test_sources_are_read_one_batch_ahead_only(tiny_model):
    taken = []

    def sources():
        for i in range(100):
            taken.append(i)
            yield i

    picture = pictures(1)[0]
    batches = encode_image_batches(
        tiny_model.vlm, sources(), lambda _: picture, device=tiny_model.device, batch_size=4
    )
    next(batches)
    assert len(taken) == 8
    batches.close()


def test_texts_are_padded_to_their_own_batch_only(tiny_model, monkeypatch):
    widths = []
    whole = tiny_model.vlm.encode_text

    def watched(ids, mask):
        widths.append(ids.shape[1])
        assert mask.any(0).all()  # no column is padding alone
        return whole(ids, mask)

    monkeypatch.setattr(tiny_model.vlm, "encode_text", watched)
    tiny_model.encode_texts(TEXTS, batch_size=1)
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_modes_are_put_back_even_after_a_failure(tiny_model):
    vlm = tiny_model.vlm.train()
    vlm.fusion.eval()
    try:
        with pytest.raises(RuntimeError), inferring(vlm, tiny_model.device, "no"):
            assert not vlm.training and torch.is_inference_mode_enabled()
            raise RuntimeError
        assert vlm.training and not vlm.fusion.training
    finally:
        vlm.eval()


def test_precision(monkeypatch):
    device = torch.device("cpu")
    for gains, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr("vicvlm_cli.inference.supports_bf16", lambda _, gains=gains: gains)
        assert autocast_dtype(device) is expected
    assert autocast_dtype(device, "fp16") is torch.float16
    assert autocast_dtype(device, "no") is None


def test_half_precision_features_are_near_and_of_unit_length(tiny_model, monkeypatch):
    images = pictures()
    exact = tiny_model.encode_images(images)
    monkeypatch.setattr(tiny_model, "precision", "bf16")
    half = tiny_model.encode_images(images)
    assert half.dtype == torch.float32
    assert torch.allclose(half.norm(dim=1), torch.ones(5), atol=1e-6)
    assert torch.allclose((half * exact).sum(1), torch.ones(5), atol=1e-2)
    assert torch.isfinite(tiny_model.score_pairs(images[:4], TEXTS)).all()
