from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vicvlm_cli import device


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("AuthenticAMD\nflags : fpu avx512f avx512_bf16 sse", True),
        ("GenuineIntel\nflags : fpu avx512f avx512_bf16 sse", False),
        ("GenuineIntel\nflags : fpu avx512_bf16 amx_bf16", True),
        ("AuthenticAMD\nflags : fpu avx512f avx2", False),
    ],
)
def test_a_cpu_gains_where_its_instructions_are_fast(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"vendor_id : {flags}\n")
    device._cpu_has_bf16.cache_clear()
    try:
        assert device.supports_bf16("cpu") is expected
    finally:
        device._cpu_has_bf16.cache_clear()


def test_an_unknown_cpu_does_not_gain(monkeypatch):
    def gone(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", gone)
    device._cpu_has_bf16.cache_clear()
    try:
        assert device.supports_bf16(torch.device("cpu")) is False
    finally:
        device._cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_a_gpu_gains_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.supports_bf16("cuda") is expected
    assert device.supports_bf16("mps") is False


def test_the_best_device(monkeypatch):
    for cuda, mps, expected in ((1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        assert device.best_device() == torch.device(expected)


FAULTS = """
import resource, sys, torch
from vicvlm_cli.device import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(40):
    if turn == 30:  # it has settled
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10 << 20) for _ in range(2)]  # 40 MiB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again_without_asking_the_kernel():
    if platform.libc_ver()[0] != "glibc":  # there is nothing to set
        assert device.keep_freed_memory() is False
        return
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("keep", "default")
    }
    assert faults["keep"] < 100 < faults["default"]


def test_a_c_library_without_the_setting_is_left_alone(monkeypatch):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: object())
    assert device.keep_freed_memory() is False


KERNELS = """
import sys, torch
from pathlib import Path
from vicvlm_cli.device import keep_few_kernels
if sys.argv[1] == "few":
    keep_few_kernels()
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) / 256  # MB
layer = torch.nn.Linear(256, 256)
before = held()
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    for rows in range(100, 400):
        layer(torch.ones(rows, 256))
print(held() - before)
"""


def test_kernels_of_shapes_that_are_over_are_not_kept():
    # An evaluation in this process has left its bounds in the environment.
    clean = {name: x for name, x in os.environ.items() if name not in device.KERNEL_CACHES}
    all_of_them, few = (
        float(
            subprocess.run(
                [sys.executable, "-c", KERNELS, how], env=clean, capture_output=True, check=True
            ).stdout
        )
        for how in ("all", "few")
    )
    # Without bfloat16 instructions a layer may go without oneDNN: then nothing is held either way.
    assert few < (all_of_them / 2 if device._cpu_has_bf16() else all_of_them + 5)


def test_what_the_user_says_of_kernels_stands(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is put back afterwards
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    device.keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(device.KERNELS)
