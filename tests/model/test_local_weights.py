"""Weights of the image encoder from a local file or a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_image_encoder import NAME, TINY
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.image_encoder import ImageEncoder, resolve_image_encoder


def pretrained(path: Path, classes: int, half: bool, size: int = 32) -> dict[str, Tensor]:
    """Weights as a pretraining elsewhere would leave them, at ``path``."""
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=classes, img_size=size, **TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = model.state_dict()
    if half:
        state = {k: v.half() for k, v in state.items()}
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return {k: v.float() for k, v in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [0, 10, 1000])
@pytest.mark.parametrize("half", [False, True])
def test_local_weights_are_loaded_at_another_size(
    classes: int, half: bool, suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"weights{suffix}"
    state = pretrained(file, classes, half)
    encoder = ImageEncoder(NAME, 48, TINY, "learned", str(file))
    assert encoder.grid == (6, 6)
    own = encoder.vit.state_dict()
    assert {v.dtype for v in own.values()} == {torch.float32}
    positions = resample_abs_pos_embed(state["pos_embed"], [6, 6], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(own.pop("pos_embed"), positions, rtol=1e-3, atol=1e-3)
    assert set(own) == {k for k in state if not k.startswith("head.")} - {"pos_embed"}
    for key, value in own.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_interpolated_positions_keep_the_picture_upright(tmp_path: Path) -> None:
    # From a table that holds each patch's own row and column, the larger one must too.
    state = pretrained(tmp_path / "w.safetensors", 0, False)
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    state["pos_embed"][0, 1:, 0], state["pos_embed"][0, 1:, 1] = y.flatten(), x.flatten()
    save_file(state, tmp_path / "w.safetensors")
    encoder = ImageEncoder(NAME, 64, TINY, "sincos", str(tmp_path / "w.safetensors"))
    table = encoder.vit.pos_embed[0, 1:].reshape(8, 8, -1)
    inner = torch.arange(2, 6)
    expected = (inner + 0.5) / 2 - 0.5
    torch.testing.assert_close(table[inner, 4, 0], expected, rtol=0, atol=0.1)
    torch.testing.assert_close(table[4, inner, 1], expected, rtol=0, atol=0.1)


def test_weights_at_their_own_size_keep_their_positions(tmp_path: Path) -> None:
    state = pretrained(tmp_path / "w.safetensors", 10, False)
    encoder = ImageEncoder(NAME, 32, TINY, "sincos", str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(encoder.vit.pos_embed, state["pos_embed"], rtol=0, atol=0)


def test_weights_of_a_cut_encoder_are_still_of_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = pretrained(file, 0, False)  # of two blocks
    encoder = ImageEncoder(NAME, 32, TINY, "learned", str(file), layers=1)
    own = encoder.vit.state_dict()
    assert set(own) == {k for k in state if not k.startswith("blocks.1.")}
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    with pytest.raises(UserError, match="12 are missing, the first is blocks.2.norm1.weight"):
        ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned", str(file), layers=1)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="does not hold the weights of"):
        ImageEncoder(NAME, 32, TINY, "learned", str(file))
    pretrained(file, 0, False)
    with pytest.raises(UserError, match=f"could not be loaded from {file}.*size mismatch"):
        ImageEncoder(NAME, 32, {**TINY, "embed_dim": 36}, "learned", str(file))
    save_file({k: v for k, v in pretrained(file, 0, False).items() if k != "norm.bias"}, file)
    with pytest.raises(UserError, match="1 are missing, the first is norm.bias"):
        ImageEncoder(NAME, 32, TINY, "learned", str(file))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"could not be loaded from {file}"):
        ImageEncoder(NAME, 32, TINY, "learned", str(file))


def test_a_model_folder_names_architecture_weights_and_statistics(tmp_path: Path) -> None:
    card: dict[str, Any] = {"architecture": NAME, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="holds no .safetensors or .pth weights"):
        resolve_image_encoder(str(tmp_path), "")
    file = tmp_path / "model.safetensors"
    file.touch()
    statistics = {"image_mean": (0.1, 0.2, 0.3)}
    assert resolve_image_encoder(str(tmp_path), "") == (NAME, str(file), statistics)
    other = tmp_path / "other.pth"
    other.touch()
    assert resolve_image_encoder(str(tmp_path), str(other)) == (NAME, str(other), statistics)
    for content in ("{}", "[]", "words"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="no config.json that names a timm 'architecture'"):
            resolve_image_encoder(str(tmp_path), "")


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"architecture": "vit_tinny"}, "names the architecture 'vit_tinny', of which timm has no"),
        ({"architecture": None}, "names the architecture None, of which timm has no model"),
        ({"mean": 0.5}, "says that mean is 0.5, not three numbers"),
        ({"std": [0.5, 0.5]}, r"says that std is \[0.5, 0.5\], not three numbers above 0"),
        ({"std": [0.5, 0, 0.5]}, r"says that std is \[0.5, 0, 0.5\], not three numbers above 0"),
        ({"pretrained_cfg": {"input_size": [3, 9.5, 9]}}, "says that input_size .* three whole"),
    ],
)
def test_a_card_that_cannot_be_meant_is_named(
    card: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME, **card}))
    with pytest.raises(UserError, match=f"{tmp_path / 'config.json'} {words}"):
        resolve_image_encoder(str(tmp_path), "")


def test_pretrained_weights_bring_their_statistics(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match=f"there are no image weights at {file}"):
        resolve_image_encoder("deit_tiny_patch16_224", str(file))
    file.touch()
    name, weights, statistics = resolve_image_encoder("deit_tiny_patch16_224", str(file))
    assert (name, weights) == ("deit_tiny_patch16_224", str(file))
    assert statistics["image_mean"] == (0.485, 0.456, 0.406)
    assert statistics["image_std"] == (0.229, 0.224, 0.225)
    assert resolve_image_encoder("deit_tiny_patch16_224", "") == ("deit_tiny_patch16_224", "", {})
