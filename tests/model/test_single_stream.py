"""The single stream is the ViT's own transformer, and its shortlist leaves it as it is."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from tiny import make_batch, make_config, make_model, make_tokenizer, pad
from torch import nn
from torch.nn.functional import normalize

from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.single_stream import SingleStream
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig


def made(**changes: object) -> SingleStream:
    model = make_model(fusion="single_stream", **changes)
    assert isinstance(model, SingleStream)
    return model


def test_a_picture_alone_goes_through_the_vit_as_in_timm() -> None:
    model, batch = made(), make_batch()
    with torch.no_grad():
        model.kind_embedding.zero_()
        tokens = model.image_encoder(model.normalize(batch.image))
        pooled = tokens[:, 0] + tokens.mean(dim=1)
        expected = normalize(model.image_projection(pooled), dim=-1)
        torch.testing.assert_close(model.encode_image(batch.image).features, expected)


def test_a_pair_is_one_sequence_through_the_blocks() -> None:
    model, batch = made(), make_batch(2)
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    stream = model.run(image.tokens, text.tokens, batch.attention_mask)
    for row in range(2):
        real = batch.attention_mask[row]
        x = torch.cat([text.tokens[row][real], image.tokens[row]])[None]
        vit: nn.Module = model.image_encoder.vit
        out = vit.norm(vit.blocks(x))[0]  # without any mask: nothing is padding
        torch.testing.assert_close(stream.text[row][real], out[: int(real.sum())])
        torch.testing.assert_close(stream.image[row], out[int(real.sum()) :])


def test_words_and_patches_tell_each_other_apart() -> None:
    model, batch = made(), make_batch()
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    before = model.match(image, text)
    with torch.no_grad():
        model.kind_embedding.copy_(model.kind_embedding.flip(0))
    image = model.encode_image(batch.image)
    text = model.encode_text(batch.input_ids, batch.attention_mask)
    assert not torch.allclose(model.match(image, text), before)


def test_padding_changes_nothing() -> None:
    model, batch = made(), make_batch()
    image, longer = model.encode_image(batch.image), pad(batch, 4)
    one, two = (model.encode_text(b.input_ids, b.attention_mask) for b in (batch, longer))
    torch.testing.assert_close(two.features, one.features)
    torch.testing.assert_close(model.match(image, two), model.match(image, one))


def test_the_shortlist_leaves_the_transformer_as_it_is() -> None:
    config = TrainConfig(objective="vilt", losses={"itc": LossConfig()})
    model = made()
    objective = create_objective(model, make_tokenizer(), config)
    values, _ = objective(make_batch(), Noise(0, 0, torch.device("cpu")), {"itc"})
    values["itc"].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"image_projection", "text_projection", "logit_scale"}


def test_pretrained_vit_weights_become_the_stream(tmp_path: Path) -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, **make_config().image_options
    )
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    config = make_config(image_weights=str(tmp_path / "vit.safetensors"), fusion="single_stream")
    model = create_model(config, 50)
    own = model.get_submodule("image_encoder.vit").state_dict()
    assert all(torch.equal(own[k], v) for k, v in vit.state_dict().items())
    assert model.config.text_width == 24 and model.config.image_weights == ""
