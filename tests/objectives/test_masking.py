"""Which patches and words are hidden: exact counts, whole blocks, whole words."""

from __future__ import annotations

import pytest
import torch
from tiny import CAPTIONS, make_tokenizer
from torch import Tensor

from vicvlm_cli.errors import UsageError
from vicvlm_cli.objectives.masked_language import positions
from vicvlm_cli.objectives.masking import check_block, drop_words, mask_patches, mask_words


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("grid", "block", "ratio", "hidden_blocks"),
    [
        ((4, 4), 1, 0.75, 12),
        ((4, 4), 2, 0.75, 3),
        ((4, 6), 2, 0.5, 3),
        ((6, 4), 2, 0.5, 3),
        ((14, 14), 2, 0.75, 37),
        ((4, 4), 2, 0.99, 3),  # one block is always kept
        ((4, 4), 2, 0.01, 1),  # and one hidden
    ],
)
def test_whole_blocks_are_hidden_equally_many_everywhere(
    grid: tuple[int, int], block: int, ratio: float, hidden_blocks: int
) -> None:
    down, across = grid[0] // block, grid[1] // block
    keep, masked = mask_patches(uniform(32, down * across), grid, block, ratio)
    patches = grid[0] * grid[1]
    assert masked.shape == (32, hidden_blocks * block**2)
    assert keep.shape == (32, patches - hidden_blocks * block**2)
    patterns = set()
    for row in range(32):
        kept, hidden = keep[row].tolist(), masked[row].tolist()
        assert sorted(kept + hidden) == list(range(patches))
        assert kept == sorted(kept) and hidden == sorted(hidden)
        picture = torch.zeros(patches, dtype=torch.bool)
        picture[masked[row]] = True
        blocks = picture.view(down, block, across, block).permute(0, 2, 1, 3).reshape(-1, block**2)
        assert bool((blocks.all(1) | ~blocks.any(1)).all())
        patterns.add(tuple(hidden))
    assert len(patterns) > 1


def test_every_block_is_hidden_as_often() -> None:
    _, masked = mask_patches(uniform(4000, 16), (4, 4), 1, 0.25)
    counts = masked.flatten().bincount(minlength=16)
    assert int(counts.min()) > 900 and int(counts.max()) < 1100  # 1000 each, 3 sigma


def test_a_rows_mask_depends_on_its_own_noise() -> None:
    noise = uniform(6, 16)
    whole = mask_patches(noise, (4, 4), 1, 0.5)[1]
    assert torch.equal(mask_patches(noise[2:4], (4, 4), 1, 0.5)[1], whole[2:4])


@pytest.mark.parametrize(
    ("grid", "block", "fitting"),
    [((4, 4), 3, "1, 2"), ((4, 4), 4, "1, 2"), ((6, 4), 4, "1, 2"), ((7, 7), 2, "1"),
     ((4, 4), 0, "1, 2")],
)  # fmt: skip
def test_a_block_that_does_not_tile_is_refused(
    grid: tuple[int, int], block: int, fitting: str
) -> None:
    with pytest.raises(UsageError, match=f"mask_block={block} does not tile .* from {fitting}$"):
        check_block(grid, block)
    check_block(grid, 1)


class Words:
    """Captions of a small vocabulary, their words, and what is hidden of them."""

    def __init__(self, captions: list[str], ratio: float, seed: int = 0, more: int = 0) -> None:
        tokenizer = make_tokenizer()
        self.ids, self.mask = tokenizer(captions, 40)
        if more:  # padding that looks like words, and like the rest of words
            rubbish = torch.randint(tokenizer.vocab_size, (len(captions), more))
            self.ids = torch.cat([self.ids, rubbish], dim=1)
            self.mask = torch.cat([self.mask, torch.zeros_like(rubbish, dtype=torch.bool)], dim=1)
        special = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        special[list(tokenizer.special_ids())] = True
        self.special, self.continuation = special, tokenizer.continuation()
        noise = uniform(len(captions), 60, seed=seed)[:, : self.ids.shape[1]]
        self.hidden = mask_words(self.ids, self.mask, self.continuation, special, noise, ratio)

    def words(self, row: int) -> list[list[int]]:
        """The positions of each word of a caption."""
        found: list[list[int]] = []
        for i, token in enumerate(self.ids[row].tolist()):
            if not self.mask[row, i] or self.special[token]:
                continue
            if self.continuation[token]:
                found[-1].append(i)
            else:
                found.append([i])
        return found


@pytest.mark.parametrize("ratio", [0.125, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_whole_words_are_hidden_as_many_as_asked(ratio: float, seed: int) -> None:
    made = Words(CAPTIONS, ratio, seed)
    assert max(len(word) for row in range(len(CAPTIONS)) for word in made.words(row)) > 1
    for row, caption in enumerate(CAPTIONS):
        words = made.words(row)
        assert len(words) == len(caption.split())
        hidden = [word for word in words if made.hidden[row, word[0]]]
        assert len(hidden) == max(1, round(ratio * len(words)))
        for word in words:  # all of it or nothing
            assert made.hidden[row, word].tolist() == [word in hidden] * len(word)
        assert int(made.hidden[row].sum()) == sum(map(len, hidden))  # and nothing besides


def test_special_tokens_and_padding_are_never_hidden() -> None:
    for seed in range(10):
        made = Words([*CAPTIONS, "狗 dogs 狗"], 0.9, seed, more=5)
        assert not bool((made.hidden & made.special[made.ids]).any())
        assert not bool((made.hidden & ~made.mask).any())


def test_padding_does_not_change_what_is_hidden() -> None:
    for seed in range(5):
        short, long = Words(CAPTIONS, 0.5, seed), Words(CAPTIONS, 0.5, seed, more=9)
        assert torch.equal(long.hidden[:, : short.hidden.shape[1]], short.hidden)


def test_a_single_word_is_hidden_and_none_cannot_be() -> None:
    made = Words(["dogs", "", "狗"], 0.1)
    assert made.hidden.any(dim=1).tolist() == [True, False, False]


def test_every_word_is_hidden_as_often() -> None:
    tokenizer = make_tokenizer(400)
    ids, mask = tokenizer(["a boat on the water at night"] * 3000, 40)
    special = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
    special[list(tokenizer.special_ids())] = True
    hidden = mask_words(ids, mask, tokenizer.continuation(), special, uniform(*ids.shape), 0.28)
    share = hidden[:, 1:-1].float().mean(0)  # two words of seven
    assert share.tolist() == pytest.approx([2 / 7] * 7, abs=0.03)


def test_places_of_hidden_words_in_the_order_of_a_mask() -> None:
    hidden = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1]]).bool()
    at, real = positions(hidden)
    assert at.shape == real.shape == (3, 3)
    x = torch.arange(12).view(3, 4)
    assert torch.equal(x.gather(1, at)[real], x[hidden])
    assert positions(torch.zeros(2, 4, dtype=torch.bool))[0].shape == (2, 1)


def test_whole_words_are_dropped_each_by_its_own_draw_and_special_tokens_never() -> None:
    ids = torch.tensor([[2, 9, 7, 7, 8, 3], [2, 6, 3, 0, 0, 0]])
    continuation, special = torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    continuation[7] = True  # "9 ##7 ##7" is one word
    special[:5] = True
    noise = torch.tensor([[0.0, 0.1, 0.9, 0.0, 0.0, 0.9], [0.0, 0.31, 0.0, 0.0, 0.0, 0.0]])
    hidden = drop_words(ids, continuation, special, noise, 0.3)
    assert hidden.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert not drop_words(ids, continuation, special, noise, 0.0).any()
    many = torch.full((4000, 6), 5)
    got = drop_words(many, continuation, special, torch.rand(4000, 6), 0.3)
    assert float(got.float().mean()) == pytest.approx(0.3, abs=0.02)
