"""What a query bank takes off hubs, against a slow reference and a case made by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vicvlm_cli.model import query_bank
from vicvlm_cli.model.query_bank import SHARPNESS, QueryBank, hubness, with_discount
from vicvlm_cli.model.vlm import RerankWeights


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=g), dim=1)


def test_hubness_is_the_soft_mean_of_the_cosines(monkeypatch):
    monkeypatch.setattr(query_bank, "BLOCK", 3)
    gallery, queries = unit(7), unit(11, seed=1)
    slow = []
    for row in gallery.double().tolist():
        cosines = [
            sum(a * b for a, b in zip(row, q, strict=True)) for q in queries.double().tolist()
        ]
        slow.append(math.log(sum(math.exp(SHARPNESS * c) for c in cosines) / 11) / SHARPNESS)
        assert sum(cosines) / 11 <= slow[-1] <= max(cosines)
    assert hubness(gallery, queries).tolist() == pytest.approx(slow, abs=1e-6)


def test_a_hub_gives_way_to_the_right_answer():
    # The first picture is near every caption, the second is what the first caption speaks of.
    images = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.2]]), dim=1)
    caption = F.normalize(torch.tensor([[1.0, 0.5, 0.5]]), dim=1)
    others = torch.tensor([[0.0, 1.0, 1.0], [0.1, 1.0, 0.5], [0.2, 0.5, 1.0], [1.0, 1.0, 1.0]])
    bank = QueryBank(F.normalize(others, dim=1), torch.eye(3), RerankWeights.of(1.0))
    assert (caption @ images.T).argmax() == 0
    queries, gallery = with_discount(caption, images, bank.off_images(images))
    assert (queries @ gallery.T).argmax() == 1


def test_each_direction_has_its_weight_and_its_queries():
    bank = QueryBank(unit(9, 1), unit(5, 2), RerankWeights(0.5, 0.0))
    rows = unit(4, 3)
    assert torch.allclose(bank.off_images(rows), 0.5 * hubness(rows, bank.texts))
    assert bank.off_texts(rows).tolist() == [0, 0, 0, 0]
    other = bank.at(RerankWeights(0.5, 1.0))
    assert torch.allclose(other.off_texts(rows), hubness(rows, bank.images))
    queries, gallery = with_discount(unit(3, 4), rows, bank.off_images(rows))
    expected = unit(3, 4) @ rows.T - bank.off_images(rows)
    assert torch.allclose(queries @ gallery.T, expected, atol=1e-6)


def test_a_bank_without_weights_takes_nothing_off_by_mistake():
    with pytest.raises(ValueError, match="have not been chosen"):
        QueryBank(unit(2), unit(2)).off_images(unit(2))
