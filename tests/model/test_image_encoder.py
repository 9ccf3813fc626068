"""The image encoder against timm's own forward, and weights from local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.image_encoder import ImageEncoder, resolve_image_encoder, sincos_2d

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
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_the_frozen_blocks_began_is_gone_on_with(
    frozen: int, name: str, options: dict[str, Any]
) -> None:
    encoder, _ = encoder_and_timm(name, options)
    encoder.freeze(frozen)
    image = torch.randn(3, 3, 32, 32)
    begun = encoder.begin(image)
    assert not begun.requires_grad
    wrong = torch.zeros_like(image)
    torch.testing.assert_close(encoder(wrong, begun=begun), encoder(image), rtol=0, atol=0)
    encoder(wrong, begun=begun).square().sum().backward()
    expected = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    encoder(image).square().sum().backward()
    if frozen:
        for key, gradient in expected.items():
            assert torch.equal(gradient, encoder.get_parameter(key).grad), key
        assert not any(key.startswith("vit.blocks.0.") for key in expected)


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


def test_weights_of_a_cut_encoder_are_still_of_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = pretrained(file, 0, False)  # of two blocks
    encoder = ImageEncoder(NAME, 32, TINY, "learned", str(file), layers=1)
    own = encoder.vit.state_dict()
    assert set(own) == {k for k in state if not k.startswith("blocks.1.")}
    assert all(torch.equal(value, state[key]) for key, value in own.items())
    with pytest.raises(UserError, match="12 are missing, the first is blocks.2.norm1.weight"):
        ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned", str(file), layers=1)


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


def test_frozen_blocks_keep_their_weights_and_change_no_other_gradient() -> None:
    options = {**TINY, "depth": 3}
    encoder = ImageEncoder(NAME, 32, options, "learned")
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for blocks in (0, 2):
        encoder.freeze(blocks)
        encoder.zero_grad()
        encoder(x).square().sum().backward()
        gradients.append({k: p.grad for k, p in encoder.vit.named_parameters() if p.requires_grad})
    whole, upper = gradients
    assert all(name.startswith(("blocks.2.", "norm.")) for name in upper)
    assert set(whole) - set(upper) >= {"pos_embed", "cls_token", "patch_embed.proj.weight"}
    for name, gradient in upper.items():
        torch.testing.assert_close(gradient, whole[name])
    encoder.freeze(0)
    assert all(p.requires_grad for p in encoder.parameters())
    assert encoder.frozen_parameters() == []
    with pytest.raises(UserError, match="frozen_blocks=4 is more than the image encoder's 3"):
        encoder.freeze(4)


def test_of_a_cut_encoder_as_many_blocks_are_frozen_as_are_left() -> None:
    encoder = ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned", layers=2)
    for asked, frozen in ((0, 0), (1, 1), (2, 2), (3, 2)):
        encoder.freeze(asked)
        assert encoder.frozen == frozen
        kept = {
            n.split(".")[1]
            for n, p in encoder.vit.named_parameters()
            if "blocks" in n and not p.requires_grad
        }
        assert kept == {str(i) for i in range(frozen)}
    with pytest.raises(UserError, match="frozen_blocks=4 is more than the image encoder's 3"):
        encoder.freeze(4)


def test_blocks_frozen_for_a_while_take_no_gradient_but_hand_a_mask_token_its_own() -> None:
    encoder = ImageEncoder(NAME, 32, {**TINY, "depth": 3}, "learned")
    x = torch.randn(2, 3, 32, 32)
    encoder.freeze(2, for_good=False)
    assert all(p.requires_grad for p in encoder.parameters())
    encoder(x).square().sum().backward()
    frozen = {id(p) for p in encoder.frozen_parameters()}
    with_gradient = {id(p) for p in encoder.parameters() if p.grad is not None}
    assert frozen and frozen | with_gradient == {id(p) for p in encoder.parameters()}
    assert not frozen & with_gradient
    gradients = []
    for blocks in (0, 2):
        encoder.freeze(blocks, for_good=False)
        token = torch.zeros(encoder.width, requires_grad=True)
        hidden = torch.zeros(2, encoder.num_patches, dtype=torch.bool)
        hidden[:, 1] = True
        encoder(x, hidden=hidden, mask_token=token).square().sum().backward()
        gradients.append(token.grad)
    assert gradients[0] is not None
    torch.testing.assert_close(*gradients)
