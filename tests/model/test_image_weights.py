"""What timm's names, and the names of weights in published files, are to the image encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import make_config, make_tokenizer

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.create import build_model, create_model
from vicvlm_cli.model.image_encoder import ImageEncoder, resolve_image_encoder

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_small_patch16_224"


def random(name: str, classes: int = 0, **options: Any) -> Any:
    """timm's own model, all its weights random."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, img_size=32, **TINY, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (NAME, {"global_pool": "avg"}),
        (NAME, {"fc_norm": True}),
        ("eva_large_patch14_196", {}),
        ("beit3_base_patch16_224", {}),
    ],
)
def test_the_norm_after_pooling_is_the_final_norm(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    own = random(name, 5, **options)
    assert isinstance(own.norm, torch.nn.Identity)
    file = tmp_path / "weights.safetensors"
    save_file(own.state_dict(), file)
    encoder = ImageEncoder(name, 32, {**TINY, **options}, "learned", str(file)).eval()
    image = torch.randn(2, 3, 32, 32)
    tokens = own.fc_norm(own.forward_features(image))
    torch.testing.assert_close(encoder(image), tokens, rtol=1e-4, atol=1e-5)
    # What is frozen is below it.
    encoder.freeze(2)
    learning = {n for n, p in encoder.vit.named_parameters() if p.requires_grad}
    assert learning == {"norm.weight", "norm.bias"}


def test_deit3_is_loaded_from_the_file_that_it_was_published_in(tmp_path: Path) -> None:
    name, file = "deit3_small_patch16_224", tmp_path / "deit_3_small_224_1k.pth"
    own = random(name, 5)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in own.state_dict().items()
    }
    assert "blocks.1.gamma_2" in state
    torch.save({"model": state}, file)
    encoder = ImageEncoder(name, 32, TINY, "learned", str(file)).eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(image), own.forward_features(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["", "hub", "file"])
@pytest.mark.parametrize("tag", ["augreg_in21", ""])
def test_a_tag_that_timm_does_not_know_is_named(tag: str, weights: str, tmp_path: Path) -> None:
    if weights == "file":
        weights = str(tmp_path / "weights.safetensors")
        Path(weights).touch()
    with pytest.raises(UserError) as told:
        resolve_image_encoder(f"{NAME}.{tag}", weights)
    assert str(told.value).startswith(f"timm has no weights '{NAME}.{tag}': name one of ")
    assert f"{NAME}.augreg_in21k, " in str(told.value) and "_tiny_" not in str(told.value)
    with pytest.raises(UserError, match=r"'test_vit4.x': name it test_vit4$"):
        resolve_image_encoder("test_vit4.x", weights)


def test_a_model_is_of_an_architecture_and_no_tag() -> None:
    vocabulary = make_tokenizer().vocab_size
    config = make_config(image_encoder="vit_tiny_patch16_224.augreg_in21k")
    model = create_model(config, vocabulary)
    assert model.config.image_encoder == "vit_tiny_patch16_224"
    # Models had the tag that they were made with, which this timm may not know.
    older = make_config(image_encoder="vit_tiny_patch16_224.of_old", vocab_size=vocabulary)
    again = build_model(older)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())


def test_the_tag_says_which_weights_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = timm.create_model, []

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        asked.append((name, pretrained))
        return made(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    name = "vit_tiny_patch16_224.augreg_in21k"
    config = make_config(image_encoder=name, image_weights="hub")
    assert create_model(config, 90).config.image_encoder == "vit_tiny_patch16_224"
    assert asked == [(name, True)]
