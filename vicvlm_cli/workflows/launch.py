"""Before a training: the processes that train together, their precision, the run's folder, data."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    parse_flag_from_env,
)

from vicvlm_cli.checkpoint import FILE_NAME
from vicvlm_cli.data.batches import AHEAD, Plan, Rows, load_size
from vicvlm_cli.data.decoded import DecodedFile, make_decoded
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.device import supports_bf16
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import DataConfig, TrainConfig
from vicvlm_cli.workflows.state import find_run_state

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

LOG, RESULT = "metrics.jsonl", "result.json"  # of a run, beside its weights and its state
OLD_LOG = "metrics.old.jsonl"  # of one that was killed early, in the same place
SHARED_MEMORY = Path("/dev/shm")  # what loader processes hand batches over in, on Linux
LAUNCH_ON_CPUS = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node"


def join() -> None:
    """Join the other processes of the launch, on the CPU if asked to or if there is nothing else.

    Before anything else asks accelerate for its state: whoever asks first settles the device, and
    without a word about the CPU each process would train alone.

    Raises:
        UserError: fewer processes came together than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    nothing_else = launched > 1 and not torch.cuda.is_available()
    # Some wait while one decodes pictures or encodes views, longer than torch's few minutes.
    state = PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or nothing_else, timeout=timedelta(hours=12)
    )
    if state.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched and {state.num_processes} came together; on CPUs "
            f"use {LAUNCH_ON_CPUS} N -m vicvlm_cli …"
        )


def require_processes(then: int, kind: str, run: Path) -> None:
    """Refuse to go on with a ``run`` of ``then`` processes by another number of them.

    Its batches, its schedule and its random numbers are those of as many.

    Raises:
        UserError: there are more or fewer.
    """
    state = PartialState()
    if state.num_processes == then:
        return
    launch = "vicvlm"
    if then > 1:
        gpus = state.device.type != "cpu"
        several = "accelerate launch --num_processes" if gpus else LAUNCH_ON_CPUS
        launch = f"{several} {then} -m vicvlm_cli"
    raise UserError(
        f"{run} is a run of {then} process{'es' * (then > 1)} and cannot go on with "
        f"{state.num_processes}: use {launch} {kind} --resume {run}, or start a new run"
    )


def make_accelerator(config: TrainConfig, track: str, run: Path) -> Accelerator:
    """The precision, accumulation and tracker that ``config`` and ``track`` ask for.

    Raises:
        UsageError: the device has no such precision, or the tracker's package is not installed.
    """
    precision = config.precision
    if precision == "fp16" and PartialState().device.type == "cpu":
        # accelerate would compute in float32 there and call it fp16.
        raise UsageError("--precision fp16 does not work on a CPU: leave it out, or use bf16 or no")
    if precision == "auto":
        precision = "bf16" if supports_bf16(PartialState().device) else "no"
    if track != "none" and importlib.util.find_spec(track) is None:
        raise UsageError(f"--track {track} needs its package: pip install 'vicvlm[track]'")
    # Newer torch has another name for it, which neither accelerate nor older torch knows yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    try:
        accelerator = Accelerator(
            cpu=PartialState().device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_steps=config.step_batches,
            log_with=None if track == "none" else track,
            project_dir=str(run),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    # Losses come and go with their schedule, and their heads with them.
                    find_unused_parameters=True,
                    # Queues, the largest, are the same everywhere, since they hold gathered
                    # features; what differs, counts of words, makes trivial values alone.
                    broadcast_buffers=False,
                )
            ],
        )
    except ValueError as error:  # such as bf16 on a GPU without it
        raise UsageError(
            f"--precision {precision} does not work here ({error}): leave it out, or use no"
        ) from error
    if track != "none":
        accelerator.init_trackers("vicvlm")
    return accelerator


@contextmanager
def run_folder(
    kind: str, dataset: PreparedDataset, output: Path | None, progress: Progress
) -> Iterator[Path]:
    """The folder of a new run: made by the first process, and the same on every one.

    If the block fails with nothing in it, it is gone again.

    Raises:
        UserError: ``output`` holds a run already, or is no folder that can be written to.
    """
    first, made = PartialState().is_main_process, False
    run, wrong = output, ""
    if first:
        try:
            made = output is None or not output.exists()
            if output is None:
                run = _claim(f"{kind}-{dataset.manifest.source}")
            else:
                _take(output, progress)
        except UserError as error:
            wrong = str(error)
        except OSError as error:
            wrong = f"cannot write to {error.filename}: {error.strerror}; choose another --output"
    run, wrong = broadcast_object_list([run, wrong])  # else the others would wait in vain
    if wrong:
        raise UserError(wrong)
    assert run is not None
    try:
        with held(run):
            yield run
    except BaseException:
        if made:
            with suppress(OSError):  # something is in it
                run.rmdir()
        raise


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Around what trains in a folder: no other command does meanwhile, where locks are known.

    Raises:
        UserError: another one does.
    """
    folder, taken = None, False
    try:
        if fcntl is not None and PartialState().is_main_process:
            folder = os.open(run, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                taken = True
            except OSError:
                pass  # a file system without locks
        if broadcast_object_list([taken])[0]:  # else the others would wait in vain
            raise UserError(
                f"another training is at work in {run}: wait for its end, or choose another "
                "--output"
            )
        yield
    finally:
        if folder is not None:
            os.close(folder)  # and the lock is gone, as when the process is killed


def _claim(stem: str) -> Path:
    """A new folder ``runs/STEM`` or ``runs/STEM-N``, which no run that starts with this one has."""
    Path("runs").mkdir(exist_ok=True)
    number, folder = 1, Path("runs") / stem
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{stem}-{number}")


def _take(output: Path, progress: Progress) -> None:
    """``output``, made if it is not there; what a run left there that nothing goes on from goes."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if find_run_state(output) is not None:
        raise UserError(
            f"{output} already holds a run: choose another --output, or go on with "
            f"--resume {output}"
        )
    if any((output / name).exists() for name in (FILE_NAME, RESULT)):
        raise UserError(f"{output} already holds a run: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(output))
    log = output / LOG
    if log.exists():
        os.replace(log, log.with_name(OLD_LOG))
        progress.say(
            f"{output} holds a run that ended before its first state: it begins anew, and the log "
            f"of that is {OLD_LOG}"
        )


def with_workers(
    data: DataConfig, accelerator: Accelerator, image_size: int, plan: Plan, progress: Progress
) -> DataConfig:
    """``data`` with a number of loader processes that suits the machine, where it names none."""
    if data.workers >= 0:
        return data
    # Of this machine, whose cores and memory they share; the launcher names them.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)
    # On the CPU the training itself wants every core: a loader process only takes turns with it.
    if accelerator.device.type == "cpu":
        return dataclasses.replace(data, workers=0)
    workers = max(min(8, (os.cpu_count() or 1) // processes - 1), 0)
    if SHARED_MEMORY.is_dir():  # 64 MB in many containers, where more dies of a bus error
        picture = 3 * load_size(image_size, data) ** 2
        room = shutil.disk_usage(SHARED_MEMORY).free // processes
        pictures = len(plan.captions) * picture
        if not data.cache and pictures <= data.cache_mb * 10**6:  # decoded once, for all of them
            room -= pictures
        fit = max(room, 0) // (2 * AHEAD * plan.batch_size * picture)
        if fit < workers:
            progress.say(
                f"warning: {SHARED_MEMORY} has room for {fit} loader processes, not {workers}; "
                "give it more (docker run --shm-size), or decode pictures once with --cache"
            )
        workers = min(workers, fit)
    return dataclasses.replace(data, workers=workers)


def make_rows(
    accelerator: Accelerator,
    model: VLM,
    data: DataConfig,
    split: Split,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    words: bool,
) -> Rows:
    """What batches are made of; with ``cache``, a process of each machine decodes the pictures."""
    size = load_size(model.config.image_size, data)
    if data.cache and accelerator.is_local_main_process:
        make_decoded(split, size, progress)
    accelerator.wait_for_everyone()
    return Rows(
        split,
        tokenizer,
        size,
        model.config.max_tokens,
        cache_bytes=data.cache_mb * 10**6,
        shared=data.workers > 0,
        decoded=DecodedFile(split, size) if data.cache else None,
        words=words,
    )
