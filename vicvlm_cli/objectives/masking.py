"""Which patches and which words are hidden. Batched, on the device, from given noise."""

from __future__ import annotations

import torch
from torch import Tensor

from vicvlm_cli.errors import UsageError


def mask_patches(
    noise: Tensor, grid: tuple[int, int], block: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """Hide square blocks of patches, equally many in each picture.

    Args:
        noise: uniform [B, (H / block) * (W / block)].
        grid: patches down and across, (H, W).
        block: side of a block in patches.
        ratio: share of blocks hidden; at least one is hidden and one kept.

    Returns:
        ``keep`` long [B, K] and ``masked`` long [B, M], patch numbers in ascending order.
    """
    rows, columns = grid[0] // block, grid[1] // block
    hidden = min(max(round(ratio * rows * columns), 1), rows * columns - 1)
    order = noise.argsort(dim=1)
    y = torch.arange(grid[0], device=noise.device) // block
    x = torch.arange(grid[1], device=noise.device) // block
    block_of = (y[:, None] * columns + x[None, :]).reshape(-1)  # [H * W]
    place = order.argsort(dim=1)  # [B, blocks]: where each block came in the draw
    is_hidden = place[:, block_of] < hidden  # [B, H * W]
    numbers = is_hidden.to(torch.uint8).argsort(dim=1, stable=True)
    kept = grid[0] * grid[1] - hidden * block * block
    return numbers[:, :kept], numbers[:, kept:]


def check_block(grid: tuple[int, int], block: int) -> None:
    """Refuse a block that does not tile the grid.

    Raises:
        UsageError: the message names the blocks that do.
    """
    if block < 1 or grid[0] % block or grid[1] % block or grid[0] * grid[1] == block * block:
        fitting = [b for b in range(1, min(grid)) if grid[0] % b == 0 and grid[1] % b == 0]
        raise UsageError(
            f"options.mask_block={block} does not tile the grid of {grid[0]}x{grid[1]} patches: "
            f"choose from {', '.join(map(str, fitting))}"
        )


def mask_words(
    input_ids: Tensor,
    attention_mask: Tensor,
    continuation: Tensor,
    special: Tensor,
    noise: Tensor,
    ratio: float,
) -> Tensor:
    """Hide whole words of tokenised captions; each caption with a word has at least one hidden.

    Args:
        input_ids: long [B, L].
        attention_mask: bool [B, L].
        continuation: bool [vocab_size], ids that go on with the word before.
        special: bool [vocab_size], ids that are never hidden.
        noise: uniform [B, L].
        ratio: share of words hidden, rounded in each caption.

    Returns:
        bool [B, L], the hidden positions.
    """
    goes_on = continuation[input_ids]
    word = _word_of(goes_on)
    starts = attention_mask & ~goes_on & ~special[input_ids]
    # A word's draw is that of its first token; what is no word comes last.
    draw = noise.masked_fill(~starts, 2.0)
    words = starts.sum(dim=1, keepdim=True)
    hidden = (words * ratio).round().clamp(min=1)
    place = draw.argsort(dim=1).argsort(dim=1)
    chosen_start = (place < hidden) & starts  # [B, L]
    by_word = torch.zeros(word.shape, dtype=torch.int32, device=word.device)
    by_word.scatter_add_(1, word, chosen_start.int())
    return by_word.gather(1, word).bool() & attention_mask & ~special[input_ids]


def drop_words(
    input_ids: Tensor, continuation: Tensor, special: Tensor, noise: Tensor, share: float
) -> Tensor:
    """As :func:`mask_words`, but each word is hidden by itself, with probability ``share``."""
    word = _word_of(continuation[input_ids])
    return (noise.gather(1, word) < share) & ~special[input_ids]


def _word_of(goes_on: Tensor) -> Tensor:
    """Long [B, L]: the number of the word that a token is of, from where one ``goes_on``."""
    return ((~goes_on).cumsum(dim=1) - 1).clamp(min=0)


def replace_hidden(
    input_ids: Tensor, hidden: Tensor, special: Tensor, noise: Tensor, mask_id: int
) -> Tensor:
    """Of the hidden tokens 80 % masked, 10 % another and 10 % as they are (BERT, sec. 3.1).

    Args:
        input_ids: long [B, L].
        hidden: bool [B, L].
        special: bool [vocab_size], ids that are never put in for another.
        noise: uniform [B, L, 2], for the choice and for the other token.
        mask_id: what stands for a masked token.

    Returns:
        Long [B, L].
    """
    ordinary = (~special).nonzero().squeeze(1)
    choice, draw = noise.unbind(dim=2)
    other = ordinary[(draw * len(ordinary)).long().clamp(max=len(ordinary) - 1)]  # [B, L]
    changed = torch.where(choice < 0.8, torch.full_like(input_ids, mask_id), other)
    return torch.where(hidden & (choice < 0.9), changed, input_ids)
