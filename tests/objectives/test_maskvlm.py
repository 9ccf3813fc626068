"""MaskVLM: what is hidden cannot be seen, and the other modality is what helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_same
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
SIDE = 8  # pixels of a patch, of which there are 4 x 4


def make(name: str = "maskvlm", fusion: str = "co_attention", **options: Any) -> Any:
    config = TrainConfig(objective=name, options=options, losses={"itc": LossConfig()})
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).eval()


def watch(module: nn.Module) -> list[tuple[Any, ...]]:
    """The inputs and the output of every call, in one tuple each."""
    calls: list[tuple[Any, ...]] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append((*inputs, output)))
    return calls


def run(objective: Any, batch: Batch, *active: str, step: int = 0) -> dict[str, Tensor]:
    values: dict[str, Tensor] = objective(batch, Noise(0, step, CPU), set(active))[0]
    return {name: value.detach() for name, value in values.items()}


def boxes(at: Tensor) -> list[tuple[int, int, slice, slice]]:
    """Row of the batch, column of ``at``, and the pixels of the patch that ``at`` [B, M] names."""
    found = []
    for row, tokens in enumerate(at.tolist()):
        for column, token in enumerate(tokens):
            y, x = divmod(token - 1, 4)  # after the class token
            down, across = slice(SIDE * y, SIDE * (y + 1)), slice(SIDE * x, SIDE * (x + 1))
            found.append((row, column, down, across))
    return found


def test_mim_is_the_mean_error_of_the_hidden_pixels_forward_and_gradient() -> None:
    objective, batch = make(decoder_depth=1), make_batch()
    model, calls = objective.model, watch(objective.mim_head)
    value = objective(batch, Noise(0, 0, CPU), {"mim"})[0]["mim"]
    image, at, _, text_mask, guess = calls[0]
    assert image.shape == (6, 17, 32) and torch.equal(text_mask, batch.attention_mask)
    assert at.shape == (6, 8) and guess.shape == (6, 8, 3 * SIDE * SIDE)  # 2 of 4 blocks of 2 x 2
    pixels = batch.image.float() / 255 * 2 - 1  # mean and deviation 0.5: raw colours, scaled
    guesses = []
    for row in range(6):  # alone, without padding
        hidden = torch.zeros(1, 16, dtype=torch.bool)
        hidden[0, at[row] - 1] = True
        kwargs = {"hidden": hidden, "mask_token": objective.mask_token}
        tokens = model.image_encoder(pixels[row : row + 1], **kwargs)
        real = batch.attention_mask[row]
        mask = real[real][None]
        words = model.text_encoder(batch.input_ids[row, real][None], mask)
        fused = model.fuse(tokens, None, words, mask)
        guesses.append(objective.mim_head(fused.image, at[row : row + 1], fused.text, mask)[0])
    terms = []
    for row, column, down, across in boxes(at):
        true = pixels[row, :, down, across].reshape(-1)
        terms.append((guesses[row][column] - true).abs().mean())
    assert_same(value, torch.stack(terms).mean(), objective)


def test_hidden_patches_are_predicted_without_seeing_them() -> None:
    objective, batch = make(decoder_depth=1), make_batch()
    calls = watch(objective.mim_head)
    run(objective, batch, "mim")
    image = batch.image.clone()
    for row, _, down, across in boxes(calls[0][1]):
        image[row, :, down, across] = 255
    assert bool((image != batch.image).any(dim=(1, 2, 3)).all())
    visible = batch.image.clone()
    visible[image == batch.image] = 9
    run(objective, Batch(**{**batch.__dict__, "image": image}), "mim")
    run(objective, Batch(**{**batch.__dict__, "image": visible}), "mim")
    assert torch.equal(calls[1][-1], calls[0][-1])
    assert not torch.allclose(calls[2][-1], calls[0][-1])  # the others are seen


def test_hidden_patches_are_mask_tokens_at_their_places() -> None:
    objective, batch = make(decoder_depth=1), make_batch()
    calls = watch(objective.mim_head)
    run(objective, batch, "mim")
    guess = calls[0][-1]
    assert bool((guess[:, 0] - guess[:, 1]).abs().amax(1).gt(1e-4).all())
    with torch.no_grad():
        objective.mask_token.add_(1.0)
    run(objective, batch, "mim")
    assert not torch.allclose(calls[1][-1], guess)


def test_hidden_words_are_predicted_without_seeing_them() -> None:
    objective, batch = make(), make_batch()
    encoded, read = watch(objective.model.text_encoder), watch(objective.mlm_head)
    run(objective, batch, "mlm")
    clean, hidden = encoded[0][0], encoded[1][0]
    changed = hidden != clean
    assert bool(changed.any(dim=1).all()) and bool((hidden[changed] == objective.mask_id).all())
    assert len(read[0][0]) == int(changed.sum())
    # Other words of the same kind in their places: whole words, or pieces that go on with one.
    other = batch.input_ids.clone()
    for kind in (False, True):
        ids = torch.nonzero((objective.continuation == kind) & ~objective.special).flatten()
        own = changed & (objective.continuation[clean] == kind)
        other[own] = ids[(torch.searchsorted(ids, clean[own]) + 1) % len(ids)]
    assert bool((other != clean)[changed].all())
    run(objective, Batch(**{**batch.__dict__, "input_ids": other}), "mlm")
    assert torch.equal(read[1][0], read[0][0])


def test_each_modality_helps_the_other() -> None:
    objective, batch = make(), make_batch()
    before = run(objective, batch, "mim", "mlm")
    captions = {"input_ids": batch.input_ids.roll(1, 0)}
    captions["attention_mask"] = batch.attention_mask.roll(1, 0)
    told_otherwise = run(objective, Batch(**{**batch.__dict__, **captions}), "mim")
    assert abs(float(told_otherwise["mim"] - before["mim"])) > 1e-5
    shown = Batch(**{**batch.__dict__, "image": batch.image.roll(1, 0)})
    assert abs(float(run(objective, shown, "mim", "mlm")["mlm"] - before["mlm"])) > 1e-5


def test_the_decoder_reads_the_caption_itself() -> None:
    objective, batch = make(decoder_depth=1), make_batch()
    calls = watch(objective.mim_head)
    run(objective, batch, "mim")
    image, at, text, mask, guess = calls[0]
    assert not torch.allclose(objective.mim_head(image, at, text.roll(1, 0), mask), guess)
    spoiled = text.masked_fill(~mask.unsqueeze(-1), 50.0)
    torch.testing.assert_close(objective.mim_head(image, at, spoiled, mask), guess)


def test_contrast_and_matching_are_of_the_clean_pair() -> None:
    batch = make_batch()
    ours = run(make(), batch, "itc", "itm", "mlm", "mim")
    plain = run(make("retrieval"), batch, "itc", "itm")
    for name in ("itc", "itm"):
        torch.testing.assert_close(ours[name], plain[name])


def test_what_is_off_is_not_computed() -> None:
    objective, batch = make(), make_batch()
    model = objective.model
    parts = {
        "pictures": watch(model.image_encoder),
        "captions": watch(model.text_encoder),
        "image stream": watch(model.fusion.image_stream),
        "text stream": watch(model.fusion.bert.embeddings),
        "decoder": watch(objective.mim_head),
    }
    expected = {  # one call is that of the clean pair
        "itc": [1, 1, 0, 0, 0],
        "itm": [1, 1, 1, 1, 0],
        "mlm": [1, 2, 0, 1, 0],
        "mim": [2, 1, 1, 1, 1],
    }
    for name, calls in expected.items():
        run(objective, batch, name)
        assert [len(part) for part in parts.values()] == calls, name
        for part in parts.values():
            part.clear()


def test_evaluation_moves_nothing() -> None:
    objective = make()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    run(objective, make_batch(), *objective.LOSSES)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    objective.train()
    run(objective, make_batch(), *objective.LOSSES)
    assert float(objective.token_counts.sum()) > float(before["token_counts"].sum())


def test_the_options_arrive() -> None:
    objective = make(image_mask=0.25, mask_block=1, decoder_depth=2, itm_negatives=2)
    assert len(objective.mim_head.layers.encoder.layer) == 2
    calls = watch(objective.mim_head)
    run(objective, make_batch(), "mim")
    assert calls[0][1].shape == (6, 4)


@pytest.mark.parametrize(
    ("fusion", "options", "words"),
    [
        ("none", {}, "maskvlm matches pairs in a fusion encoder"),
        ("concat", {}, "model.fusion=concat has not both: set model.fusion=co_attention"),
        ("cross_attention", {}, "model.fusion=cross_attention has not both"),
        ("co_attention", {"image_mask": 1.0}, "options.image_mask must be between 0 and 1"),
        ("co_attention", {"text_mask": 0.0}, "options.text_mask must be between 0 and 1"),
        ("co_attention", {"decoder_depth": 0}, "options.decoder_depth must be 1 or more"),
        ("co_attention", {"mask_block": 3}, "options.mask_block=3 does not tile"),
        ("co_attention", {"target": "byol"}, "'options.target' is not a setting"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    fusion: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make(fusion=fusion, **options)
    assert words in str(caught.value)
