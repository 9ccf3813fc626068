"""A trace of a few training steps: each part of a step under its name, each operator's cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, record_function, schedule

from vicvlm_cli.errors import UserError
from vicvlm_cli.report.profile import Cost, Profile
from vicvlm_cli.report.progress import Progress

T = TypeVar("T")
# The first steps compile kernels and fill caches, and the last of them the profiler's own.
SKIPPED, RECORDED = 5, 5
OPERATORS = 10  # shown


def trace_file(given: Path, kind: str) -> Path:
    """The file to write: ``given`` if it ends in .json or .json.gz, else one in this folder.

    Args:
        kind: what is traced; names the file in a folder.

    Raises:
        UserError: the folder is not there, or nothing can be written into it.
    """
    is_file = given.name.endswith((".json", ".json.gz"))
    path = given if is_file else given / f"{kind}-trace.json.gz"
    probe = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if not path.parent.is_dir():
            hint = "" if is_file else ", or name a file that ends in .json or .json.gz"
            raise UserError(
                f"--profile {given}: there is no folder {path.parent}; make it first{hint}"
            )
        if path.is_dir():
            raise UserError(
                f"--profile {given} is a folder with the name of a file: choose another"
            )
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # the last: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--profile {given}: {path.parent} cannot be written to ({reason}); choose another "
            "place"
        ) from error
    return path


class Recorder:
    """Profiles the steps after the first ``SKIPPED``; a context around a training's loop.

    Without a path it does nothing. The trace is written as soon as ``RECORDED`` steps are over, or
    at the end of a run that is shorter; then ``profile`` is set. A trace that cannot be written is
    a warning: a training is worth more.
    """

    def __init__(self, path: Path | None, device: torch.device, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.profile: Profile | None = None
        self._on_gpu = device.type == "cuda"
        self._profiler: torch.profiler.profile | None = None
        self._steps, self._began, self._ended = 0, 0.0, 0.0
        # Of whole steps: seconds on the host, and events in the GPU's queue.
        self._parts: dict[str, list[float]] = {}
        self._marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        # Of the step that is not over, and may never be.
        self._unfinished: list[tuple[str, float, torch.cuda.Event | None, torch.cuda.Event | None]]
        self._unfinished = []

    def __enter__(self) -> Recorder:
        if self.path is not None:
            # Else the tracer says on stderr that it starts and stops, and where it found no GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            activities = [ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(
                activities=activities + [ProfilerActivity.CUDA] * self._on_gpu,
                schedule=schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1),
                on_trace_ready=self._keep,
                record_shapes=True,
                profile_memory=True,
            )
            self._profiler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler is None:
            return
        self._stop()
        if self.profile is None and kind is None and self._steps == 0:
            self.progress.say(
                f"no profile was written: the run was over after {SKIPPED} steps or less, which "
                "are not recorded"
            )

    @property
    def _recording(self) -> bool:
        now = self._profiler.current_action if self._profiler is not None else None
        return now in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)

    def part(self, name: str) -> AbstractContextManager[None]:
        """A context that is a part of the step, by this name in trace and table."""
        return self._part(name) if self._recording else nullcontext()

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        # Measured here as well: the trace's ranges do not see what autograd's threads launch, and
        # events in the GPU's own queue do.
        first = self._mark()
        began = time.perf_counter()
        try:
            with record_function(name):
                yield
        finally:
            spent = time.perf_counter() - began
            self._unfinished.append((name, spent, first, self._mark()))

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waiting(self, items: Iterator[T]) -> Iterator[T]:
        """``items``, the time until each comes as the part "data wait"."""
        while True:
            with self.part("data wait"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def step(self) -> None:
        """Once an optimiser step, at its end."""
        if self._profiler is None:
            return
        recorded = self._recording
        if recorded:
            self._steps += 1
            self._ended = time.perf_counter()
            for name, spent, first, last in self._unfinished:
                self._parts.setdefault(name, []).append(spent)
                if first is not None and last is not None:
                    self._marks.setdefault(name, []).append((first, last))
            self._unfinished = []
        self._profiler.step()
        if not recorded and self._recording:
            self._began = time.perf_counter()
        elif recorded and not self._recording:
            self._stop()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _keep(self, profiler: torch.profiler.profile) -> None:
        """Writes the trace, and counts what the steps in it cost."""
        if self._steps == 0 or self.path is None:  # stopped before the end of the first
            return
        beside = self.path.with_name(f".part.{self.path.name}")  # .gz is gone by
        try:
            profiler.export_chrome_trace(str(beside))
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            self.progress.say(f"warning: the profile {self.path} was not written: {error}")
            return
        step_ms = 1000 * (self._ended - self._began) / self._steps
        self.profile = Profile(
            path=self.path,
            steps=self._steps,
            step_ms=step_ms,
            parts=self._cost_of_parts(step_ms),
            operators=self._cost_of_operators(profiler),
        )
        self.progress.say(f"profile: {self._steps} steps in {self.path}")

    def _cost_of_parts(self, step_ms: float) -> list[Cost]:
        """Those named, in the order of their first, and what is between them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        costs = []
        for name, seconds in self._parts.items():
            host = 1000 * sum(seconds) / self._steps
            pairs = self._marks.get(name, [])
            device = sum(a.elapsed_time(b) for a, b in pairs) / self._steps
            calls = len(seconds) / self._steps
            costs.append(Cost(name, calls, host, device if self._on_gpu else None, host / step_ms))
        rest = max(0.0, step_ms - sum(cost.host_ms for cost in costs))
        return [*costs, Cost("other", 1.0, rest, 0.0 if self._on_gpu else None, rest / step_ms)]

    def _cost_of_operators(self, profiler: torch.profiler.profile) -> list[Cost]:
        """The dearest by their own time, without that of the operators that they call."""
        events: list[Any] = [
            event
            for event in profiler.key_averages()
            # No ranges (those with # are torch's), and no kernels: they are in their operators.
            if event.device_type.name == "CPU"
            and event.key not in self._parts
            and "#" not in event.key
        ]
        times = [
            (e, e.self_device_time_total if self._on_gpu else e.self_cpu_time_total) for e in events
        ]
        whole = sum(spent for _, spent in times) or 1
        each = 1000 * self._steps  # from microseconds in all
        return [
            Cost(
                name=event.key,
                calls=event.count / self._steps,
                host_ms=event.self_cpu_time_total / each,
                device_ms=event.self_device_time_total / each if self._on_gpu else None,
                share=spent / whole,
            )
            for event, spent in sorted(times, key=lambda row: -row[1])[:OPERATORS]
        ]
