"""VicVLM's losses against slow formulas, picture by picture and patch by patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import assert_same
from tiny import make_batch, make_model, make_tokenizer
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.model.image_encoder import sincos_2d
from vicvlm_cli.objectives import create_objective, losses
from vicvlm_cli.objectives.masking import mask_patches, mask_words
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.vicvlm import VicVLM
from vicvlm_cli.settings import LossConfig, TrainConfig

CPU = torch.device("cpu")
VICREG = {"variance", "covariance", "invariance"}
FUSIONS = pytest.mark.parametrize("fusion", ["concat", "cross_attention", "co_attention"])
DROPPED = pytest.mark.parametrize("drop_hidden", [True, False])


def make(fusion: str, **options: Any) -> Any:
    """VicVLM whose EMA encoder is not the online one, so that it matters which is asked."""
    config = TrainConfig(
        objective="vicvlm",
        options={"predictor_width": 32, **options},
        losses={name: LossConfig() for name in VicVLM.LOSSES},
    )
    objective: Any = create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()
    torch.manual_seed(7)
    if objective.target is not None:
        with torch.no_grad():
            for parameter in objective.target.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def drawn(objective: Any, batch: Batch, before: int = 0) -> tuple[list[list[int]], Tensor]:
    """Hidden patches of each row and bool [B, L], the hidden words, of Noise(0, 0).

    ``before``: matching draws twice from so many rows first.
    """
    noise, cfg, rows = Noise(0, 0, CPU), objective.config, len(batch.image)
    for _ in range(2 if before else 0):
        noise.rand(before, before)
    blocks = noise.rand(rows, 16 // cfg.mask_block**2)
    _, masked = mask_patches(blocks, (4, 4), cfg.mask_block, cfg.image_mask)
    draw = noise.rand(rows, 40)[:, : batch.input_ids.shape[1]]
    kinds = (objective.continuation, objective.special)
    hidden = mask_words(batch.input_ids, batch.attention_mask, *kinds, draw, cfg.text_mask)
    return masked.tolist(), hidden


class Pair:
    """A picture, its caption without padding, and both with parts hidden."""

    def __init__(
        self, objective: Any, batch: Batch, row: int, masked: list[int], hidden: Tensor
    ) -> None:
        self.objective, self.model, self.masked = objective, objective.model, masked
        self.seen = [n for n in range(16) if n not in masked]
        n = int(batch.attention_mask[row].sum())
        self.real = batch.attention_mask[row : row + 1, :n]
        self.ids = batch.input_ids[row : row + 1, :n]
        self.shown = self.ids.clone()
        self.shown[0, hidden[:n]] = objective.mask_id
        self.pixels: Tensor = self.model.normalize(batch.image[row : row + 1])

    def fuse(self, image: Tensor, ids: Tensor) -> Any:
        return self.model.fuse(image, None, self.model.text_encoder(ids, self.real), self.real)

    def masked_tokens(self) -> Tensor:
        """The masked picture through the ViT, [1, 1 + K, D]: of visible patches alone, or all."""
        vit = self.model.image_encoder.vit
        patches, places = vit.patch_embed(self.pixels)[0], vit.pos_embed[0]
        rows = [vit.cls_token[0, 0] + places[0]]
        for n in range(16):
            if n in self.seen:
                rows.append(patches[n] + places[1 + n])
            elif not self.objective.config.drop_hidden:
                rows.append(self.objective.mask_token + places[1 + n])
        encoded: Tensor = vit.norm(vit.blocks(torch.stack(rows)[None]))
        return encoded

    def fused_masked(self) -> Any:
        """The masked picture with the caption, fused."""
        tokens, objective = self.masked_tokens(), self.objective
        if objective.config.drop_hidden and self.model.config.fusion == "concat":
            # Mask tokens stand at the places of hidden patches; all patches are told theirs.
            table, head = sincos_2d((4, 4), 24), objective.joint_head
            rows = {n: tokens[0, 1 + k] + table[n] for k, n in enumerate(self.seen)}
            rows |= {n: head.mask_token[0, 0] + table[n] for n in self.masked}
            tokens = torch.stack([tokens[0, 0], *(rows[n] for n in range(16))])[None]
        return self.fuse(tokens, self.ids)

    def target(self, patch: int) -> Tensor:
        """What is to be predicted of a patch."""
        if self.objective.config.target == "pixel":
            y, x = divmod(patch, 4)
            own = self.pixels[0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1)
            return (own - own.mean()) / (own.var(unbiased=False) + 1e-6).sqrt()
        with torch.no_grad():
            all_of_it = self.objective.target.module(self.pixels)[0, 1:]
        deviation = (all_of_it.var(0, unbiased=False) + 1e-5).sqrt()
        standard: Tensor = ((all_of_it - all_of_it.mean(0)) / deviation)[patch]
        return standard

    def predictions(self, loss: str) -> list[Tensor]:
        """Of each hidden patch by itself."""
        tokens = self.masked_tokens()
        patches = self.seen if self.objective.config.drop_hidden else list(range(16))
        at, asked = torch.tensor([patches]), [torch.tensor([[n]]) for n in self.masked]
        if loss == "mim":
            head = self.objective.mim_head
            return [head(tokens[:, 1:], at, n)[0, 0] for n in asked]
        head, fused = self.objective.joint_head, self.fused_masked()
        if self.model.config.fusion == "concat":
            return [head.predictor(fused.image[0, 1 + n]) for n in self.masked]
        return [head(tokens[:, 1:], at, n, fused.text, self.real)[0, 0] for n in asked]


def pairs_of(objective: Any, batch: Batch, before: int = 0) -> list[Pair]:
    masked, hidden = drawn(objective, batch, before)
    return [Pair(objective, batch, i, masked[i], hidden[i]) for i in range(len(masked))]


@FUSIONS
@DROPPED
@pytest.mark.parametrize("target", ["byol", "pixel"])
@pytest.mark.parametrize("loss", ["mim", "joint_mim"])
def test_masked_image_modelling_is_the_mean_error_of_the_hidden_patches(
    loss: str, target: str, drop_hidden: bool, fusion: str
) -> None:
    objective, batch = make(fusion, target=target, drop_hidden=drop_hidden), make_batch(3)
    pairs = pairs_of(objective, batch)
    errors = []
    for pair in pairs:
        assert len(pair.masked) == 12
        for patch, guess in zip(pair.masked, pair.predictions(loss), strict=True):
            squared = (guess - pair.target(patch)) ** 2
            errors.append(squared.sum() / len(squared))
    values, trivial = objective(batch, Noise(0, 0, CPU), {loss})
    assert_same(values[loss], torch.stack(errors).mean(), objective)
    whole = torch.stack([torch.stack([pair.target(n) for n in range(16)]) for pair in pairs])
    masked = torch.tensor([pair.masked for pair in pairs])
    torch.testing.assert_close(trivial[loss], losses.mim_trivial(whole, masked))


@FUSIONS
@pytest.mark.parametrize("matching", [True, False])  # which makes the clean pair's features anyway
@pytest.mark.parametrize("options", [{}, {"masked_stride": 2}, {"drop_hidden": False}])
def test_vicreg_is_of_the_multimodal_features_of_the_three_pairs(
    options: dict[str, Any], matching: bool, fusion: str
) -> None:
    objective, batch = make(fusion, **options), make_batch()
    active = VICREG | ({"itm"} if matching else set())
    values, trivial = objective(batch, Noise(0, 0, CPU), active)
    rows = batch.rows(slice(None, None, objective.config.masked_stride))
    pairs = pairs_of(objective, rows, before=6 if matching else 0)
    clean, masked_image, masked_text = [], [], []
    for pair in pairs:
        image = pair.model.image_encoder(pair.pixels)
        clean.append(pair.fuse(image, pair.ids).pooled[0])
        masked_image.append(pair.fused_masked().pooled[0])
        masked_text.append(pair.fuse(image, pair.shown).pooled[0])
    a, b, c = torch.stack(clean), torch.stack(masked_image), torch.stack(masked_text)
    expected = {
        "variance": (losses.variance(a) + losses.variance(b) + losses.variance(c)) / 3,
        "covariance": (losses.covariance(a) + losses.covariance(b) + losses.covariance(c)) / 3,
        "invariance": (losses.invariance(a, b) + losses.invariance(a, c)) / 2,
    }
    for name in sorted(VICREG):
        assert_same(values[name], expected[name], objective)
    # Features that tell nothing: one point, copies of one dimension, those of other rows.
    assert float(trivial["variance"]) == 1.0
    copies = [losses.covariance_of_copies(x) for x in (a, b, c)]
    torch.testing.assert_close(trivial["covariance"], sum(copies, torch.zeros(())) / 3)
    others = [*range(len(pairs))[-1:], *range(len(pairs))[:-1]]
    strange = losses.invariance(a, b[others]) + losses.invariance(a, c[others])
    torch.testing.assert_close(trivial["invariance"], strange / 2)
