"""What a training would take on a GPU, told from small steps on this machine.

    python benchmarks/projection.py DATA --preset vicvlm-small-flickr30k --pairs 145000 --tflops 200

Operations are counted, not timed; the minutes are these by ``--tflops``, what the GPU really does
a second: about a fifth to a third of its dense bf16 peak for encoders of this size, if pictures are
decoded beforehand. Memory is what autograd keeps of a step in bf16, weights, gradients, and AdamW's
two moments. DATA is any prepared data set with captions like those in question, whose vocabulary is
the text encoder's; the encoders' weights do not matter, and are random.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Annotated

import torch
import typer
from comparison import table  # beside this file
from flops import Step, active_sets, gflop_per_pair, one_step
from torch import Tensor

from vicvlm_cli.config import load_config
from vicvlm_cli.objectives import recipe_of
from vicvlm_cli.settings import TrainConfig

SIZES = (4, 8)  # pairs of the steps that are measured
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
        chosen = (*RANDOM, *(settings or ()))
        gflop = gflop_per_pair(data, preset, (*chosen, f"{kind}.batch_size={SIZES[1]}"), kind)
        config = load_config(preset, None, chosen, recipe_of=recipe_of)
        train: TrainConfig = getattr(config, kind)
        seen = train.epochs * pairs
        minutes = gflop * seen / (tflops * 1e3) / 60
        memory = gib(data, preset, chosen, kind, train)
        cells = [kind, str(train.batch_size), f"{train.epochs:g}", f"{gflop:.1f}"]
        rows.append([*cells, f"{gflop * seen / 1e6:,.0f}", f"{minutes:,.0f}", f"{memory:.1f}"])
    titles = ["", "batch", "epochs", "GFLOP a pair", "PFLOP"]
    print(table([*titles, f"minutes at {tflops:g} TFLOP/s", "GiB"], rows))


def gib(data: Path, preset: str, settings: tuple[str, ...], kind: str, train: TrainConfig) -> float:
    """Memory of a step of ``train.batch_size`` pairs, on the line through two small ones."""
    steps = [one_step(data, preset, (*settings, f"{kind}.batch_size={n}"), kind) for n in SIZES]
    few, more = (kept_bytes(step, max(active_sets(train), key=len)) for step in steps)
    slope = (more - few) / (SIZES[1] - SIZES[0])
    module = steps[0].objective
    weights = sum(p.nbytes for p in module.parameters())
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in module.buffers())
    kept = few + slope * (train.batch_size - SIZES[0])
    return (kept + weights + buffers + 3 * trained) / 2**30


def kept_bytes(step: Step, active: Set[str]) -> int:
    """What autograd keeps of a step beside the weights: activations, and weights in bf16."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    fixed = {p.untyped_storage().data_ptr() for p in step.objective.parameters()}
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        values, _ = step.objective(step.batch, step.noise, active)
        total = torch.stack(list(values.values())).sum()
    size = sum(size for place, size in kept.items() if place not in fixed)
    total.backward()
    return size


if __name__ == "__main__":
    typer.run(main)
