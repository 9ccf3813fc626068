"""The words of a picture's captions, told from one vector (SuperClass, arXiv 2411.03313)."""

from __future__ import annotations

from collections.abc import Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.beside import FirstProjections
from vicvlm_cli.objectives.masked_language import token_kinds
from vicvlm_cli.objectives.ranks import gather, global_mean, world_size
from vicvlm_cli.objectives.retrieval import Losses


class WordPrediction(nn.Module):
    """A linear classifier of words, the same for features of pictures and of captions.

    Masked language modelling with every word hidden: no fusion, no further pass. A word counts for
    what it tells, its inverse document frequency (SuperClass, sec. 3.2).

    Args:
        model: whose features; it is the objective's, not this module's.
    """

    LOSSES = ("words",)
    special: Tensor
    pictures: Tensor
    with_word: Tensor
    mass: Tensor

    def __init__(self, model: RetrievalModel, tokenizer: Tokenizer) -> None:
        super().__init__()
        vocab_size = model.config.vocab_size
        self.projections = FirstProjections(model)
        self.head = nn.Linear(model.config.projection_dim, vocab_size)
        special, _ = token_kinds(tokenizer, vocab_size)
        self.register_buffer("special", special, persistent=False)
        # Counted as training goes, from one picture that has every word: how many pictures there
        # were, how many with each word, and how much of all targets each word was.
        self.register_buffer("pictures", torch.ones(()))
        self.register_buffer("with_word", torch.ones(vocab_size))
        self.register_buffer("mass", torch.full((vocab_size,), 1 / vocab_size))

    def forward(self, active: Set[str], batch: Batch) -> Losses:
        """The loss of all processes' pictures, the mean of both sides, and its trivial value."""
        assert batch.words is not None
        features = torch.stack(self.projections.of(batch))  # [2, B, P]
        target, guess = self._target(batch.words)
        # Unit vectors are short: at the length of a layer norm's the head learns at its usual rate.
        logits = self.head(F.normalize(features, dim=-1) * features.shape[-1] ** 0.5)
        total = torch.stack([losses.mlm_sum(x, target) for x in logits]).mean()
        return (
            {"words": global_mean(total, len(target))},
            {"words": -(target * guess).sum(1).mean()},
        )

    @torch.no_grad()
    def _target(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """How much each word counts for pictures of ``words`` [B, W], float [B, vocab_size].

        And the logarithm of the mean of all targets so far [vocab_size], the trivial guess.
        """
        present = torch.zeros(len(words), len(self.special), device=words.device)
        present = present.scatter_(1, words, 1.0).masked_fill(self.special, 0.0)
        if self.training:
            self.pictures += world_size() * len(words)
            self.with_word += gather(present.sum(0, keepdim=True)).sum(0)
        target = present * (self.pictures / self.with_word).log()
        target = target / target.sum(1, keepdim=True).clamp(min=1e-6)
        if self.training:
            self.mass += gather(target.sum(0, keepdim=True)).sum(0)
        return target, (self.mass / self.mass.sum()).log()
