"""Blocks that are frozen for good or for a while, in whole trainings."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import teacher_weights
from tiny_training import BARE, QUIET, TWO_BLOCKS, Heard, rows, run, weights
from torch import Tensor

from vicvlm_cli.errors import UserError
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.clip import CLIP
from vicvlm_cli.workflows.train import finetune, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def train(scenes: Path, folder: Path, *settings: str) -> None:
    """A run of 24 steps, the lower of two blocks frozen."""
    frozen = (TWO_BLOCKS, "pretrain.epochs=4", "pretrain.frozen_blocks=1")
    overrides = [*BARE, *frozen, *settings]
    pretrain(scenes, overrides=overrides, output=folder, progress=QUIET)


def test_frozen_blocks_come_out_as_they_went_in(scenes: Path, tmp_path: Path) -> None:
    begun = run(scenes, tmp_path / "begun", TWO_BLOCKS, "pretrain.epochs=0.2")
    tuned = finetune(
        begun.checkpoint,
        scenes,
        overrides=["finetune.frozen_blocks=1"],
        output=tmp_path / "tuned",
        progress=QUIET,
    )
    before, after = weights(begun.run), weights(tuned.run)
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert {k for k in before if k.startswith("image_encoder.vit.blocks.0.")} < same
    assert "image_encoder.vit.patch_embed.proj.weight" in same
    assert not any(k.startswith("image_encoder.vit.blocks.1.") for k in same)


def test_a_preset_that_freezes_more_blocks_than_a_cut_encoder_has_trains_it(
    scenes: Path, tmp_path: Path
) -> None:
    eight = "model.image_options={patch_size = 8, embed_dim = 24, depth = 8, num_heads = 2}"
    method = ("pretrain.objective=s_smke", "pretrain.options.teacher=test_vit")
    weighed = f"pretrain.options.teacher_weights={teacher_weights()}"
    frozen = ("pretrain.frozen_blocks=8", "pretrain.cached_views=2", "pretrain.epochs=0.5")
    heard = Heard()
    begun = pretrain(
        scenes,
        overrides=[*BARE, eight, *method, weighed, *frozen],
        output=tmp_path / "begun",
        progress=heard,
    )
    assert any("2 views of each picture go through 6 frozen blocks first" in x for x in heard.notes)
    assert {row["frozen_blocks"] for row in rows(begun.run)} == {6}
    tuned = finetune(
        begun.checkpoint,
        scenes,
        overrides=["finetune.frozen_blocks=8", "finetune.epochs=0.5"],
        output=tmp_path / "tuned",
        progress=QUIET,
    )
    before, after = weights(begun.run), weights(tuned.run)
    of_blocks = "image_encoder.vit.blocks."
    assert {k.split(".")[3] for k in before if k.startswith(of_blocks)} == set("012345")
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith(of_blocks))
    assert not torch.equal(before["image_projection.weight"], after["image_projection.weight"])
    with pytest.raises(UserError, match="frozen_blocks=9 is more than the image encoder's 8 blo"):
        finetune(
            begun.checkpoint,
            scenes,
            overrides=["finetune.frozen_blocks=9"],
            output=tmp_path / "wrong",
            progress=QUIET,
        )


def test_frozen_random_blocks_are_warned_of(scenes: Path, tmp_path: Path) -> None:
    heard = Heard()
    overrides = [*BARE, "pretrain.objective=clip", "pretrain.epochs=0.2"]
    frozen = [*overrides, "pretrain.frozen_blocks=1"]
    pretrain(scenes, overrides=frozen, output=tmp_path / "a", progress=heard)
    assert any("random weights are frozen" in note for note in heard.notes)
    heard = Heard()
    pretrain(scenes, overrides=overrides, output=tmp_path / "b", progress=heard)
    assert not any("are frozen" in note for note in heard.notes)


@pytest.mark.parametrize(("views", "epochs"), [(0, 0.5), (2, 0.5), (2, 1.5)])
def test_blocks_frozen_for_a_part_of_the_run_train_from_there_on(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int, epochs: float
) -> None:
    seen: list[tuple[Tensor, ...]] = []
    kept_views: list[bool] = []
    real = CLIP.after_step

    def after_step(self: CLIP) -> None:
        vit: Any = self.model.image_encoder.vit
        kept = (vit.patch_embed.proj.weight, vit.blocks[0].mlp.fc1.weight)
        kept_views.append((tmp_path / "run" / "views.npy").exists())
        seen.append(tuple(x.detach().clone() for x in (*kept, vit.blocks[1].mlp.fc1.weight)))
        real(self)

    monkeypatch.setattr(CLIP, "after_step", after_step)
    train(
        scenes,
        tmp_path / "run",
        *("pretrain.objective=clip", f"pretrain.cached_views={views}"),
        f"pretrain.frozen_epochs={epochs}",
    )
    assert len(seen) == 24
    thawed = 3 if epochs == 0.5 else 6  # steps; never later than after a quarter of the run
    for name in range(2):  # of what is frozen
        same = [torch.equal(a[name], b[name]) for a, b in itertools.pairwise(seen)]
        assert same == [True] * (thawed - 1) + [False] * (24 - thawed)
    assert not any(torch.equal(a[2], b[2]) for a, b in itertools.pairwise(seen))
    assert kept_views == [views > 0] * thawed + [False] * (24 - thawed)


def test_frozen_blocks_and_a_contrast_over_several_batches(scenes: Path, tmp_path: Path) -> None:
    settings = ("pretrain.objective=clip", "pretrain.contrastive_batch=32")
    train(scenes, tmp_path / "kept", *settings)
    train(scenes, tmp_path / "thawed", *settings, "pretrain.frozen_epochs=0.5")
    kept, thawed = weights(tmp_path / "kept"), weights(tmp_path / "thawed")
    name = "image_encoder.vit.blocks.0.mlp.fc1.weight"  # as it began, and trained
    assert thawed[name].isfinite().all() and not torch.equal(thawed[name], kept[name])


def test_blocks_that_are_frozen_for_a_while_keep_their_weights_whatever_the_method(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, dict[bool, float]]] = []
    wanted: list[bool] = []  # gradients, of the frozen block
    real = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
        result = real(self, *arguments)
        vit = made[0].model.image_encoder.vit
        wanted.append(vit.blocks[0].mlp.fc1.weight.requires_grad)
        rates = {group["thaws"]: group["lr"] for group in self.param_groups}
        seen.append((vit.blocks[0].mlp.fc1.weight.detach().clone(), rates))
        return result

    made: list[Any] = []

    def create(*arguments: Any) -> torch.nn.Module:
        made.append(create_objective(*arguments))
        return made[0]

    monkeypatch.setattr("vicvlm_cli.workflows.run.create_objective", create)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    # MAMO's mask tokens come in below the frozen block, and learn through it.
    settings = ("pretrain.objective=mamo", "pretrain.warmup=0.2", "pretrain.frozen_epochs=0.5")
    train(scenes, tmp_path / "run", *settings)
    same = [torch.equal(a, b) for (a, _), (b, _) in itertools.pairwise(seen)]
    assert same == [True] * 2 + [False] * 21
    assert wanted == [False] * 3 + [True] * 21
    # What thaws warms up from there; the rest has by then almost done so.
    shares = [rates[True] / rates[False] for _, rates in seen[3:]]
    assert shares[0] < 0.1 and shares == sorted(shares)
    assert shares[-12:] == pytest.approx([1] * 12)
