"""The parts of the training loop: rates, parameter groups, augmentation, metrics."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tiny import make_batch, make_model, make_tokenizer
from tiny_training import QUIET, Heard, run
from torch import nn

from vicvlm_cli.data.batches import Plan
from vicvlm_cli.errors import UserError
from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import DataConfig, LossConfig, TrainConfig
from vicvlm_cli.workflows import loop
from vicvlm_cli.workflows.loop import (
    Agreements,
    agrees_anyway,
    augment,
    lr_factor,
    parameter_groups,
    total_steps,
)
from vicvlm_cli.workflows.metrics import Metrics


def test_the_rate_warms_up_and_falls_as_a_cosine() -> None:
    config = TrainConfig(warmup=0.2, final_lr=0.1)
    assert lr_factor(0.0, config) == pytest.approx(1e-3)  # never quite zero
    assert lr_factor(0.1, config) == pytest.approx(0.5)
    assert lr_factor(0.2, config) == pytest.approx(1.0)
    assert lr_factor(0.6, config) == pytest.approx(0.55)
    assert lr_factor(0.4, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(1.0, config) == pytest.approx(0.1)
    assert lr_factor(0.0, TrainConfig(warmup=0.0)) == pytest.approx(1.0)
    assert lr_factor(1.0, TrainConfig(warmup=1.0, final_lr=0.3)) == pytest.approx(1.0)


def test_what_thaws_warms_up_from_there() -> None:
    config = TrainConfig(warmup=0.1, final_lr=0.05)
    assert lr_factor(0.4, config, begins=0.4) == pytest.approx(0, abs=1e-2)
    half = lr_factor(0.45, config) / 2
    assert lr_factor(0.45, config, begins=0.4) == pytest.approx(half)
    for progress in (0.5, 0.7, 1.0):
        usual = lr_factor(progress, config)
        assert lr_factor(progress, config, begins=0.4) == pytest.approx(usual)
    assert lr_factor(0.1, config) == 1 and lr_factor(1, config) == pytest.approx(0.05)


def test_the_warm_up_has_a_least_number_of_steps() -> None:
    config = TrainConfig(warmup=0.1, warmup_steps=20, final_lr=1.0)
    # A long run: the share of it takes more steps than that.
    assert lr_factor(0.05, config, step=500) == pytest.approx(0.5)
    # A run of 100 steps: its tenth is over after 10.
    assert lr_factor(0.10, config, step=9) == pytest.approx(0.5)
    assert lr_factor(0.19, config, step=19) == pytest.approx(1.0)
    # A run of 30: a third of it, not two.
    assert lr_factor(1 / 6, config, step=5) == pytest.approx(0.5)
    assert lr_factor(1 / 3, config, step=10) == pytest.approx(1.0)
    # What thaws late warms up by the share alone.
    assert lr_factor(0.45, config, begins=0.4, step=45) == pytest.approx(0.5)
    # Early, the steps bound it as well: a run of 40 that thaws after 10.
    assert lr_factor(0.30, config, begins=0.25, step=12) == pytest.approx(0.5)
    assert lr_factor(0.35, config, begins=0.25, step=12) == pytest.approx(1.0)
    assert lr_factor(0.30, replace(config, warmup=0.01), begins=0.25, step=11) == pytest.approx(0.9)


def test_steps_are_those_of_all_epochs() -> None:
    plan = Plan(tuple([1] * 50), "one", 8, 0)  # six batches an epoch
    assert total_steps(plan, TrainConfig(epochs=3)) == 18
    assert total_steps(plan, TrainConfig(epochs=3, accumulate=4)) == 5
    assert total_steps(plan, TrainConfig(epochs=0.5)) == 3
    assert total_steps(plan, TrainConfig(epochs=0.001)) == 1


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("image_lr", [0.0, 5e-5])
def test_groups_hold_every_parameter_once(fusion: str, image_lr: float) -> None:
    config = TrainConfig(lr=1e-3, image_lr=image_lr, weight_decay=0.1, losses={"itc": LossConfig()})
    objective = create_objective(make_model(fusion=fusion), make_tokenizer(), config)
    groups = parameter_groups(objective, config)
    placed = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(placed)
    kinds = {id(p): type(m) for m in objective.modules() for p in m.parameters(recurse=False)}
    trainable = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == set(placed)
    for name, parameter in trainable.items():
        group = placed[id(parameter)]
        matrix = kinds[id(parameter)] in (nn.Linear, nn.Conv2d) and name.endswith(".weight")
        if name.startswith("model.image_encoder.vit.patch_embed."):
            assert group["weight_decay"] == 0, name
        else:  # the matrices decay; biases, norms, embeddings, tokens and temperature do not
            assert group["weight_decay"] == (0.1 if matrix else 0), name
        of_image = name.startswith("model.image_encoder.") and image_lr
        assert group["lr"] == group["peak_lr"] == (image_lr if of_image else 1e-3)


def test_flips_keep_to_captions_that_allow_them() -> None:
    batch = make_batch(200)
    batch.flip_ok = torch.arange(200) % 2 == 0
    whole = DataConfig(crop_scale=1.0)
    image = augment(batch, 32, whole, Noise(0, 0, torch.device("cpu")))
    kept = (image - batch.image.float()).abs().amax((1, 2, 3)) < 0.01
    mirrored = (image - batch.image.float().flip(-1)).abs().amax((1, 2, 3)) < 0.01
    assert bool((kept ^ mirrored).all())
    assert not bool((mirrored & ~batch.flip_ok).any())
    assert 25 < int(mirrored.sum()) < 75  # about half of the hundred that may
    never = DataConfig(crop_scale=1.0, flip=False)
    image = augment(batch, 32, never, Noise(0, 0, torch.device("cpu")))
    torch.testing.assert_close(image, batch.image.float(), rtol=0, atol=0.01)


def test_augmentation_depends_on_the_noise_of_its_step() -> None:
    batch, cpu = make_batch(), torch.device("cpu")
    data = DataConfig(crop_scale=0.5, color_jitter=0.3)
    images = [augment(batch, 28, data, Noise(0, step, cpu)) for step in (4, 4, 5)]
    assert images[0].shape == (6, 3, 28, 28)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    plain = augment(batch, 28, DataConfig(crop_scale=0.5), Noise(0, 4, cpu))
    assert not torch.equal(images[0], plain)


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {k: torch.tensor(v) for k, v in values.items()}


def test_metrics_average_what_came_since_the_last_line(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    metrics = Metrics(accelerator, tmp_path / "metrics.jsonl", QUIET)
    metrics.add(1, scalars(itc=4.0), scalars(itc=2.0))
    metrics.add(2, scalars(itc=2.0, itm=1.0), scalars(itc=3.0, itm=0.5))
    assert metrics.flush(step=2, lr=0.1) == {"itc": 3.0, "itm": 1.0}
    metrics.add(3, scalars(itc=1.0), scalars(itc=2.5))
    metrics.flush(step=3, lr=0.2)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "kind": "train",
            "step": 2,
            "lr": 0.1,
            "losses": {"itc": 3.0, "itm": 1.0},
            "trivial": {"itc": 2.5, "itm": 0.5},
        },
        {"kind": "train", "step": 3, "lr": 0.2, "losses": {"itc": 1.0}, "trivial": {"itc": 2.5}},
    ]
    summary = metrics.summary({"itm": 0.5, "itc": 1.0, "mlm": 1.0})
    assert [row.name for row in summary] == ["itm", "itc"]  # what was never trained has no row
    assert (summary[1].weight, summary[1].first) == (1.0, 3.0)
    assert (summary[1].last, summary[1].trivial) == (2.0, 2.5)


def test_the_last_value_is_a_mean_of_the_last_five_lines(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    metrics = Metrics(accelerator, tmp_path / "metrics.jsonl", QUIET)
    for step in range(1, 9):
        metrics.add(step, scalars(itc=float(step)), scalars(itc=1.0))
        metrics.flush(step=step)
    (row,) = metrics.summary({"itc": 1.0})
    assert (row.first, row.last) == (1.0, 6.0)
    history = json.loads(json.dumps(metrics.history))
    again = Metrics(accelerator, tmp_path / "m.jsonl", QUIET, history)
    assert again.summary({"itc": 1.0}) == [row]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_step(
    bad: float, accelerator: Accelerator, tmp_path: Path
) -> None:
    metrics = Metrics(accelerator, tmp_path / "metrics.jsonl", QUIET)
    metrics.add(41, scalars(itc=1.0, mim=2.0), scalars(itc=1.0, mim=1.0))
    metrics.add(42, scalars(itc=1.0, mim=bad), scalars(itc=1.0, mim=1.0))
    with pytest.raises(UserError, match="the loss mim is not finite at step 42"):
        metrics.flush(step=42)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lines_that_cannot_be_written_are_one_warning(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    heard, path = Heard(), tmp_path / "gone" / "metrics.jsonl"
    metrics = Metrics(accelerator, path, heard)
    for step in (1, 2):
        metrics.write({"kind": "train", "step": step})
    assert heard.notes == [
        f"warning: {path} cannot be written: No such file or directory; the run goes on, and its "
        "log lacks lines"
    ]
    path.parent.mkdir()
    metrics.write({"kind": "train", "step": 3})
    assert json.loads(path.read_text()) == {"kind": "train", "step": 3}


def test_no_part_of_a_line_spoils_the_next(accelerator: Accelerator, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    heard, path = Heard(), tmp_path / "metrics.jsonl"
    metrics = Metrics(accelerator, path, heard)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, room in ((1, before[0]), (2, 150), (3, before[0])):  # of 120 bytes each
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        metrics.write({"step": step, "note": "x" * 100})
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]
    assert len(heard.notes) == 1


@pytest.mark.parametrize(
    ("processes", "device", "minutes", "anyway"),
    [(1, "cuda", 0, True), (2, "cpu", 0, True), (2, "cuda", 5, True), (2, "cuda", 0, False)],
)
def test_who_agrees_at_every_step(
    processes: int, device: str, minutes: float, anyway: bool
) -> None:
    several: Any = SimpleNamespace(num_processes=processes, device=torch.device(device))
    assert agrees_anyway(several, TrainConfig(max_minutes=minutes)) is anyway


def test_processes_agree_about_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    first = Agreements(7, lambda steps: steps)
    other = Agreements(7, lambda _: first.next - step)  # whatever its own clock says
    asked = []
    for step, seconds in enumerate([30.0, 0.3, 0.3, 0.3, *[0.02] * 24, *[4.0] * 12], start=8):
        now += seconds
        if step >= first.next:
            first.made(step)
            other.made(step)
            asked.append(step)
        assert other.next == first.next
    # At each until they are known to be quick, at last with each line; and again once slow.
    assert asked == [8, 9, 12, 16, 26, 36, *range(38, 48)]


@pytest.mark.parametrize(("seconds", "stopped"), [(4.0, 11), (0.3, 13), (0.01, 20)])
def test_a_signal_is_seen_within_a_second_or_a_step(
    seconds: float,
    stopped: int,
    scenes: Path,
    tmp_path: Path,
    fresh_accelerator: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=lambda: now)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "agrees_anyway", lambda *_: False)  # as on several GPUs
    add = Metrics.add

    def tick(self: Metrics, step: int, *values: Any) -> None:
        nonlocal now
        now += seconds
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, step, *values)

    monkeypatch.setattr(Metrics, "add", tick)
    heard = Heard()
    with pytest.raises(KeyboardInterrupt):
        run(scenes, tmp_path / "run", "pretrain.epochs=9", progress=heard)
    assert f"stopped at step {stopped}: --resume {tmp_path / 'run'} goes on" in heard.notes
