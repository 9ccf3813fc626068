"""The whole model: features, matching, and padding that cannot change them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import make_batch, make_config, make_model, pad

from vicvlm_cli.errors import UserError
from vicvlm_cli.model import text_encoder
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.model.vlm import VLM, Encoded


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("more", [0, 7])
def test_padding_changes_no_output(
    fusion: str, kind: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoder, "attention_kind", lambda: kind)
    model, batch = make_model(fusion=fusion), make_batch()
    padded = pad(batch, more)
    image = model.encode_image(batch.image)
    before = model.encode_text(batch.input_ids, batch.attention_mask)
    after = model.encode_text(padded.input_ids, padded.attention_mask)
    close(after.features, before.features)
    close(after.tokens[padded.attention_mask], before.tokens[batch.attention_mask])
    close(model.match(image, after), model.match(image, before))
    # Not even if a later layer put rubbish there.
    assert after.mask is not None
    rubbish = after.tokens.masked_fill(~after.mask.unsqueeze(-1), 30.0)
    close(model.match(image, after._replace(tokens=rubbish)), model.match(image, before))


def test_a_caption_alone_is_what_it_is_in_a_batch() -> None:
    model, batch = make_model(), make_batch()
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    together = model.match(image, text)
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        one = slice(row, row + 1)
        alone = model.encode_text(batch.input_ids[one, :length], batch.attention_mask[one, :length])
        close(alone.features[0], text.features[row])
        picture = Encoded(image.features[one], image.tokens[one], None)
        close(model.match(picture, alone), together[one])


def test_features_are_of_unit_length_and_as_wide_as_asked() -> None:
    model, batch = make_model(projection_dim=10), make_batch()
    for encoded in (
        model.encode_image(batch.image),
        model.encode_text(batch.input_ids, batch.attention_mask),
    ):
        assert encoded.features.shape == (6, 10)
        close(encoded.features.norm(dim=1), torch.ones(6))


def test_pictures_are_normalised_inside() -> None:
    model = make_model(image_mean=(0.1, 0.5, 0.9), image_std=(0.2, 0.3, 0.4))
    image = make_batch().image
    expected = torch.empty(6, 3, 32, 32)
    for c, (mean, std) in enumerate(((0.1, 0.2), (0.5, 0.3), (0.9, 0.4))):
        expected[:, c] = (image[:, c] / 255 - mean) / std
    close(model.normalize(image), expected)
    tokens = model.image_encoder(expected)
    torch.testing.assert_close(model.encode_image(image).tokens, tokens, rtol=1e-3, atol=1e-4)
    close(model.encode_image(image).features, model.encode_image(image.float()).features)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_image_features_pool_the_class_token_and_the_patches_alone(pool: str) -> None:
    options = {**make_config().image_options, "reg_tokens": 3, "no_embed_class": True}
    model = make_model(image_options=options, image_pool=pool)
    encoded = model.encode_image(make_batch().image)
    assert encoded.tokens.shape == (6, 4 + 16, 24)
    patches = encoded.tokens[:, 4:]
    pooled = encoded.tokens[:, 0] + (patches.mean(1) if pool == "mean" else patches.max(1).values)
    expected = model.image_projection(pooled)
    close(encoded.features, expected / expected.norm(dim=1, keepdim=True))


def test_text_features_pool_the_class_token_and_the_real_words() -> None:
    model, batch = make_model(), make_batch()
    encoded = model.encode_text(batch.input_ids, batch.attention_mask)
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        words = encoded.tokens[row, :length]
        expected = model.text_projection(words[0] + words.mean(0))
        close(encoded.features[row], expected / expected.norm())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_matching_reads_the_fused_pair_and_the_product_of_its_features(fusion: str) -> None:
    model, batch = make_model(fusion=fusion), make_batch()
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    pooled = model.fuse(image.tokens, None, text.tokens, batch.attention_mask).pooled
    logits = model.match(image, text)
    weight, bias = model.itm_head.weight[0], model.itm_head.bias[0]
    assert logits.shape == (6,)
    for row in range(6):
        product = 16 * image.features[row] * text.features[row]
        expected = weight[:32] @ pooled[row] + weight[32:] @ product + bias
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["concat", "co_attention", "single_stream"])
def test_log_odds_of_half_precision_tell_pairs_apart(fusion: str) -> None:
    model, batch = make_model(fusion=fusion).eval(), make_batch(8)
    with torch.no_grad():
        model.itm_head.bias.fill_(4.0)  # where numbers of bfloat16 are 1/32 apart
        model.itm_head.weight.mul_(0.2)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(batch.image)
            text = model.encode_text(batch.input_ids, batch.attention_mask)
            odds = model.match(image, text)
    assert odds.dtype == torch.float32 and len(odds.unique()) == 8


def test_the_temperature_starts_as_configured() -> None:
    assert math.isclose(
        float(make_model(temperature=0.05).logit_scale.exp().detach()), 20, rel_tol=1e-5
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_resolved_configuration_rebuilds_the_model(fusion: str, tmp_path: Path) -> None:
    options = make_config().image_options
    file = tmp_path / "weights.safetensors"
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=16, **options)
    save_file(source.state_dict(), file)
    model = create_model(make_config(image_weights=str(file), fusion=fusion), vocab_size=50).eval()
    assert model.config.image_weights == "" and model.config.vocab_size == 50
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.image_encoder.vit.state_dict()[weight], source.state_dict()[weight])
    again = VLM(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    image = make_batch().image
    close(again.eval().encode_image(image).features, model.encode_image(image).features)


def test_weights_with_statistics_of_their_own_override_the_configured(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    options = make_config().image_options
    source = timm.create_model("deit_tiny_patch16_224", num_classes=0, img_size=32, **options)
    save_file(source.state_dict(), file)
    config = make_config(image_encoder="deit_tiny_patch16_224", image_weights=str(file))
    assert create_model(config, 50).config.image_mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("fusion", ["cross_attention", "co_attention", "single_stream"])
def test_pictures_may_be_embedded_at_another_size_than_trained_at(fusion: str) -> None:
    model = make_model(fusion=fusion, eval_image_scale=1.5)
    assert (model.eval_image_size, model.image_encoder.grid) == (48, (4, 4))
    same = make_model(fusion=fusion)
    assert same.eval_image_size == 32
    batch, large = make_batch(), make_batch(size=48)
    close(model.encode_image(batch.image).features, same.encode_image(batch.image).features)
    image = model.encode_image(large.image)
    assert image.tokens.shape[1] == model.image_encoder.prefix + 36
    scores = model.match(image, model.encode_text(batch.input_ids, batch.attention_mask))
    assert scores.shape == (6,) and scores.isfinite().all()


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="text_width=30 is not a multiple of"):
        create_model(make_config(text_width=30, text_heads=4), 50)


@pytest.mark.parametrize("registers", [0, 3])
def test_a_picture_may_have_more_patches_than_bert_has_positions(registers: int) -> None:
    options = {**make_config().image_options, "patch_size": 4, "reg_tokens": registers}
    model = make_model(image_size=92, image_options=options)  # 23 x 23 = 529 patches
    batch = make_batch(2, size=92)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    assert model.match(model.encode_image(batch.image), text).shape == (2,)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_checkpoint_holds_no_training_baggage(fusion: str) -> None:
    model = make_model(fusion=fusion)
    pointers = [p.data_ptr() for p in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)  # safetensors refuses tied tensors
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert parts == {
        "image_encoder", "text_encoder", "fusion", "image_projection", "text_projection",
        "itm_head", "logit_scale",
    }  # fmt: skip
