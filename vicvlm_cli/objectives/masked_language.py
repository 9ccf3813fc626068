"""Masked language modelling: whole words hidden, their tokens predicted (BERT, 1810.04805)."""

from __future__ import annotations

import torch
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.heads import MLMHead
from vicvlm_cli.objectives.masking import mask_words, replace_hidden
from vicvlm_cli.objectives.ranks import Noise, global_mean


def token_kinds(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Bool [vocab_size] twice: ids that are never hidden, and ids that go on with a word."""
    special = torch.zeros(vocab_size, dtype=torch.bool)
    special[list(tokenizer.special_ids())] = True
    continuation = torch.zeros_like(special)
    continuation[: tokenizer.vocab_size] = tokenizer.continuation()
    return special, continuation


def hide_words(
    batch: Batch,
    special: Tensor,
    continuation: Tensor,
    noise: Noise,
    *,
    ratio: float,
    max_tokens: int,
    mask_id: int,
    as_bert: bool = False,
) -> tuple[Tensor, Tensor]:
    """The captions with a share ``ratio`` of their words replaced by ``mask_id``.

    ``as_bert``: 80 % of their tokens are, 10 % become others, 10 % stay: :func:`replace_hidden`.

    Returns:
        Long [B, L] ids to encode, and bool [B, L], the positions that are hidden.
    """
    # Noise for max_tokens columns: as many whatever the longest caption of a process is.
    rows, length = batch.input_ids.shape
    draw = noise.rand(rows, max_tokens)[:, :length]
    hidden = mask_words(batch.input_ids, batch.attention_mask, continuation, special, draw, ratio)
    if not as_bert:
        return batch.input_ids.masked_fill(hidden, mask_id), hidden
    choice = noise.rand(rows, max_tokens, 2)[:, :length]
    return replace_hidden(batch.input_ids, hidden, special, choice, mask_id), hidden


def positions(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Where bool [B, L] is True, in ascending order: long [B, R], and bool [B, R], True at these.

    R is the largest number in a row; rows with fewer are filled up with others.
    """
    number = hidden.sum(1)
    most = max(int(number.max()), 1)
    order = (~hidden).to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :most], torch.arange(most, device=hidden.device) < number[:, None]


def word_loss(
    head: MLMHead, tokens: Tensor, table: Tensor, target: Tensor, counts: Tensor, *, count: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy at the hidden positions of all processes.

    Args:
        tokens: [M, D], what the encoder made of the hidden positions.
        table: [vocab_size, D], the output table.
        target: long [M], the hidden tokens.
        counts: [vocab_size], how often each token was a hidden one, the trivial guess.
        count: whether to add these to ``counts``, in place.

    Returns:
        The loss, and its trivial value, that of guessing by ``counts``.
    """
    loss = global_mean(losses.mlm_sum(head(tokens, table), target), len(target))
    if count:
        counts += torch.bincount(target, minlength=len(counts))
    frequency = counts / counts.sum()
    return loss, -frequency[target].log().mean()
