from __future__ import annotations

import pytest
import torch

from vicvlm_cli.gallery.search import exact_top_k, running_top_k


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("k", [1, 5, 29, 1000])
def test_blocks_find_what_a_full_sort_finds(block, k):
    g = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(11, 6, generator=g), torch.randn(29, 6, generator=g)
    scores, index = exact_top_k(queries, gallery, k, block=block)
    order = (queries @ gallery.T).sort(dim=1, descending=True)
    assert torch.equal(index, order.indices[:, :k])
    assert torch.allclose(scores, order.values[:, :k], atol=1e-6)


def test_only_a_block_of_scores_is_held():
    wide = []

    def blocks():
        for start in range(0, 100, 10):
            wide.append(start)
            yield torch.arange(start, start + 10).float()[None] % 37

    scores, index = running_top_k(blocks(), 3)
    assert scores.tolist() == [[36, 36, 35]]
    assert sorted(index[0, :2].tolist()) == [36, 73] and index[0, 2] in (35, 72)
    assert len(wide) == 10


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="at least 1"):
        running_top_k([torch.ones(1, 2)], 0)
    with pytest.raises(ValueError, match="no scores"):
        running_top_k([], 1)
