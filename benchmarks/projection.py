"""What a training would take on a GPU, told from one small step on this machine.

    python benchmarks/projection.py DATA --preset vicvlm-small-flickr30k --pairs 145000 --tflops 200

Operations are counted, not timed; the minutes are these by ``--tflops``, what the GPU really does a
second: about 0.2 to 0.4 of its dense bf16 peak for encoders of this size, if pictures are decoded
beforehand. Memory is what autograd keeps of a step in bf16, weights, gradients, and AdamW's two
moments. DATA is any prepared data set with captions like those in question; the encoders' weights
do not matter, and are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from comparison import table  # beside this file
from flops import Step, active_sets, gflop_per_pair, one_step
from torch import Tensor

from vicvlm_cli.settings import TrainConfig

SMALL = 8  # pairs of the step that is measured
RANDOM = ('model.image_weights=""', 'model.text_encoder=""')


def main(
    data: Annotated[Path, typer.Argument(help="Prepared data set.")],
    preset: Annotated[str, typer.Option(help="Whose two trainings.")] = "vicvlm-small-flickr30k",
    pairs: Annotated[int, typer.Option(help="Of an epoch.")] = 145_000,
    tflops: Annotated[float, typer.Option(help="What the GPU does a second.")] = 200.0,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Further settings.")] = None,
) -> None:
    """Operations, minutes and memory of a preset's pretraining and fine-tuning."""
    rows = []
    for kind in ("pretrain", "finetune"):
        small = (*RANDOM, *(settings or ()), f"{kind}.batch_size={SMALL}")
        gflop = gflop_per_pair(data, preset, small, kind)
        train = one_step(data, preset, (*RANDOM, *(settings or ())), kind).train
        seen = train.epochs * pairs
        minutes = gflop * seen / (tflops * 1e3) / 60
        memory = gib(one_step(data, preset, small, kind), train)
        cells = [kind, str(train.batch_size), f"{train.epochs:g}", f"{gflop:.1f}"]
        rows.append([*cells, f"{gflop * seen / 1e6:,.0f}", f"{minutes:,.0f}", f"{memory:.1f}"])
    titles = ["", "batch", "epochs", "GFLOP a pair", "PFLOP"]
    print(table([*titles, f"minutes at {tflops:g} TFLOP/s", "GiB"], rows))


def gib(step: Step, train: TrainConfig) -> float:
    """Memory of a step of ``train.batch_size`` pairs, from that of a small one."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    fixed = {p.untyped_storage().data_ptr() for p in step.objective.parameters()}
    dearest = max(active_sets(train), key=len)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        values, _ = step.objective(step.batch, step.noise, dearest)
        total = torch.stack(list(values.values())).sum()
    activations = sum(size for place, size in kept.items() if place not in fixed)
    total.backward()
    weights = sum(p.nbytes for p in step.objective.parameters())
    trained = sum(p.nbytes for p in step.objective.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in step.objective.buffers())
    every = activations / step.pairs * train.batch_size
    return (every + weights + buffers + 3 * trained) / 2**30


if __name__ == "__main__":
    typer.run(main)
