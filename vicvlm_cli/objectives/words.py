"""The words of a picture's captions, predicted from one vector (SuperClass, arXiv 2411.03313)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.ranks import gather, global_mean


class WordPrediction(nn.Module):
    """A linear classifier of words, the same for features of pictures and of captions.

    Masked language modelling with every word hidden: no fusion, no further pass. A word counts for
    what it tells, its inverse document frequency (SuperClass, sec. 3.2).

    Args:
        width: P, of the features.
        special: bool [vocab_size], tokens that are no words.
    """

    special: Tensor
    pictures: Tensor
    with_word: Tensor
    mass: Tensor

    def __init__(self, width: int, special: Tensor) -> None:
        super().__init__()
        vocab_size = len(special)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("special", special, persistent=False)
        # Counted as training goes: how many pictures there were, how many with each word, and how
        # much of all targets each word was, the trivial guess.
        self.register_buffer("pictures", torch.ones(()))
        self.register_buffer("with_word", torch.ones(vocab_size))
        self.register_buffer("mass", torch.full((vocab_size,), 1 / vocab_size))

    def forward(self, features: list[Tensor], words: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of all processes' pictures, and its trivial value.

        Args:
            features: [B, P] each, of unit length: of the same B pictures, or captions of them.
            words: long [B, W], the tokens of all of their captions, in any order and number.
        """
        present = self._present(words)
        if self.training:
            self.pictures += len(gather(words.new_zeros(len(words), 1)))
            self.with_word += gather(present.sum(0, keepdim=True)).sum(0)
        target = present * (self.pictures / self.with_word).log()
        target = target / target.sum(1, keepdim=True).clamp(min=1e-6)
        if self.training:
            self.mass += gather(target.sum(0, keepdim=True)).sum(0)
        guess = (self.mass / self.mass.sum()).log().expand_as(target)
        # Unit vectors are short: at the length of a layer norm's the head learns at its usual rate.
        logits = [self.head(x * x.shape[1] ** 0.5) for x in features]
        total = torch.stack([losses.words_sum(x, target) for x in logits]).mean()
        return global_mean(total, len(words)), -(target * guess).sum(1).mean()

    def _present(self, words: Tensor) -> Tensor:
        """Float [B, vocab_size], 1 where a picture has the word."""
        present = torch.zeros(len(words), len(self.special), device=words.device)
        return present.scatter_(1, words, 1.0).masked_fill(self.special, 0.0)
