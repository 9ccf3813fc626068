"""VicVLM: what its target is, and what its masked passes may and may not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_batch, make_model, make_tokenizer
from torch import nn

from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")


def make(options: dict[str, Any], fusion: str = "concat") -> Any:
    """VicVLM in training, with all its losses."""
    weights = {loss: LossConfig() for loss in VicVLM.LOSSES}
    config = TrainConfig(objective="vicvlm", options=options, losses=weights)
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()


@pytest.mark.parametrize("target", ["byol", "pixel"])
def test_only_the_byol_target_is_a_network_and_it_follows_the_encoder(target: str) -> None:
    objective = make({"target": target, "ema_decay": 0.75})
    assert (objective.target is None) == (target == "pixel")
    if target == "pixel":
        return
    before = [p.clone() for p in objective.target.parameters()]
    with torch.no_grad():
        for parameter in objective.model.image_encoder.parameters():
            parameter.add_(1.0)
    objective(make_batch(), Noise(0, 0, CPU), {"mim"})
    moved = zip(before, objective.target.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in moved)  # not by looking
    objective.after_step()
    for a, b in zip(before, objective.target.parameters(), strict=True):
        torch.testing.assert_close(b, a + 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("drop_hidden", [True, False])
def test_the_masked_picture_alone_is_what_is_predicted_from(drop_hidden: bool) -> None:
    # Features of hidden patches must not leak into their own prediction.
    objective = make({"target": "pixel", "predictor_width": 32, "drop_hidden": drop_hidden})
    batch = make_batch()
    seen: list[torch.Tensor] = []
    head: nn.Module = objective.mim_head
    head.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    objective(batch, Noise(0, 0, CPU), {"mim"})
    encoded, at, masked, guess = seen
    assert encoded.shape[:2] == at.shape
    everything = list(range(16))
    assert sorted({*at[0].tolist(), *masked[0].tolist()}) == everything
    assert at[0].tolist() == (
        [n for n in everything if n not in masked[0]] if drop_hidden else everything
    )
    assert masked.shape == (6, 12)
    image = batch.image.clone()
    for row in range(6):
        for patch in masked[row].tolist():
            y, x = divmod(patch, 4)
            image[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 255
    batch.image = image
    seen.clear()
    objective(batch, Noise(0, 0, CPU), {"mim"})
    torch.testing.assert_close(seen[3], guess, rtol=0, atol=0)


def test_hidden_patches_that_are_encoded_are_mask_tokens_at_their_places() -> None:
    objective = make({"target": "pixel", "predictor_width": 32, "drop_hidden": False})
    batch, noise = make_batch(), Noise(0, 0, CPU)
    masked = objective.eval()._mask_image(batch, noise)
    encoder = objective.model.image_encoder
    assert masked.tokens.shape[1] == encoder.prefix + 16
    hidden = torch.zeros(6, 16, dtype=torch.bool).scatter(1, masked.masked, True)
    pixels = objective.model.normalize(batch.image)
    expected = encoder(pixels, hidden=hidden, mask_token=objective.mask_token)
    torch.testing.assert_close(masked.tokens, expected)
    with torch.no_grad():
        objective.mask_token.add_(1.0)
    assert not torch.equal(
        encoder(pixels, hidden=hidden, mask_token=objective.mask_token), expected
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_masked_words_are_predicted_without_seeing_them(fusion: str) -> None:
    objective = make({"predictor_width": 32}, fusion)
    batch = make_batch()
    seen: list[torch.Tensor] = []
    encoder = objective.model.text_encoder
    encoder.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    objective(batch, Noise(0, 0, CPU), {"mlm"})
    clean, hidden = seen
    assert torch.equal(clean, batch.input_ids)
    changed = hidden != clean
    assert bool(changed.any(dim=1).all())
    assert bool((hidden[changed] == objective.mask_id).all())
    assert not bool((changed & ~batch.attention_mask).any())


def test_token_counts_are_of_training_only() -> None:
    objective = make({"predictor_width": 32})
    start = objective.token_counts.clone()
    objective.eval()(make_batch(), Noise(0, 0, CPU), {"mlm"})
    assert torch.equal(objective.token_counts, start)
    objective.train()(make_batch(), Noise(0, 0, CPU), {"mlm"})
    assert float(objective.token_counts.sum()) > float(start.sum())
