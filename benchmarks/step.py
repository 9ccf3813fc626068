"""The training step against the original VicVLM's and MAMO's: pairs a second, FLOPs, memory.

    python benchmarks/bench.py step

Sizes of the preset vicvlm-small-flickr30k (ViT-S/16 at 224 px, BERT-small 2 + 2), random weights,
made-up pairs, bf16 where the device has it. A step is the average over the preset's own schedule of
losses; one with every loss on stands beside it.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flops import operations
from original_vicvlm import OriginalStep
from rows import Row, alternate
from steps import DEVICE, Step, config_of, make_batch, without_exact_cuts

from vicvlm_cli.device import keep_freed_memory, supports_bf16

SMALL, PHOTOS = "vicvlm-small-flickr30k", "vicvlm-tiny-photos"
ON_GPU = DEVICE.type == "cuda"
ROWS = 256 if ON_GPU else 16
PHOTO_ROWS = 192
REPEATS, PHOTO_REPEATS = (20, 20) if ON_GPU else (5, 3)


def run() -> list[Row]:
    """All rows of the step."""
    memory = {name: peak_memory(name) for name in ("vicvlm", "original", "mamo")}
    if not ON_GPU:
        keep_freed_memory()  # as every training does
    rows = [*small_rows(), *photo_rows()]
    for name, bar in (("original", "<= 0.6"), ("mamo", "")):
        row = Row(f"peak memory, against {name}", memory["vicvlm"], memory[name], "MB", bar)
        rows.append(row)
    return rows


def small_rows() -> list[Row]:
    """ViT-S/16 and BERT-small: the preset against the original step and against MAMO."""
    step = Step(config_of(SMALL), ROWS)
    published = Step(config_of("published"), ROWS)
    schedule = step.schedule()
    calls: dict[str, Callable[[], None]] = {
        "original": make_original(),
        "mamo": Step(config_of(SMALL, "pretrain.objective=mamo"), ROWS),
        "published": published,
        "uncut": uncut(published),
        **{_name(active): (lambda a=active: step(a)) for active in schedule},
    }
    flops = {name: count_flops(name, call) for name, call in calls.items()}  # warms up, too
    seconds = alternate(announced(calls), REPEATS, warmup=0)
    seconds["step"] = averaged(seconds, schedule)
    flops["step"] = sum(share * flops[_name(active)] for active, share in schedule.items())
    dearest = _name(max(schedule, key=len))

    def speed(label: str, mine: str, theirs: str, bar: str = "") -> Row:
        return speed_row(label, seconds, mine, theirs, ROWS, bar)

    def work(label: str, mine: str, theirs: str, bar: str = "") -> Row:
        giga = [flops[name] / ROWS / 1e9 for name in (mine, theirs)]
        return Row(label, giga[0], giga[1], "GFLOP/pair", bar)

    return [
        speed("step, against original", "step", "original", ">= 2.0"),
        speed("step with every loss on, against original", dearest, "original"),
        speed("all losses on all rows, against original", "published", "original"),
        speed("exact cuts alone: all losses on all rows, with and without", "published", "uncut"),
        speed("step, against mamo", "step", "mamo", ">= 1.6"),
        speed("step with every loss on, against mamo", dearest, "mamo"),
        work("FLOPs of a step, against original", "step", "original", "<= 0.5"),
        work("FLOPs with every loss on, against original", dearest, "original"),
        work("FLOPs of all losses on all rows, against original", "published", "original"),
        work("FLOPs, exact cuts alone", "published", "uncut"),
        work("FLOPs of a step, against mamo", "step", "mamo"),
    ]


def photo_rows() -> list[Row]:
    """DeiT-Tiny at 128 px, the step of most experiments: what the exact cuts are worth there."""
    step = Step(config_of(PHOTOS), PHOTO_ROWS)
    schedule = step.schedule()
    calls: dict[str, Callable[[], None]] = {}
    for active in schedule:
        calls[_name(active)] = lambda a=active: step(a)
        calls["uncut " + _name(active)] = uncut(lambda a=active: step(a))
    seconds = alternate(announced(calls), PHOTO_REPEATS)
    seconds["step"] = averaged(seconds, schedule)
    seconds["uncut"] = averaged(seconds, schedule, "uncut ")
    dearest = _name(max(schedule, key=len))
    return [
        speed_row(f"{PHOTOS}: exact cuts", seconds, "step", "uncut", PHOTO_ROWS),
        speed_row(
            f"{PHOTOS}: exact cuts, every loss on", seconds, dearest, f"uncut {dearest}", PHOTO_ROWS
        ),
    ]


def make_original() -> OriginalStep:
    """The original step on the same pairs."""
    batch = make_batch(config_of(SMALL, "model.max_tokens=35"), ROWS)
    return OriginalStep(batch, supports_bf16(DEVICE))


def uncut(call: Callable[[], None]) -> Callable[[], None]:
    """The same without the cuts that leave results as they are."""

    def slow() -> None:
        with without_exact_cuts():
            call()

    return slow


def announced(calls: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """The same, each waiting for the device and telling what it took."""

    def telling(name: str, call: Callable[[], None]) -> Callable[[], None]:
        def waiting() -> None:
            began = time.perf_counter()
            call()
            if ON_GPU:
                torch.cuda.synchronize()
            _tell(f"{name}: {time.perf_counter() - began:.2f} s")

        return waiting

    return {name: telling(name, call) for name, call in calls.items()}


def averaged(
    seconds: dict[str, list[float]], schedule: dict[frozenset[str], float], prefix: str = ""
) -> list[float]:
    """Turn by turn, the mean time of a step over the schedule."""
    parts = [[share * s for s in seconds[prefix + _name(a)]] for a, share in schedule.items()]
    return [sum(turn) for turn in zip(*parts, strict=True)]


def speed_row(
    label: str, seconds: dict[str, list[float]], mine: str, theirs: str, pairs: int, bar: str = ""
) -> Row:
    """Pairs a second; the ratio is the median of the turns'."""
    ratios = [b / a for a, b in zip(seconds[mine], seconds[theirs], strict=True)]
    against = pairs / statistics.median(seconds[theirs])
    value = statistics.median(ratios) * against
    return Row(label, value, against, "pairs/s", bar, spread=(min(ratios), max(ratios)))


def count_flops(name: str, call: Callable[[], None]) -> int:
    """Floating point operations of matrix products, convolutions and attention in one call."""
    total = operations(call)
    _tell(f"{name}: {total / 1e9:.0f} GFLOP")
    return total


def peak_memory(name: str) -> float:
    """Megabytes that a process of its own takes for a few steps, weights and optimiser in."""
    out = subprocess.check_output([sys.executable, __file__, name], text=True)
    peak = float(out.split()[-1])
    _tell(f"{name}: {peak:.0f} MB")
    return peak


def _measure_peak(name: str) -> float:
    """On a GPU the allocator's peak; else that of the process, less what the imports take."""
    before = _resident()
    step: Callable[[], None]
    if name == "original":
        step = make_original()
    else:
        overrides = ("pretrain.objective=mamo",) if name == "mamo" else ()
        step = Step(config_of(SMALL, *overrides), ROWS)
        if not ON_GPU:
            keep_freed_memory()
    for _ in range(2):  # the optimiser's state is there from the end of the first
        step()
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _tell(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def _name(active: frozenset[str]) -> str:
    return "+".join(sorted(active))


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1]))
