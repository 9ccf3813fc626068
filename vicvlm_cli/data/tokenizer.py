"""Captions to token ids: a WordPiece vocabulary trained on captions, or a BERT's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vicvlm_cli.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TEXTS_AT_A_TIME = 1024  # the backend's own records are a hundred times the size of their ids


@dataclass(frozen=True)
class Tokens:
    """Token ids of n texts without padding, 4 bytes each: ``ids`` [N], ``starts`` [n + 1]."""

    ids: np.ndarray
    starts: np.ndarray
    pad_id: int

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """``input_ids`` [B, L] long and ``attention_mask`` [B, L] bool of texts ``index`` [B].

        L is the longest of them.
        """
        starts = self.starts[index]
        lengths = self.starts[index + 1] - starts
        place = np.arange(lengths.max(initial=0))
        mask = place < lengths[:, None]  # [B, L]
        ids = self.ids[starts[:, None] + place.clip(max=lengths[:, None] - 1)]
        return (
            torch.from_numpy(np.where(mask, ids, self.pad_id).astype(np.int64)),
            torch.from_numpy(mask),
        )


class Tokenizer:
    """A BERT-style WordPiece tokenizer held as one JSON text, so that a checkpoint can carry it."""

    def __init__(self, backend: Backend) -> None:
        ids = {t: i for t in SPECIAL if (i := backend.token_to_id(t)) is not None}
        if missing := [t for t in SPECIAL if t not in ids]:
            raise UserError(
                f"the tokenizer has no {', '.join(missing)}: use one of a BERT (WordPiece) model"
            )
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[t] for t in SPECIAL)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """A lower-casing WordPiece vocabulary of at most ``vocab_size`` learned from captions."""
        captions = list(captions)
        backend = _pipeline(models.WordPiece(unk_token="[UNK]"))
        chunks = {chunk for caption in captions for chunk in caption.split()}  # each once: faster
        text = backend.normalizer.normalize_str(" ".join(chunks))
        words = {word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
        # The trainer numbers the signs in the order of a hash table, another one in every process.
        # Given beforehand they have fixed numbers, and so has everything that is built of them.
        signs = sorted({sign for word in words for sign in word})
        inner = sorted({f"##{sign}" for word in words for sign in word[1:]})
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *signs, *inner], show_progress=False
        )
        backend.train_from_iterator(captions, trainer)
        return cls(_of_vocabulary(backend.get_vocab(with_added_tokens=True)))

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> Tokenizer:
        """The tokenizer of a transformers BERT, by hub name or local folder.

        Raises:
            UserError: it cannot be loaded, or is not WordPiece.
        """
        from transformers import AutoTokenizer, BertTokenizerFast
        from transformers.utils import cached_file

        troubles = (OSError, ValueError, ImportError)  # the last: no protobuf
        try:
            loaded: Any = AutoTokenizer.from_pretrained(name_or_path)
        except troubles:
            # The configuration of old BERTs, prajjwal1/bert-small among them, does not say what
            # they are, and transformers guesses no more.
            try:
                cached_file(name_or_path, "vocab.txt")  # without it a BERT's would have no words
                loaded = BertTokenizerFast.from_pretrained(name_or_path)
            except troubles as error:
                raise UserError(
                    f"no tokenizer could be loaded from {name_or_path!r}: name a BERT on the hub, "
                    "or a local folder with tokenizer.json or vocab.txt"
                ) from error
        return cls.from_json(loaded.backend_tokenizer.to_str())

    @classmethod
    def load(cls, text_encoder: str) -> Tokenizer:
        """The tokenizer of ``text_encoder``; a local folder that holds only vocab.txt will do."""
        folder = Path(text_encoder)
        if (folder / "vocab.txt").is_file() and not (folder / "tokenizer_config.json").is_file():
            lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
            return cls(_of_vocabulary({token: i for i, token in enumerate(lines)}))
        return cls.from_pretrained(text_encoder)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of :meth:`to_json`.

        Raises:
            UserError: the text is damaged, or not of a WordPiece tokenizer.
        """
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # tokenizers raises nothing more particular
            raise UserError(f"the tokenizer is damaged: {error}") from error
        return cls(backend)

    def to_json(self) -> str:
        """The whole tokenizer as one JSON text."""
        return self.backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self.backend.get_vocab_size()

    def continuation(self) -> Tensor:
        """Bool [vocab_size]: the ids that go on with the word before them (``##ing``)."""
        flags = torch.zeros(self.vocab_size, dtype=torch.bool)
        for token, index in self.backend.get_vocab().items():
            flags[index] = token.startswith("##")
        return flags

    def special_ids(self) -> tuple[int, ...]:
        """Ids that are never masked."""
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """``input_ids`` [B, L] long and ``attention_mask`` [B, L] bool, L the longest of the batch.

        Texts over ``max_tokens`` lose their end, never their [SEP].
        """
        return self.tokens(texts, max_tokens).batch(np.arange(len(texts)))

    def tokens(self, texts: Sequence[str], max_tokens: int) -> Tokens:
        """All texts at once, to make batches of; cut as by calling the tokenizer."""
        ids, lengths = [np.empty(0, np.int32)], [0]
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            encoded = self.backend.encode_batch_fast(texts[start : start + TEXTS_AT_A_TIME])
            for row in (e.ids for e in encoded):
                if len(row) > max_tokens:
                    row = [*row[: max_tokens - 1], self.sep_id]
                ids.append(np.array(row, np.int32))
                lengths.append(len(row))
        return Tokens(np.concatenate(ids), np.cumsum(lengths), self.pad_id)


def _pipeline(model: models.WordPiece) -> Backend:
    """What BERT does around a vocabulary: lower case, words and signs apart."""
    backend = Backend(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _of_vocabulary(vocabulary: dict[str, int]) -> Backend:
    """A BERT tokenizer of the given tokens and ids."""
    backend = _pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"))
    if "[SEP]" in vocabulary and "[CLS]" in vocabulary:  # else the tokenizer will be refused
        sep, cls = (("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
        backend.post_processor = processors.BertProcessing(sep, cls)
    backend.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return backend
