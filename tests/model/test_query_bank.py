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


def slow_hubness(gallery, queries, own):
    found = []
    for row, mine in zip(gallery.double().tolist(), own, strict=True):
        cosines = [
            sum(a * b for a, b in zip(row, query, strict=True))
            for i, query in enumerate(queries.double().tolist())
            if i not in mine
        ]
        mean = sum(math.exp(SHARPNESS * c) for c in cosines) / max(len(cosines), 1)
        found.append(math.log(mean) / SHARPNESS if cosines else 0.0)
    return found


def test_hubness_is_the_soft_mean_of_the_cosines():
    gallery, queries = unit(7), unit(11, seed=1)
    slow = slow_hubness(gallery, queries, [()] * 7)
    assert hubness(gallery, queries).tolist() == pytest.approx(slow, abs=1e-6)
    cosines = gallery @ queries.T
    for value, row in zip(slow, cosines, strict=True):
        assert row.mean() <= value <= row.max()
    own = [(), (3,), (0, 1, 2), *[()] * 3, range(11)]
    mask = torch.tensor([[i in mine for i in range(11)] for mine in own])
    slow = slow_hubness(gallery, queries, own)
    assert slow[-1] == 0
    assert hubness(gallery, queries, mask).tolist() == pytest.approx(slow, abs=1e-6)


def test_equal_rows_get_equal_values_wherever_they_stand():
    rows = unit(1).expand(4099, 6)
    assert len(hubness(rows, unit(121, 1)).unique()) == 1


def test_what_is_in_the_bank_is_not_measured_by_its_own(monkeypatch):
    monkeypatch.setattr(query_bank, "BLOCK", 3)
    images, texts = unit(4), unit(7, 1)
    of = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    bank = QueryBank(texts, images, of, RerankWeights.of(1.0))
    again = F.normalize(images[[2, 0]] + 0.02 * unit(2, 5), dim=1)  # encoded anew
    gallery = torch.cat([again, unit(3, 2)])
    expected = slow_hubness(gallery, texts, [(3, 4, 5), (0, 1), (), (), ()])
    assert bank.off_images(gallery).tolist() == pytest.approx(expected, abs=1e-6)
    captions = torch.cat([texts[[4, 2]], unit(3, 3)])
    expected = slow_hubness(captions, images, [(2,), (1,), (), (), ()])
    assert bank.off_texts(captions).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_is_merely_alike_is_measured():
    images, texts = unit(4), unit(4, 1)
    bank = QueryBank(texts, images, torch.arange(4), RerankWeights.of(1.0))
    for rows, queries, off in (
        (images, texts, bank.off_images),
        (texts, images, bank.off_texts),
    ):
        alike = F.normalize(rows + 0.15 * unit(4, 5), dim=1)
        cosines = (alike * rows).sum(1)
        assert cosines.min() > 0.97 and cosines.max() < 0.999
        expected = slow_hubness(alike, queries, [()] * 4)
        assert off(alike).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_picture_that_is_encoded_anew_is_told_by_how_much_nearer_it_is():
    images, texts = torch.eye(6)[:4], unit(8, 1)
    bank = QueryBank(texts, images, torch.arange(8) // 2, RerankWeights.of(1.0))
    rows = torch.tensor(
        [
            [1.0, 0.2, 0.0, 0.0, 0.0, 0.0],  # 0.02 from the first picture, 0.80 from the next
            [1.0, 0.9, 0.0, 0.0, 0.0, 0.0],  # between two
            [0.5, 0.4, 0.0, 0.0, 0.9, 0.0],  # far from all
            [0.0, 0.0, 0.0, 1.0, 0.0, 0.0],  # the fourth itself
        ]
    )
    rows = F.normalize(rows, dim=1)
    strict = slow_hubness(rows, texts, [(), (), (), (6, 7)])
    assert bank.off_images(rows).tolist() == pytest.approx(strict, abs=1e-6)
    expected = slow_hubness(rows, texts, [(0, 1), (), (), (6, 7)])
    assert bank.off_images(rows, anew=True).tolist() == pytest.approx(expected, abs=1e-6)
    # Of two copies in the bank neither is nearer, and both are the picture itself.
    twice = QueryBank(texts[:4], images[[0, 0]], torch.arange(4) // 2, RerankWeights.of(1.0))
    assert twice.off_images(images[:1], anew=True).item() == 0
    one = QueryBank(texts[:2], images[:1], torch.zeros(2).long(), RerankWeights.of(1.0))
    expected = slow_hubness(rows, texts[:2], [()] * 4)
    assert one.off_images(rows, anew=True).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_hub_gives_way_to_the_right_answer():
    # The first picture is near every caption, the second is what the first caption speaks of.
    images = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.2]]), dim=1)
    caption = F.normalize(torch.tensor([[1.0, 0.5, 0.5]]), dim=1)
    others = torch.tensor([[0.0, 1.0, 1.0], [0.1, 1.0, 0.5], [0.2, 0.5, 1.0], [1.0, 1.0, 1.0]])
    bank = QueryBank(
        F.normalize(others, dim=1), torch.eye(3), torch.zeros(4).long(), RerankWeights.of(1.0)
    )
    assert (caption @ images.T).argmax() == 0
    queries, gallery = with_discount(caption, images, bank.off_images(images))
    assert (queries @ gallery.T).argmax() == 1


def test_each_direction_has_its_weight_and_its_queries():
    bank = QueryBank(unit(9, 1), unit(5, 2), torch.arange(9) % 5, RerankWeights(0.5, 0.0))
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
        QueryBank(unit(2), unit(2), torch.arange(2)).off_images(unit(2))
