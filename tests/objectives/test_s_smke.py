"""S-SMKE: the shared block, the teacher, its bank, and the distillation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from gradients import assert_same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_batch, make_model, make_tokenizer, pad, teacher_weights
from torch import Tensor

from vicvlm_cli.checkpoint import load_model, save_model
from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.objectives import create_objective, losses
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.s_smke import Teacher
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
BOTH = {"itc", "kd"}


@pytest.fixture(scope="module")
def weights() -> str:
    return teacher_weights()


def make(weights: str, fusion: str = "shared", **options: Any) -> Any:
    options = {"teacher": "test_vit", "teacher_weights": weights, "bank_size": 8, **options}
    config = TrainConfig(
        objective="s_smke", options=options, losses={name: LossConfig() for name in BOTH}
    )
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()


def test_the_shared_block_is_timms_and_both_its_outputs_come_out() -> None:
    model, batch = make_model(fusion="shared"), make_batch()
    assert model.shared is not None and not model.can_match
    image = model.encode_image(batch.image)
    tokens = model.image_encoder(model.normalize(batch.image))
    shared = model.shared
    inside = shared.image_input(tokens) + shared.kind_embedding[1] * shared.kind_scale
    torch.testing.assert_close(image.tokens, shared.block(inside))
    assert image.attended is not None and image.attended.shape == (6, 32)
    expected = inside + shared.block.ls1(shared.block.attn(shared.block.norm1(inside)))
    torch.testing.assert_close(image.attended, expected[:, 0])
    length = torch.ones(6)
    torch.testing.assert_close(image.features.norm(dim=1), length)
    assert torch.allclose(shared.kind_scale, torch.tensor(1e-5))


def test_padding_changes_no_feature_of_a_shared_block() -> None:
    model, batch = make_model(fusion="shared"), make_batch()
    longer = pad(batch, 5)
    one = model.encode_text(batch.input_ids, batch.attention_mask)
    two = model.encode_text(longer.input_ids, longer.attention_mask)
    torch.testing.assert_close(one.features, two.features)
    torch.testing.assert_close(one.attended, two.attended)


def test_the_teacher_is_timms_own_forward_and_never_learns(weights: str) -> None:
    teacher = Teacher("test_vit", weights).train()
    network = timm.create_model("test_vit", num_classes=0).eval()
    own = {k: v for k, v in timm.models.load_state_dict(weights).items() if "head" not in k}
    network.load_state_dict(own)
    image = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    expected = network((image / 255 - 0.5) / 0.5)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(teacher(image), expected, rtol=1e-4, atol=1e-5)
    assert not teacher.network.training and not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.rand(2, 3, 32, 32) * 255).requires_grad  # any size


def test_a_teacher_may_give_another_width_than_timm_says(tmp_path: Path) -> None:
    network = timm.create_model("mobilenetv3_small_050")
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    teacher = Teacher("mobilenetv3_small_050", str(tmp_path / "m.safetensors"))
    assert teacher.width != network.num_features
    assert teacher(torch.rand(2, 3, 32, 32) * 255).shape == (2, teacher.width)


def teacher_folder(folder: Path, weights: str, **card: Any) -> str:
    """A model as it would lie on a disk."""
    folder.mkdir()
    shutil.copy(weights, folder / "model.safetensors")
    text = json.dumps({"architecture": "test_vit", "pretrained_cfg": card})
    (folder / "config.json").write_text(text, "utf-8")
    return str(folder)


def test_a_teacher_by_folder_is_that_by_name_and_file(weights: str, tmp_path: Path) -> None:
    image = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    named = Teacher("test_vit", weights)
    plain = teacher_folder(tmp_path / "plain", weights)
    assert torch.equal(Teacher(plain)(image), named(image))
    assert torch.equal(make("", teacher=plain).teacher(image), named(image))
    other = tmp_path / "other.safetensors"  # that is named is taken instead of the folder's own
    torch.manual_seed(4)
    save_file(timm.create_model("test_vit").state_dict(), other)
    expected = Teacher("test_vit", str(other))(image)
    assert not torch.allclose(expected, named(image))
    assert torch.equal(Teacher(plain, str(other))(image), expected)


def test_the_card_of_a_teachers_folder_says_what_it_sees(weights: str, tmp_path: Path) -> None:
    card = {"mean": [0.1, 0.2, 0.3], "std": [1, 0.5, 0.25], "input_size": [3, 96, 128]}
    teacher = Teacher(teacher_folder(tmp_path / "a", weights, **card))
    assert teacher.size == (96, 128)
    torch.testing.assert_close(teacher.mean.flatten(), 255 * torch.tensor(card["mean"]))
    torch.testing.assert_close(teacher.std.flatten(), 255 * torch.tensor(card["std"]))
    network = timm.create_model("test_vit", num_classes=0, img_size=(96, 128))
    state = timm.models.vision_transformer.checkpoint_filter_fn(
        timm.models.load_state_dict(weights), network
    )
    network.load_state_dict({k: v for k, v in state.items() if "head" not in k})
    image = torch.randint(256, (2, 3, 96, 128), dtype=torch.uint8)
    expected = network.eval()((image - teacher.mean) / teacher.std)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(teacher(image), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_that_cannot_teach_is_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path} has no config.json that names a timm"):
        make("", teacher=str(tmp_path))
    folder = teacher_folder(tmp_path / "a", weights, input_size=[3, 8, 8])
    with pytest.raises(UserError, match="weights of the teacher 'test_vit' could not be loaded"):
        make("", teacher=folder)
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{folder} holds no .safetensors or .pth weights"):
        make("", teacher=folder)
    words = "timm has no model '.*/none' to teach, and there is no such folder: try "
    with pytest.raises(UsageError, match=words):
        make("", teacher=str(tmp_path / "none"))


def test_a_checkpoint_rebuilds_the_cut_encoder_and_older_ones_the_whole(tmp_path: Path) -> None:
    size = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    image = make_batch().image
    path = tmp_path / "model.safetensors"
    for layers, blocks in ((2, 2), (0, 3)):
        model = make_model(fusion="shared", image_options=size, image_layers=layers)
        facts = {"config": {}, "data": {}, "objective": "s_smke"}
        save_model(path, model, make_tokenizer(), **facts, rerank_weights=RerankWeights())
        loaded = load_model(path, device="cpu").vlm
        assert loaded.config == model.config and loaded.config.image_layers == layers
        assert len(loaded.image_encoder.vit.blocks) == blocks
        assert torch.equal(loaded.encode_image(image).features, model.encode_image(image).features)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    del config["model"]["image_layers"]  # as before there was such a setting
    save_file(load_file(path), path, metadata={**header, "config": json.dumps(config)})
    older = load_model(path, device="cpu").vlm
    assert torch.equal(older.encode_image(image).features, model.encode_image(image).features)


def words_of(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.input_ids, batch.attention_mask


def slow_kd(student: Any, taught: Any, image_id: list[int], bank: list[tuple[int, Any]]) -> Any:
    total = 0.0
    for i, feature in enumerate(student):
        own = (feature @ taught[i]).exp()
        rest = [
            (feature @ taught[j]).exp() for j in range(len(taught)) if image_id[j] != image_id[i]
        ] + [(feature @ x).exp() for number, x in bank if number != image_id[i]]
        total = total - (own / (own + sum(rest))).log()
    return total / len(student)


def test_kd_against_a_slow_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    student, taught, bank = (torch.randn(n, 5, generator=generator) for n in (4, 4, 3))
    image_id, bank_id = [1, 2, 1, 3], [2, 9, 9]
    student.requires_grad_()
    ids = torch.tensor(image_id)
    fast = losses.kd(
        student @ torch.cat([taught, bank]).T, ids, torch.cat([ids, torch.tensor(bank_id)])
    )
    (gradient,) = torch.autograd.grad(fast, student)
    slow = slow_kd(student, taught, image_id, list(zip(bank_id, bank, strict=True)))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow, student)[0])


@pytest.mark.parametrize("more", [False, True])
def test_both_losses_are_means_of_two_sides(weights: str, more: bool) -> None:
    objective, batch = make(weights).eval(), make_batch()
    batch.image_id[3] = batch.image_id[1]
    model, ids = objective.model, batch.image_id
    with torch.no_grad():
        for scale, value in ((objective.attended_scale, 1.0), (objective.kd_scale, 2.0)):
            scale.fill_(value)  # all three temperatures start as one
        objective.bank.push(objective.teacher(255 - batch.image[:3]), torch.tensor([8, 1, 9]))
    image, text = model.encode_image(batch.image), model.encode_text(*words_of(batch))
    heads = objective.image_head(image.attended), objective.text_head(text.attended)
    first, second = (x / x.norm(dim=1, keepdim=True) for x in heads)
    attended = objective.attended_scale.exp() * first @ second.T
    final = model.logit_scale.exp() * image.features @ text.features.T
    guesses = [losses.itc_trivial(6, 6)] * 2
    if more:  # of the final output alone: the next row's caption as a further one of each picture
        batch.more_ids, batch.more_mask = (x.roll(-1, 0)[:, None] for x in words_of(batch))
        final = torch.cat([final, final.roll(-1, 1)], 1)
        guesses[0] = losses.itc_trivial(6, 12)
    values, trivial = objective(batch, Noise(0, 0, CPU), BOTH)
    assert_same(values["itc"], (losses.itc(final, ids) + losses.itc(attended, ids)) / 2, objective)
    assert float(trivial["itc"]) == pytest.approx(float(guesses[0] + guesses[1]) / 2)

    taught = objective.teacher(batch.image)
    bank = list(zip([8, 1, 9], objective.bank.features[:3], strict=True))
    sides = []
    for encoded in (image, text):
        student = objective.kd_head(encoded.tokens[:, 0])
        student = objective.kd_scale.exp() * student / student.norm(dim=1, keepdim=True)
        sides.append(slow_kd(student, taught, ids.tolist(), bank))
    assert float((sides[0] - sides[1]).detach().abs()) > 1e-3
    assert_same(values["kd"], (sides[0] + sides[1]) / 2, objective)
    assert float(trivial["kd"]) == pytest.approx(math.log(6 + 3))


def test_the_bank_is_of_earlier_steps_and_of_training_only(weights: str) -> None:
    objective, batch = make(weights), make_batch()

    def candidates() -> float:
        _, trivial = objective(batch, Noise(0, 0, CPU), BOTH)
        return round(math.exp(float(trivial["kd"])))

    # Two batches of six in the first step: with accumulated gradients both see the same.
    assert candidates() == candidates() == 6
    objective.after_step()
    assert candidates() == 6 + 8
    objective.eval().after_step()
    number = int(objective.bank.pushed)
    assert candidates() == 14
    objective.after_step()
    assert int(objective.bank.pushed) == number


def test_a_picture_is_not_compared_with_its_own_earlier_self(weights: str) -> None:
    objective, batch = make(weights, bank_size=60).eval(), make_batch(1)

    def kd() -> float:
        return float(objective(batch, Noise(0, 0, CPU), BOTH)[0]["kd"].detach())

    assert kd() == 0  # nothing else to be mistaken for
    objective.bank.push(objective.teacher(batch.image), batch.image_id)
    assert kd() == 0
    objective.bank.push(objective.teacher(batch.image), batch.image_id + 100)
    assert kd() == pytest.approx(math.log(2), rel=1e-4)  # the same, under another name


def test_what_is_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="s_smke learns from a teacher: name a timm model with"):
        make(weights, teacher="")
    with pytest.raises(UsageError, match=r"options.bank_size must be 0 or more"):
        make(weights, bank_size=-1)
    with pytest.raises(UsageError, match="timm has no model 'test_vitt' to teach"):
        make(weights, teacher="test_vitt")
    with pytest.raises(UserError, match="there are no teacher weights at"):
        make(str(tmp_path / "none.safetensors"))
    wrong = tmp_path / "wrong.safetensors"
    save_file({"a": torch.zeros(1)}, wrong)
    with pytest.raises(UserError, match="does not hold the weights of the teacher 'test_vit'"):
        make(str(wrong))
    wrong.write_text("words", "utf-8")
    with pytest.raises(UserError, match="the weights of the teacher 'test_vit' could not be"):
        make(str(wrong))
    with pytest.raises(UsageError, match="s_smke needs the shared block"):
        make(weights, fusion="none")
