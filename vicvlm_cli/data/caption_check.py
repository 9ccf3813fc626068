"""What a tokenizer loses of a data set's captions, told before a training begins."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable

import numpy as np

from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.text_encoder import POSITIONS

SAMPLE = 10_000  # captions: a fraction of a second
TOLD = 0.01  # share of the captions above which it is told


def caption_warning(
    captions: Iterable[list[str]], tokenizer: Tokenizer, max_tokens: int, pretrained: bool
) -> str | None:
    """How many captions are cut at ``max_tokens`` or are not read at all, and what to set.

    Args:
        captions: those of every picture, of which a sample is looked at.
        pretrained: whether tokenizer and text encoder are those of a pretrained BERT.

    Returns:
        None where both shares are at most 1 %.
    """
    texts = [caption for group in captions for caption in group]
    texts = random.Random(0).sample(texts, min(len(texts), SAMPLE))
    if not texts:
        return None
    tokens = tokenizer.tokens(texts, sys.maxsize)
    lengths = np.diff(tokens.starts)
    known = ~np.isin(tokens.ids, (tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id))
    unread = np.diff(np.append(0, known.cumsum())[tokens.starts]) == 0
    told = []
    if (share := np.mean(lengths > max_tokens)) > TOLD:
        enough = int(np.quantile(lengths, 1 - TOLD, method="higher"))
        enough = min(enough, POSITIONS) if pretrained else enough
        keep = f"--set model.max_tokens={enough} keeps more of them"
        mend = keep if enough > max_tokens else "a pretrained BERT reads no more, shorten them"
        told.append(f"{share:.0%} of the captions are cut at {max_tokens} tokens: {mend}")
    if (share := np.mean(unread)) > TOLD:
        other = "name a --text-encoder of their language, or none: --set 'model.text_encoder=\"\"'"
        mend = other if pretrained else "put spaces between their words"
        told.append(f"{share:.0%} of the captions have no word that the tokenizer knows: {mend}")
    return "; ".join(told) or None
