"""MAMO: its masked losses against slow formulas, its EMA model, and what may not be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from vicvlm_cli.cli import app
from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.objectives import create_objective, losses
from vicvlm_cli.objectives.mamo import MAMO
from vicvlm_cli.objectives.masking import mask_patches, mask_words
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig
from vicvlm_cli.workflows import train

CPU = torch.device("cpu")
VARIANTS = pytest.mark.parametrize("variant", ["paper", "seed"])


def make(variant: str = "paper", fusion: str = "concat", **options: Any) -> Any:
    config = TrainConfig(
        objective="mamo",
        options={"variant": variant, **options},
        losses={name: LossConfig() for name in MAMO.LOSSES},
    )
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()


def apart(objective: Any) -> Any:
    """The EMA model away from the online one, so that it matters which of them is asked."""
    torch.manual_seed(7)
    with torch.no_grad():
        for ema in (objective.ema_image, objective.ema_text, objective.ema_fusion):
            for parameter in ema.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def drawn(objective: Any, batch: Batch) -> tuple[list[list[int]], Tensor]:
    """The hidden patches of each row, and bool [B, L], the hidden words, of Noise(0, 0)."""
    noise, cfg = Noise(0, 0, CPU), objective.config
    blocks = noise.rand(len(batch.image), 16 // cfg.mask_block**2)
    _, masked = mask_patches(blocks, (4, 4), cfg.mask_block, cfg.image_mask)
    draw = noise.rand(len(batch.image), 40)[:, : batch.input_ids.shape[1]]
    kinds = (objective.continuation, objective.special)
    hidden = mask_words(batch.input_ids, batch.attention_mask, *kinds, draw, cfg.text_mask)
    return masked.tolist(), hidden


def of_patch(patch: int) -> tuple[Any, slice, slice]:
    y, x = divmod(patch, 4)
    return ..., slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8)


def slow(objective: Any, batch: Batch) -> dict[str, Tensor]:
    """MIM and MRM, picture by picture and position by position."""
    model, seed = objective.model, objective.config.variant == "seed"
    masked, hidden = drawn(objective, batch)
    vit, heads = model.image_encoder.vit, (objective.mim_head, objective.mrm_head)
    mim: list[Tensor] = []
    of_patches: list[Tensor] = []
    of_words: list[Tensor] = []
    for row in range(len(batch.image)):
        pixels = model.normalize(batch.image[row : row + 1])
        ids, real = batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1]
        with torch.no_grad():
            visual = objective.ema_image.module(pixels)
            words = objective.ema_text.module(ids, real)
            clean = objective.ema_fusion.module(visual, None, words, real)
        blank = pixels.clone()
        for patch in masked[row]:
            blank[of_patch(patch)] = 0
        embedded = vit.patch_embed(blank if seed else pixels)[0]
        if not seed:
            rows = [objective.mask_token if n in masked[row] else embedded[n] for n in range(16)]
            embedded = torch.stack(rows)
        tokens = vit.norm(vit.blocks(torch.cat([vit.cls_token[0], embedded])[None] + vit.pos_embed))
        text = model.text_encoder(ids, real)
        fused = model.fuse(tokens, None, text, real)
        for patch in masked[row]:
            guess, target = heads[0](fused.image[0, 1 + patch]), visual[0, 1 + patch]
            if seed:
                mim.append((guess / guess.norm() - target / target.norm()).abs().sum())
            else:
                spread = visual[0, 1:].var(0, unbiased=False).sqrt()
                target = (target - visual[0, 1:].mean(0)) / spread
                mim.append((guess - target).abs().mean())
            of_patches.append(
                distance(heads[1], fused.image[0, 1 + patch], clean.image[0, 1 + patch], seed)
            )
        shown = ids.clone()
        shown[hidden[row : row + 1]] = objective.mask_id
        text = model.text_encoder(shown, real)
        image = model.image_encoder(pixels)
        fused = model.fuse(image, None, text, real)
        for place in hidden[row].nonzero().flatten().tolist():
            of_words.append(distance(heads[1], fused.text[0, place], clean.text[0, place], seed))
    sides = [torch.stack(of_patches).mean(), torch.stack(of_words).mean()]
    mrm = sides[0] + sides[1] if seed else (sides[0] + sides[1]) / 2
    return {"mim": torch.stack(mim).mean(), "mrm": mrm}


def distance(head: Any, online: Tensor, clean: Tensor, seed: bool) -> Tensor:
    if seed:
        return (head(online) - head(clean).detach()).square().sum()
    target = (clean - clean.mean()) / (clean.var(unbiased=False) + 1e-5).sqrt()
    return (head(online) - target).square().mean()


@VARIANTS
@pytest.mark.parametrize("loss", ["mim", "mrm"])
def test_masked_losses_are_the_slow_formulas(variant: str, loss: str) -> None:
    objective, batch = apart(make(variant)), make_batch(3)
    value = objective(batch, Noise(0, 0, CPU), {loss})[0][loss]
    expected = slow(objective, batch)[loss]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    named = {k: p for k, p in objective.named_parameters() if p.requires_grad}
    pairs = [
        torch.autograd.grad(total, list(named.values()), allow_unused=True)
        for total in (value, expected)
    ]
    assert any(gradient is not None for gradient in pairs[0])
    for name, ours, theirs in zip(named, *pairs, strict=True):
        if ours is None or theirs is None:  # one of them may pass a tensor on without using it
            assert ours is None or not bool(ours.any()), name
            assert theirs is None or not bool(theirs.any()), name
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)


@VARIANTS
def test_targets_carry_no_gradient(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(variant)
    seen: list[tuple[bool, bool]] = []

    def spied(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def spy(guess: Tensor, target: Tensor) -> Tensor:
            seen.append((guess.requires_grad, target.requires_grad))
            return function(guess, target)

        return spy

    monkeypatch.setattr(losses, "l1_sum", spied(losses.l1_sum))
    monkeypatch.setattr(losses, "mim_sum", spied(losses.mim_sum))
    values, _ = objective(make_batch(), Noise(0, 0, CPU), {"mim", "mrm"})
    assert seen == [(True, False)] * 3
    (values["mim"] + values["mrm"]).backward()
    for name, parameter in objective.named_parameters():
        if name.startswith("ema_"):
            assert not parameter.requires_grad and parameter.grad is None, name


@VARIANTS
def test_mixed_precision_trains_the_same_parameters(variant: str) -> None:
    objective = make(variant)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = objective(make_batch(), Noise(0, 0, CPU), set(MAMO.LOSSES))
    torch.stack(list(values.values())).sum().backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and not name.endswith("key.bias"):
            assert parameter.grad is not None and bool(parameter.grad.any()), name


def test_the_ema_model_follows_all_three_parts_and_in_training_alone() -> None:
    objective = make(ema_decay=0.75)
    model = objective.model
    parts = [
        (objective.ema_image, model.image_encoder),
        (objective.ema_text, model.text_encoder),
        (objective.ema_fusion, model.fusion),
    ]
    before = [[p.clone() for p in ema.parameters()] for ema, _ in parts]
    for (_, online), old in zip(parts, before, strict=True):
        assert [p.shape for p in online.parameters()] == [p.shape for p in old]
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(1.0)

    def assert_moved(by: float) -> None:
        for (ema, _), old in zip(parts, before, strict=True):
            for a, b in zip(old, ema.parameters(), strict=True):
                torch.testing.assert_close(b, a + by, rtol=1e-5, atol=1e-5)

    objective(make_batch(), Noise(0, 0, CPU), set(MAMO.LOSSES))
    assert_moved(0.0)
    objective.eval()
    objective(make_batch(), Noise(0, 0, CPU), set(MAMO.LOSSES))
    objective.after_step()
    assert_moved(0.0)
    objective.train().after_step()
    assert_moved(0.25)
    objective.after_step()
    assert_moved(0.25 + 0.75 * 0.25)
    assert not any(ema.module.training for ema, _ in parts)


@VARIANTS
@pytest.mark.parametrize("block", [1, 2])
def test_hidden_pixels_are_not_seen(variant: str, block: int) -> None:
    objective, batch = make(variant, mask_block=block), make_batch(3)
    masked, _ = drawn(objective, batch)
    assert all(len(row) == 12 for row in masked)
    seen: list[Tensor] = []
    objective.model.image_encoder.register_forward_hook(lambda *x: seen.append(x[-1].detach()))
    objective.mim_head.register_forward_hook(lambda *x: seen.append(x[-1].detach()))

    def masked_pass(image: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        batch.image = image
        objective(batch, Noise(0, 0, CPU), {"mim"})
        _, tokens, guess = seen
        assert tokens.shape == (3, 17, 24) and guess.shape == (3, 12, 24)
        return tokens, guess

    image = batch.image.clone()
    before = masked_pass(image)
    changed = image.clone()
    for row, patches in enumerate(masked):
        for patch in patches:
            changed[row][of_patch(patch)] = 255
    after = masked_pass(changed)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    for row, patches in enumerate(masked):
        visible = min(set(range(16)) - set(patches))
        changed[row][of_patch(visible)] = 255
    after = masked_pass(changed)
    assert bool((after[1] != before[1]).flatten(1).any(1).all())


def test_the_mlm_of_the_paper_sees_the_picture_and_that_of_the_seed_does_not() -> None:
    for variant, looks in (("paper", True), ("seed", False)):
        objective = make(variant).eval()
        values = []
        for seed in (0, 1):
            batch = make_batch()
            batch.image = make_batch(seed=seed).image
            values.append(objective(batch, Noise(0, 0, CPU), {"mlm"})[0]["mlm"].item())
        assert (values[0] != values[1]) == looks


@VARIANTS
def test_hidden_words_are_not_seen(variant: str) -> None:
    objective, batch = make(variant), make_batch()
    _, hidden = drawn(objective, batch)
    seen: list[Tensor] = []
    encoder = objective.model.text_encoder
    encoder.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    objective(batch, Noise(0, 0, CPU), {"mim", "mrm"})
    assert len(seen) == 2 and torch.equal(seen[0], batch.input_ids)
    assert torch.equal(seen[1] != batch.input_ids, hidden)
    assert bool((seen[1][hidden] == objective.mask_id).all())


@pytest.mark.parametrize(
    ("variant", "active", "passes"),
    [
        # image, text, fusion; the same of the EMA model
        ("paper", set(MAMO.LOSSES), [2, 2, 3, 1, 1, 1]),
        ("seed", set(MAMO.LOSSES), [2, 2, 3, 1, 1, 1]),
        ("paper", {"itc"}, [1, 1, 0, 0, 0, 0]),
        ("paper", {"mim"}, [2, 1, 1, 1, 0, 0]),
        ("paper", {"mlm"}, [1, 2, 1, 0, 0, 0]),
        ("seed", {"mlm"}, [1, 2, 0, 0, 0, 0]),
        ("seed", {"mrm", "mlm", "mim"}, [2, 2, 2, 1, 1, 1]),
    ],
)
def test_no_pass_is_made_twice(variant: str, active: set[str], passes: list[int]) -> None:
    objective = make(variant)
    model = objective.model
    modules = [model.image_encoder, model.text_encoder, model.fusion]
    modules += [m.module for m in (objective.ema_image, objective.ema_text, objective.ema_fusion)]
    made = [0] * len(modules)
    for i, module in enumerate(modules):

        def count(*_: Any, i: int = i) -> None:
            made[i] += 1

        module.register_forward_hook(count)
    objective(make_batch(), Noise(0, 0, CPU), active)
    assert made == passes


def test_the_guesses_without_looking() -> None:
    torch.manual_seed(0)
    places, pictures, noise = torch.randn(1, 9, 4), torch.randn(5, 1, 4), torch.randn(5, 9, 4)
    masked = torch.arange(9).expand(5, 9)
    alike = losses.l1_trivial(places + pictures, masked)
    torch.testing.assert_close(alike, torch.zeros(()), rtol=0, atol=1e-6)
    # Those who know all but the noise err by its mean size.
    many = torch.randn(400, 9, 4)
    guess = losses.l1_trivial(places + many, torch.arange(9).expand(400, 9))
    assert float(guess) == pytest.approx(math.sqrt(2 / math.pi) * math.sqrt(8 / 9), rel=0.02)
    target = noise[:, 0]
    expected = target.var(dim=0).mean()
    torch.testing.assert_close(losses.mean_trivial(target), expected)
    assert float(losses.mean_trivial(target[:1])) == float(losses.mean_trivial(target[:0])) == 0
    total = sum((F.l1_loss(a, b) for a, b in zip(noise[0], noise[1], strict=True)), torch.zeros(()))
    torch.testing.assert_close(losses.l1_sum(noise[0], noise[1]), total)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "baseline"}, "--variant is 'baseline', not paper or seed"),
        ({"fusion": "none"}, "mamo matches pairs in a fusion encoder"),
        ({"fusion": "cross_attention"}, "model.fusion=cross_attention does not have"),
        ({"image_mask": 0.0}, "options.image_mask must be between 0 and 1"),
        ({"text_mask": 1.0}, "options.text_mask must be between 0 and 1"),
        ({"ema_decay": -0.1}, "options.ema_decay must be from 0 to 1"),
        ({"mask_block": 3}, "options.mask_block=3 does not tile"),
        ({"itm_negatives": 0}, "options.itm_negatives is 0, and must be above 0"),
        ({"target": "byol"}, "'options.target' is not a setting"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        make(**options)
    assert words in str(caught.value)


def test_the_variant_is_an_option_of_pretrain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def pretrain(data: Path, *, overrides: list[str], **_: Any) -> None:
        seen.extend(overrides)
        raise UserError("that was all")

    monkeypatch.setattr(train, "pretrain", pretrain)
    words = ["pretrain", "--data", str(tmp_path), "--objective", "mamo", "--variant"]
    assert CliRunner().invoke(app, [*words, "seed"]).exit_code == 1
    assert {'pretrain.objective="mamo"', 'pretrain.options.variant="seed"'} <= set(seen)
    assert CliRunner().invoke(app, [*words, "other"]).exit_code == 2
