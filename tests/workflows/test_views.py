"""Views that the frozen blocks see before a training: what they are, and that steps get them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import make_batch, make_model, make_tokenizer
from tiny_training import BARE, QUIET, Heard, rows, run
from torch import Tensor

from vicvlm_cli.data.batches import Rows
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.settings import DataConfig, TrainConfig
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.train import pretrain
from vicvlm_cli.workflows.views import FILE_NAME, Views, drop_views, make_views

CPU = torch.device("cpu")
DATA = DataConfig(crop_scale=0.6, color_jitter=0.3)


def make_rows(scenes: Path) -> Rows:
    split = PreparedDataset.open(scenes).split("val")
    return Rows(split, make_tokenizer(), 36, 24)


def make(scenes: Path, folder: Path, number: int = 4, **options: Any) -> tuple[Any, Views]:
    """A model with a frozen block of two, and the views of 16 pictures."""
    size = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = make_model(image_options=size)
    model.image_encoder.freeze(1)
    config = TrainConfig(frozen_blocks=1, cached_views=number)
    options = {"resumed": False, "progress": QUIET, **options}
    accelerator = Accelerator(cpu=True)
    rows = make_rows(scenes)
    return model, make_views(accelerator, model, rows, config, DATA, folder, **options)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_step_gets_views_and_what_the_frozen_blocks_made_of_them(
    scenes: Path, tmp_path: Path
) -> None:
    model, views = make(scenes, tmp_path)
    rows = make_rows(scenes)
    seen: dict[int, list[Tensor]] = {}
    for step in range(24):
        batch = make_batch(6, size=36)
        batch.image_id = torch.tensor([3, 5, 3, 8, 13, 3])
        batch.image = rows.images(batch.image_id.numpy())
        batch.flip_ok = torch.tensor([True, True, False, True, True, False])
        batch = views.choose(batch, step, CPU)
        assert batch.image.shape == (6, 3, 32, 32)
        begun = model.image_encoder.begin(model.normalize(batch.image))
        assert batch.begun is not None and batch.begun.dtype == torch.bfloat16
        torch.testing.assert_close(batch.begun.float(), begun, rtol=1e-2, atol=1e-2)
        for row in range(6):
            seen.setdefault(row, []).append(batch.image[row])
    kinds = [len({tuple(x.flatten().tolist()) for x in seen[row]}) for row in range(6)]
    assert kinds[0] == kinds[1] == 4  # all the views of a picture, in so many steps
    assert kinds[2] == 2  # never a mirrored one where the caption names a side


def test_every_second_view_is_mirrored_and_none_without_flips() -> None:
    image = make_batch(3).image
    for flip in (True, False):
        views = Views(8, 2, 32, DataConfig(crop_scale=1.0, flip=flip), seed=0)
        picture = torch.tensor([1, 4, 6])
        plain = views.pixels(image, picture, torch.zeros(3, dtype=torch.long))
        other = views.pixels(image, picture, torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(plain, image.float())
        torch.testing.assert_close(other, image.flip(3).float() if flip else image.float())


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_file_is_the_same_whatever_the_block_and_is_made_anew_for_a_new_run(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    make(scenes, tmp_path, progress=heard)
    assert "4 views of each picture go through 1 frozen blocks first" in heard.notes[0]
    file = tmp_path / FILE_NAME
    made = file.read_bytes()
    monkeypatch.setattr("vicvlm_cli.workflows.views.BLOCK", 12)
    make(scenes, tmp_path, resumed=True)
    assert file.read_bytes() == made
    file.write_bytes(made[:-2])  # damaged: again
    make(scenes, tmp_path, resumed=True)
    assert file.read_bytes() == made
    file.write_bytes(bytes(len(made)))
    make(scenes, tmp_path)
    assert file.read_bytes() == made
    make(scenes, tmp_path, number=2)
    assert len(file.read_bytes()) < len(made)


@pytest.mark.usefixtures("fresh_accelerator")
def test_processes_choose_as_one_would_of_the_joint_batch(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, views = make(scenes, tmp_path)
    batch = make_batch(6, size=36)
    batch.flip_ok[::2] = False
    joint = views.choose(batch, 3, CPU)
    monkeypatch.setattr("vicvlm_cli.objectives.ranks.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("vicvlm_cli.objectives.ranks.rank", lambda rank=rank: rank)
        mine = slice(3 * rank, 3 * rank + 3)
        own = views.choose(batch.rows(mine), 3, CPU)
        assert joint.begun is not None and own.begun is not None
        assert torch.equal(own.begun, joint.begun[mine])
        assert torch.equal(own.image, joint.image[mine])
    assert batch.begun is None  # what the loader gave waits as it was


@pytest.mark.usefixtures("fresh_accelerator")
def test_views_take_of_the_time_and_not_of_the_schedule(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("vicvlm_cli.workflows.loop.clock_of", lambda _: lambda: now[0])
    add, made = Metrics.add, make_views

    def step(self: Metrics, *values: Any) -> None:
        add(self, *values)
        now[0] += 3.0

    def slowly(*arguments: Any) -> Views:
        now[0] += 30.0
        return made(*arguments)

    monkeypatch.setattr(Metrics, "add", step)
    monkeypatch.setattr("vicvlm_cli.workflows.loop.make_views", slowly)
    settings = ["pretrain.frozen_blocks=1", "pretrain.cached_views=2", "pretrain.epochs=1000"]
    result = run(scenes, tmp_path / "a", *settings, "pretrain.max_minutes=1")
    assert result.steps == 10 and result.seconds == 60.0
    assert [row["progress"] for row in rows(result.run)] == [1.0]
    with pytest.raises(UserError, match=r"the views took 0.5 minutes, and max_minutes is 0.5"):
        run(scenes, tmp_path / "b", *settings, "pretrain.max_minutes=0.5")
    assert not list((tmp_path / "b").glob("views*"))


def test_what_is_left_of_a_killed_process_goes(tmp_path: Path) -> None:
    (tmp_path / "views.npy.123.tmp").touch()
    (tmp_path / "views.npy").touch()
    (tmp_path / "model.safetensors").touch()
    drop_views(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_cannot_be_cached_is_said(
    scenes: Path, tmp_path: Path, fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no block is frozen: set frozen_blocks too"):
        run(scenes, tmp_path / "a", "pretrain.cached_views=4")
    with pytest.raises(UsageError, match="frozen_epochs is how long blocks are frozen, and no"):
        run(scenes, tmp_path / "a", "pretrain.frozen_epochs=4")
    assert not (tmp_path / "a").exists()
    chosen = ("objective=vilt", "cached_views=4", "frozen_blocks=1")
    settings = [*BARE, *(f"pretrain.{setting}" for setting in chosen)]
    with pytest.raises(UsageError, match="vilt reads words and patches together"):
        pretrain(scenes, overrides=settings, output=tmp_path / "b", progress=QUIET)
    usage = shutil.disk_usage(tmp_path)._replace(free=5999)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room there, or lower cached_views"):
        make(scenes, tmp_path)
    assert not list(tmp_path.glob("views*"))
