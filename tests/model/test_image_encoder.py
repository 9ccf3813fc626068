"""The image encoder against timm's own forward, and weights from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.image_encoder import ImageEncoder, sincos_2d

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"
VARIANTS = [
    (NAME, {}),
    (NAME, {"reg_tokens": 2}),
    (NAME, {"reg_tokens": 2, "no_embed_class": True}),
    (NAME, {"pre_norm": True}),
    (NAME, {"global_pool": "avg"}),
    (NAME, {"qk_norm": True, "init_values": 0.1}),
    ("deit_tiny_distilled_patch16_224", {}),
]


def normed(own: Any) -> Any:
    """timm's model with its final norm before the pooling, wherever it had it."""
    if isinstance(own.norm, nn.Identity):
        own.norm, own.fc_norm = own.fc_norm, own.norm
    return own


def encoder_and_timm(name: str, options: dict[str, Any]) -> tuple[ImageEncoder, Any]:
    """The encoder and a model made by timm with the same random weights."""
    torch.manual_seed(0)
    encoder = ImageEncoder(name, 32, {**TINY, **options}, "learned").eval()
    own = timm.create_model(name, num_classes=0, img_size=32, **TINY, **options).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.3)
    encoder.vit.load_state_dict(normed(own).state_dict())
    return encoder, own


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_all_patches_equal_timms_own_forward(name: str, options: dict[str, Any]) -> None:
    encoder, own = encoder_and_timm(name, options)
    image = torch.randn(3, 3, 32, 32)
    expected = own.forward_features(image)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (3, encoder.prefix + encoder.num_patches, encoder.width)
    assert encoder.grid == (4, 4)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_another_size_has_its_positions_resampled_and_its_own_is_as_before(
    name: str, options: dict[str, Any]
) -> None:
    encoder, own = encoder_and_timm(name, options)
    both = ImageEncoder(name, 32, {**TINY, **options}, "learned", eval_scale=1.5).eval()
    assert both.grid == (4, 4) and both.eval_size == 48 and encoder.eval_size == 32
    both.vit.load_state_dict(own.state_dict())
    image = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(both(image), encoder(image), rtol=1e-5, atol=1e-6)
    keep = torch.tensor([[0, 3, 9], [1, 2, 15], [4, 5, 6]])
    torch.testing.assert_close(both(image, keep), encoder(image, keep), rtol=1e-5, atol=1e-6)

    large = normed(timm.create_model(name, num_classes=0, img_size=48, **TINY, **options).eval())
    state = own.state_dict()
    prefix = 0 if options.get("no_embed_class") else encoder.prefix
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], [6, 6], num_prefix_tokens=prefix
    )
    large.load_state_dict(state)
    image = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(both(image), large.forward_features(image), rtol=1e-4, atol=1e-5)


class Chosen(nn.Module):
    """In the place of timm's own patch dropout: keeps the patches it is told to."""

    def __init__(self, keep: Tensor, prefix: int) -> None:
        super().__init__()
        self.keep, self.prefix = keep, prefix

    def forward(self, x: Tensor) -> Tensor:
        rows = [
            torch.cat([row[: self.prefix], row[self.prefix :][index]])
            for row, index in zip(x, self.keep, strict=True)
        ]
        return torch.stack(rows)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_kept_subset_equals_timm_with_the_others_dropped(
    name: str, options: dict[str, Any]
) -> None:
    encoder, own = encoder_and_timm(name, options)
    image = torch.randn(3, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(3)])
    own.patch_drop = Chosen(keep, encoder.prefix)
    expected = own.forward_features(image)
    got = encoder(image, keep)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.shape == (3, encoder.prefix + 5, encoder.width)


def test_hidden_patches_cannot_be_seen() -> None:
    encoder, _ = encoder_and_timm(NAME, {})
    image = torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[0, 1, 6], [3, 9, 15]])
    before = encoder(image, keep)
    spoiled = image.clone()
    for row in range(2):
        for patch in set(range(16)) - set(keep[row].tolist()):
            y, x = divmod(patch, 4)
            spoiled[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 99.0
    torch.testing.assert_close(encoder(spoiled, keep), before, rtol=0, atol=0)


def test_sine_cosine_positions_start_at_half_scale_and_learn() -> None:
    encoder = ImageEncoder(NAME, 32, TINY, "sincos")
    table = encoder.vit.pos_embed
    torch.testing.assert_close(table[0, 1:], 0.5 * sincos_2d((4, 4), 24))
    assert table.requires_grad


def test_sine_cosine_positions_follow_their_formula() -> None:
    table = sincos_2d((3, 5), 18)  # 18: four quarters of 4, and 2 left over
    assert table.shape == (15, 18)
    for n in range(15):
        for i in range(4):
            omega = 1 / 10000 ** (i / 4)
            for part, angle in enumerate((n % 5 * omega, n // 5 * omega)):
                value = torch.tensor(angle)
                assert abs(float(table[n, 8 * part + i] - value.sin())) < 1e-5
                assert abs(float(table[n, 8 * part + 4 + i] - value.cos())) < 1e-5
    assert not table[:, 16:].any()
    assert len({tuple(row.tolist()) for row in table}) == 15


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_cut_encoder_is_the_first_blocks_and_the_norm(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**TINY, "depth": 3, **options}
    own: Any = timm.create_model(name, num_classes=5, img_size=32, **options).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.3)
    file = tmp_path / "weights.safetensors"
    save_file(own.state_dict(), file)
    image = torch.randn(3, 3, 32, 32)
    x = own.norm_pre(own._pos_embed(own.patch_embed(image)))
    expected = normed(own).norm(own.blocks[1](own.blocks[0](x)))
    cut = ImageEncoder(name, 32, options, "learned", str(file), layers=2).eval()
    torch.testing.assert_close(cut(image), expected, rtol=1e-4, atol=1e-5)
    assert len(cut.vit.blocks) == 2
    for layers in (0, 3, 7):
        whole = ImageEncoder(name, 32, options, "learned", str(file), layers=layers).eval()
        torch.testing.assert_close(whole(image), own.forward_features(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tinny_patch16", {}, "timm has no model 'vit_tinny_patch16'"),
        ("resnet18", {}, "cannot make 'resnet18'|not a plain ViT"),
        (NAME, {"global_pool": "map"}, "not a plain ViT with a"),
        (NAME, {"class_token": False, "global_pool": "avg"}, "not a plain ViT with a"),
        (NAME, {"wings": 2}, "timm cannot make"),
        (NAME, {"embed_dim": 25, "num_heads": 2}, "timm cannot make"),
    ],
)
def test_what_is_not_a_plain_vit_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageEncoder(name, 32, {**({} if name == "resnet18" else TINY), **options}, "learned")
