"""Batches: their order, their partition over processes, and where a run goes on."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, make_tokenizer

from vicvlm_cli.data.batches import Batch, Plan, Rows, batches, load_size
from vicvlm_cli.data.decoded import make_decoded
from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.errors import OwnError, UserError
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import DataConfig

COUNTS = (3, 1, 2, 5, 1, 4, 2, 1)  # captions of eight pictures, 19 together


class FakeSplit:
    """Pictures of one shade each, and a count of how often each was decoded."""

    title = "fake train (8 images)"

    def __init__(self) -> None:
        self.captions = [
            [f"{CAPTIONS[i]} {'on the left' if k % 2 else ''}" for k in range(n)]
            for i, n in enumerate(COUNTS)
        ]
        self.decoded: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(COUNTS)

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        self.decoded[i] += 1
        return Image.new("RGB", (20, 30), (10 * i, 10 * i, 10 * i))


def plan(mode: str = "all", batch_size: int = 3, seed: int = 0, **ranks: int) -> Plan:
    return Plan(COUNTS, mode, batch_size, seed, **ranks)


def rows(plan: Plan, epoch: int, start: int = 0) -> list[list[tuple[int, int]]]:
    return [[(int(i), int(c)) for i, c in batch] for batch in plan.epoch(epoch, start)]


def make_rows(
    split: Any = None,
    size: int = 8,
    cache_bytes: int = 0,
    shared: bool = False,
    words: bool = False,
) -> Rows:
    split = FakeSplit() if split is None else split
    return Rows(split, make_tokenizer(), size, 24, cache_bytes, shared, words=words)


@pytest.mark.parametrize("mode", ["all", "one"])
def test_the_order_depends_on_seed_and_epoch_alone(mode: str) -> None:
    first = rows(plan(mode), 0)
    assert rows(plan(mode), 0) == first
    assert rows(plan(mode), 1) != first
    assert rows(plan(mode, seed=1), 0) != first
    np.random.seed(5)
    torch.manual_seed(5)
    assert rows(plan(mode), 0) == first


def test_all_pairs_come_once_an_epoch() -> None:
    pairs = [(i, c) for i, n in enumerate(COUNTS) for c in range(n)]
    whole = rows(plan(batch_size=1), 3)
    assert sorted(r for batch in whole for r in batch) == pairs
    assert [r for batch in whole for r in batch] != pairs  # and not in their order on disk
    batched = rows(plan(batch_size=4), 3)
    assert plan(batch_size=4).batches == len(batched) == 19 // 4
    seen = [r for batch in batched for r in batch]
    assert len(set(seen)) == len(seen) == 16  # what does not fill a batch waits


def test_one_caption_of_every_picture() -> None:
    seen: list[set[int]] = [set() for _ in COUNTS]
    orders = set()
    for epoch in range(60):
        flat = [r for batch in rows(plan("one", 2), epoch) for r in batch]
        assert sorted(i for i, _ in flat) == list(range(8))
        orders.add(tuple(i for i, _ in flat))
        for i, c in flat:
            seen[i].add(c)
    assert seen == [set(range(n)) for n in COUNTS]  # every caption has its turn
    assert len(orders) > 50


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_global_batch(mode: str, processes: int) -> None:
    one = rows(plan(mode, 2 * processes), 5)
    parts = [rows(plan(mode, 2, rank=rank, world_size=processes), 5) for rank in range(processes)]
    joint = [[row for part in step for row in part] for step in zip(*parts, strict=True)]
    assert joint == one


@pytest.mark.parametrize("mode", ["all", "one"])
def test_going_on_in_the_middle_is_the_rest_of_the_epoch(mode: str) -> None:
    whole = rows(plan(mode, 2), 7)
    for start in range(len(whole) + 1):
        assert rows(plan(mode, 2), 7, start) == whole[start:]


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_the_plan_says(workers: int, cache_bytes: int) -> None:
    split, tokenizer = FakeSplit(), make_tokenizer()
    source = make_rows(split, cache_bytes=cache_bytes, shared=workers > 0)
    schedule = plan(batch_size=4)
    # Two epochs; the second comes from the cache, if there is one.
    made = islice(batches(source, schedule, workers=workers), 2 * schedule.batches)
    for batch, wanted in zip(made, rows(schedule, 0) + rows(schedule, 1), strict=True):
        captions = [split.captions[i][c] for i, c in wanted]
        ids, mask = tokenizer(captions, 24)
        assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask, mask)
        assert batch.image_id.tolist() == [i for i, _ in wanted]
        assert batch.image.dtype == torch.uint8 and batch.image.shape == (4, 3, 8, 8)
        assert batch.image[:, 0, 0, 0].tolist() == [10 * i for i, _ in wanted]
        assert batch.flip_ok.tolist() == [c % 2 == 0 for _, c in wanted]


@pytest.mark.parametrize("start", [0, 4, 6, 15])
def test_the_loader_goes_on_where_a_run_stood(start: int) -> None:
    assert plan().batches == 6
    whole = list(islice(batches(make_rows(), plan()), 20))
    rest = list(islice(batches(make_rows(), plan(), start), 20 - start))
    for a, b in zip(whole[start:], rest, strict=True):
        assert torch.equal(a.image, b.image) and torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.image_id, b.image_id) and torch.equal(a.flip_ok, b.flip_ok)


@pytest.mark.parametrize("mode", ["all", "one"])
def test_further_captions_are_others_of_the_same_picture(mode: str) -> None:
    plain, schedule = plan(mode, 2), plan(mode, 2, more=3)
    chosen = set()
    for epoch in range(30):
        both = zip(plain.epoch(epoch), schedule.epoch(epoch), strict=True)
        for without, batch in both:
            assert batch.shape == (2, 5) and np.array_equal(batch[:, :2], without)
            for i, *captions in batch.tolist():
                assert set(captions) <= set(range(COUNTS[i]))
                assert len(set(captions)) == min(4, COUNTS[i])  # again only where there are too few
                chosen.add((i, *captions))
    assert len({c for c in chosen if c[0] == 5}) > 10  # in any order
    ranks = [plan(mode, 1, more=3, rank=r, world_size=2).epoch(4) for r in (0, 1)]
    joint = [np.concatenate(parts) for parts in zip(*ranks, strict=True)]
    assert np.array_equal(np.stack(joint), np.stack(schedule.epoch(4)))


def test_further_captions_come_with_the_batch() -> None:
    split, tokenizer = FakeSplit(), make_tokenizer()
    schedule = plan("one", 4, more=2)
    made = islice(batches(make_rows(split), schedule, schedule.batches), schedule.batches)
    for batch, wanted in zip(made, schedule.epoch(1), strict=True):
        further = [split.captions[i][c] for i, _, *more in wanted for c in more]
        ids, mask = tokenizer(further, 24)
        assert batch.more_ids is not None and batch.more_mask is not None
        assert torch.equal(batch.more_ids.flatten(0, 1), ids)
        assert torch.equal(batch.more_mask.flatten(0, 1), mask)
        assert batch.flip_ok.tolist() == [all(c % 2 == 0 for c in row[1:]) for row in wanted]
        part = batch.rows(slice(None, None, 2)).to(torch.device("cpu"))
        assert part.more_ids is not None and torch.equal(part.more_ids, batch.more_ids[::2])
        assert torch.equal(part.image, batch.image[::2])


def test_the_words_of_all_captions_come_with_the_batch() -> None:
    split, tokenizer = FakeSplit(), make_tokenizer()
    for batch in islice(batches(make_rows(split, words=True), plan("one", 4)), 2):
        assert batch.words is not None and batch.words.dtype == torch.long
        for picture, found in zip(batch.image_id.tolist(), batch.words, strict=True):
            ids, mask = tokenizer(split.captions[picture], 24)
            assert set(found.tolist()) - {tokenizer.pad_id} == set(ids[mask].tolist())
    assert next(iter(batches(make_rows(split), plan("one", 4)))).words is None


def test_pictures_that_fit_in_memory_are_decoded_once() -> None:
    split = FakeSplit()
    source = make_rows(split, size=8, cache_bytes=8 * 3 * 8 * 8)
    list(islice(batches(source, plan(batch_size=1)), 3 * 19))
    assert split.decoded == Counter(range(8))
    larger = FakeSplit()
    source = make_rows(larger, size=8, cache_bytes=8 * 3 * 8 * 8 - 1)
    list(islice(batches(source, plan(batch_size=1)), 19))
    assert larger.decoded == Counter(dict(enumerate(COUNTS)))


def test_what_a_loader_process_decodes_is_found_by_the_next() -> None:
    source = make_rows(cache_bytes=10**6, shared=True)
    assert source.decoded is not None and source.decoded.is_shared()
    list(islice(batches(source, plan(batch_size=1), workers=1), 19))
    assert bool(source.is_decoded.all())
    alone = make_rows(cache_bytes=10**6)
    assert alone.decoded is not None and not alone.decoded.is_shared()


def test_changing_a_batch_does_not_change_the_cache() -> None:
    source = make_rows(cache_bytes=10**6)
    next(batches(source, plan(batch_size=8))).image.fill_(255)
    again = next(batches(source, plan(batch_size=8)))
    assert again.image[:, 0, 0, 0].tolist() == [10 * i for i in again.image_id.tolist()]


def test_batches_from_the_file_are_those_that_are_decoded_anew(tiny_data: Path) -> None:
    split = PreparedDataset.open(tiny_data).split("train")
    file = make_decoded(split, 20, Progress(quiet=True))
    counts = tuple(len(group) for group in split.captions)
    schedule = Plan(counts, "all", 4, seed=0)
    source = Rows(split, make_tokenizer(), 20, 24, cache_bytes=10**9, decoded=file)
    assert source.decoded is None  # one cache, not two
    travelled = pickle.loads(pickle.dumps(source))  # as to the processes of other systems
    slow = Rows(split, make_tokenizer(), 20, 24)
    made = [islice(batches(r, schedule), 12) for r in (source, travelled, slow)]
    for a, b, c in zip(*made, strict=True):
        assert torch.equal(a.image, c.image) and torch.equal(b.image, c.image)
        assert torch.equal(a.input_ids, c.input_ids)
    assert len(pickle.dumps(file)) < 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shards_are_named(
    workers: int, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def image(*_: object, **__: object) -> None:
        raise BadImage("truncated")

    split = PreparedDataset.open(tiny_data).split("train")
    monkeypatch.setattr(Split, "image", image)
    source, schedule = Rows(split, make_tokenizer(), 20, 24), Plan((5,) * 8, "all", 4, seed=0)
    with pytest.raises(OwnError, match="^image .* is truncated: the shards are damaged") as told:
        next(batches(source, schedule, workers=workers))
    assert "\n" not in str(told.value)  # a sentence, and not the trace of a loader process


def test_a_split_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match="fake train .* does not fill one batch of 10 x 2"):
        batches(make_rows(), plan(batch_size=10, world_size=2))


def test_pictures_are_loaded_larger_only_for_crops() -> None:
    assert load_size(64, DataConfig(crop_scale=1.0)) == 64
    assert load_size(64, DataConfig(crop_scale=0.5)) == 72


def test_a_batch_moves_as_a_whole() -> None:
    batch = next(batches(make_rows(), plan()))
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {x.device.type for x in moved.__dict__.values() if x is not None} == {"meta"}
    full = next(batches(make_rows(words=True), plan(more=1)))
    full.begun = torch.zeros(len(full.image), 5, 4)
    more = full.to(torch.device("meta"))
    assert {x.device.type for x in more.__dict__.values()} == {"meta"}
