"""Training batches with an order that depends on the seed and the epoch alone.

The order of the *global* batch is fixed first and each process takes its rows of it, so that one
process on the joint batch sees what several see together, and a run resumes at the exact batch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vicvlm_cli.data.decoded import DecodedFile, decode
from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.data.transforms import CROP_MARGIN, names_no_side
from vicvlm_cli.errors import OwnError, UserError
from vicvlm_cli.settings import DataConfig

AHEAD = 4  # batches made before they are asked for, by each process


@dataclass
class Batch:
    """What every objective eats.

    ``image`` uint8 (float after augmentation) [B, 3, S, S]; ``input_ids`` long and
    ``attention_mask`` bool [B, L]; ``image_id`` long [B], equal where two captions share a
    picture; ``flip_ok`` bool [B], whether the mirrored picture still fits its captions.
    ``more_ids`` and ``more_mask`` [B, E, M]: E further captions of each picture, or None. ``begun``
    [B, N, D]: what the image encoder's frozen blocks make of the pictures, or None. ``words`` long
    [B, W]: the tokens of all captions of each picture, special ones among them, or None.
    """

    image: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_id: Tensor
    flip_ok: Tensor
    more_ids: Tensor | None = None
    more_mask: Tensor | None = None
    begun: Tensor | None = None
    words: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked copies, for the loader's ``pin_memory``."""
        return self._each(Tensor.pin_memory)

    def rows(self, which: slice) -> Batch:
        """Some of the rows."""
        return self._each(lambda x: x[which])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = {k: v for k, v in self.__dict__.items() if v is not None}
        return Batch(**{k: change(v) for k, v in given.items()})


@dataclass(frozen=True)
class Plan:
    """Which rows (picture, caption, ``more`` further captions of it) make up an epoch's batches.

    For one process of several. Further captions are others of the same picture, chosen by chance;
    a picture that has too few gives some of them again.
    """

    captions: tuple[int, ...]  # captions of each picture
    mode: str  # "one" or "all"
    batch_size: int  # rows a process
    seed: int
    rank: int = 0
    world_size: int = 1
    more: int = 0

    @property
    def batches(self) -> int:
        """Batches an epoch; the rest of the rows wait for another epoch's shuffle."""
        rows = len(self.captions) if self.mode == "one" else sum(self.captions)
        return rows // (self.batch_size * self.world_size)

    def require_a_batch(self, split: Split) -> None:
        """Refuse a ``split`` that is smaller than one batch.

        Raises:
            UserError: it is; the message says what to lower.
        """
        if self.batches == 0:
            raise UserError(
                f"{split.title} does not fill one batch of {self.batch_size} x {self.world_size} "
                "processes: lower --batch-size"
            )

    def epoch(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """Rows [B, 2 + more] of each batch of this process, from batch ``start`` on."""
        rng = np.random.default_rng((self.seed, epoch))
        counts = np.asarray(self.captions)
        if self.mode == "one":
            pictures = rng.permutation(len(counts))
            rows = np.stack([pictures, (rng.random(len(counts)) * counts[pictures]).astype(int)], 1)
        else:
            pictures = np.repeat(np.arange(len(counts)), counts)
            offsets = np.arange(len(pictures)) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = rng.permutation(np.stack([pictures, offsets], 1))
        if self.more:
            rows = np.concatenate([rows, self._further(rows, counts[rows[:, 0]], rng)], 1)
        size = self.batch_size * self.world_size
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [rows[b * size : (b + 1) * size][mine] for b in range(start, self.batches)]

    def _further(
        self, rows: np.ndarray, counts: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Further captions [N, more] of rows [N, 2] whose pictures have ``counts`` [N] of them."""
        draw = rng.random((len(rows), int(counts.max())))
        draw[np.arange(draw.shape[1]) >= counts[:, None]] = 2  # there is no such caption
        draw[np.arange(len(rows)), rows[:, 1]] = -1  # the row's own comes first
        place = np.arange(1, self.more + 1) % counts[:, None]
        return np.take_along_axis(draw.argsort(1), place, 1)

    def endless(self, start: int = 0) -> Iterator[np.ndarray]:
        """The batches of all epochs in a row, from the run's ``start``-th on."""
        first, within = divmod(start, self.batches)
        yield from self.epoch(first, within)
        for epoch in count(first + 1):
            yield from self.epoch(epoch)


class Rows(Dataset[Batch]):
    """Loads a whole batch at once: an index is a batch's rows.

    Captions are tokenised once. Pictures come from ``decoded`` if it is given; else they are
    decoded once and kept in memory if all of them fit in ``cache_bytes``; else every time.

    Args:
        size: side in pixels of the loaded pictures, see :func:`load_size`.
        max_tokens: longest caption, in tokens.
        shared: keep them where what one loader process decodes the others find. Containers have
            little of such memory, so not without loader processes.
        words: batches come with the tokens of all captions of their pictures.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer,
        size: int,
        max_tokens: int,
        cache_bytes: int = 0,
        shared: bool = False,
        decoded: DecodedFile | None = None,
        words: bool = False,
    ) -> None:
        self.split, self.size, self.file, self.with_words = split, size, decoded, words
        captions = [caption for group in split.captions for caption in group]
        self.tokens = tokenizer.tokens(captions, max_tokens)
        self.flip_ok = np.array([names_no_side(caption) for caption in captions])
        self.first = np.cumsum([0, *(len(group) for group in split.captions)])  # of each picture
        self.decoded: Tensor | None = None
        if decoded is None and len(split) * 3 * size * size <= cache_bytes:
            self.decoded = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
            self.is_decoded = torch.zeros(len(split), dtype=torch.bool)
            if shared:
                self.decoded.share_memory_()
                self.is_decoded.share_memory_()

    def images(self, index: np.ndarray) -> Tensor:
        """Pictures ``index`` [B] as uint8 [B, 3, size, size], a copy."""
        # Gathered by numpy, which asks for huge pages: several times faster than torch.stack.
        if self.file is not None:
            return torch.from_numpy(self.file.pixels[index])
        if self.decoded is None:
            return torch.from_numpy(
                np.stack([decode(self.split, int(i), self.size) for i in index])
            )
        for i in index[~self.is_decoded.numpy()[index]]:
            self.decoded[i] = torch.from_numpy(decode(self.split, int(i), self.size))
            self.is_decoded[i] = True
        return torch.from_numpy(self.decoded.numpy()[index])

    def words(self, index: np.ndarray) -> Tensor:
        """Tokens of all captions of pictures ``index`` [B], long [B, W]."""
        first, after = self.first[index][:, None], self.first[index + 1][:, None]
        most = int((after - first).max())
        captions = np.minimum(first + np.arange(most), after - 1)  # of the last caption again
        return self.tokens.batch(captions.flatten())[0].view(len(index), -1)  # [B, most * L]

    def __getitem__(self, rows: np.ndarray) -> Batch:
        captions = self.first[rows[:, :1]] + rows[:, 1:]  # [B, 1 + more]
        input_ids, attention_mask = self.tokens.batch(captions[:, 0])
        batch = Batch(
            image=self.images(rows[:, 0]),
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_id=torch.from_numpy(rows[:, 0].astype(np.int64)),
            flip_ok=torch.from_numpy(self.flip_ok[captions].all(1)),
            words=self.words(rows[:, 0]) if self.with_words else None,
        )
        more = rows.shape[1] - 2
        if more:
            ids, mask = self.tokens.batch(captions[:, 1:].flatten())  # [B * more, M]
            batch.more_ids = ids.view(len(rows), more, -1)
            batch.more_mask = mask.view(len(rows), more, -1)
        return batch


def load_size(image_size: int, data: DataConfig) -> int:
    """Side of the loader's pictures: larger than the model's where random crops want room."""
    return round(image_size * CROP_MARGIN) if data.crop_scale < 1 else image_size


def batches(
    rows: Rows, plan: Plan, start: int = 0, *, workers: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """The batches of this process, epoch after epoch without end, from the run's ``start``-th on.

    One loader for all epochs: its ``workers`` processes stay, and none waits for an epoch's first
    batches. Pictures that need no decoding come from a thread instead: handing them over from
    another process takes ten times as long as gathering them.

    Raises:
        UserError: the split is smaller than one batch.
        OwnError: as the batches come, pictures of this process are damaged.
    """
    plan.require_a_batch(rows.split)
    if rows.file is not None:
        return _ahead(rows, plan.endless(start), pin)
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Handed(rows),
        batch_size=None,
        sampler=plan.endless(start),
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=AHEAD if workers else None,
        worker_init_fn=_apart if workers else None,
    )
    return _raised(iter(loader))


class _Handed(Dataset[Batch | UserError]):
    """``rows``, with a user's mistake as a value: a loader process makes one raised a traceback."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, rows: np.ndarray) -> Batch | UserError:
        try:
            return self.rows[rows]
        except UserError as error:
            return error


def _raised(loaded: Iterator[Batch | UserError]) -> Iterator[Batch]:
    """The batches that were ``loaded``.

    Raises:
        OwnError: one of them was a mistake.
    """
    for batch in loaded:
        if isinstance(batch, UserError):
            raise OwnError(str(batch))
        yield batch


def _apart(_: int) -> None:
    """Out of reach of signals to the process group of a training, which acts at a step's end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _ahead(rows: Rows, sampler: Iterator[np.ndarray], pin: bool) -> Iterator[Batch]:
    """Batches made by one thread while those before them are used."""

    def load() -> Batch:
        batch = rows[next(sampler)]
        return batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque(pool.submit(load) for _ in range(AHEAD))
        while True:
            yield waiting.popleft().result()
            waiting.append(pool.submit(load))
