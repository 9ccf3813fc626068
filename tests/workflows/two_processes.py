"""What test_distributed.py runs in processes of its own: `python two_processes.py DATA OUT`.

Everything is imported once and then forked, since imports take longer than the work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from tiny import make_batch, make_model, make_tokenizer, teacher_weights
from tiny_training import BARE, TINY
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.objectives import OBJECTIVES, create_objective
from vicvlm_cli.objectives.cached import CachedContrast
from vicvlm_cli.objectives.ranks import Noise, gather, gather_padded, global_mean
from vicvlm_cli.objectives.vicreg import TERMS
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import LossConfig, TrainConfig
from vicvlm_cli.workflows import run, train

CPU = torch.device("cpu")
ROWS = 4  # of each process
BYOL = {"target": "byol", "predictor_width": 32}
TEACHER = {"teacher": "test_vit", "teacher_weights": teacher_weights()}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "byol-concat": ("vicvlm", BYOL, "concat"),
    "byol-cross": ("vicvlm", BYOL, "cross_attention"),
    "byol-strided": ("vicvlm", {**BYOL, "masked_stride": 2, "itm_negatives": 2}, "cross_attention"),
    "pixel-concat": ("vicvlm", {**BYOL, "target": "pixel"}, "concat"),
    "retrieval": ("retrieval", {"itm_negatives": 2}, "concat"),
    "clip": ("clip", {}, "none"),
    "siglip": ("clip", {"loss": "sigmoid"}, "none"),
    "vsepp": ("vsepp", {"mean_steps": 0}, "none"),
    "vse0": ("vsepp", {}, "none"),
    "scan": ("scan", {"mean_steps": 0}, "stacked_attention"),
    "vilt": ("vilt", {}, "single_stream"),
    "vilt_ranking": ("vilt_ranking", {"negatives": 3}, "single_stream"),
    "mamo": ("mamo", {}, "concat"),
    "mamo-seed": ("mamo", {"variant": "seed"}, "concat"),
    "maskvlm": ("maskvlm", {"decoder_depth": 1}, "co_attention"),
    "albef": ("albef", {"queue_size": 7, "queue_steps": 0, "alpha_steps": 0}, "cross_attention"),
    "s_smke": ("s_smke", TEACHER, "shared"),
    "vicreg": ("clip", {"expander": 24}, "none"),
    "words": ("vicvlm", {**BYOL, "vicreg": "projections"}, "cross_attention"),
}
FURTHER: dict[str, tuple[str, ...]] = {"vicreg": TERMS, "words": ("words",)}

# Those of them whose contrast, over two batches of a step, equals that of one.
CACHED = (
    "byol-concat",
    "clip",
    "siglip",
    "vsepp",
    "vse0",
    "albef",
    "s_smke",
    "vilt",
    "vicreg",
    "words",
)


def share(batch: Batch, rank: int) -> Batch:
    """The rows of one process, their padding cut: captions differ in length between processes."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    part = batch.rows(rows)
    longest = int(part.attention_mask.sum(1).max())
    part.input_ids = part.input_ids[:, :longest]
    part.attention_mask = part.attention_mask[:, :longest]
    return part


def joint_batch() -> Batch:
    """Two processes' rows; a picture has captions on both."""
    batch = make_batch(2 * ROWS)
    batch.image_id[6] = batch.image_id[1]
    batch.image[6] = batch.image[1]
    batch.more_ids = batch.input_ids.flip(0)[:, None]  # a further caption each
    batch.more_mask = batch.attention_mask.flip(0)[:, None]
    return batch


def make_objective(case: str) -> Any:
    name, options, fusion = CASES[case]
    names = (*OBJECTIVES[name].LOSSES, *FURTHER.get(case, ()))
    weights = {loss: LossConfig() for loss in names}
    config = TrainConfig(objective=name, options=options, losses=weights)
    return create_objective(make_model(fusion=fusion), make_tokenizer(), config).train()


def losses_and_gradients(case: str, rank: int | None) -> dict[str, Tensor]:
    """What one step gives in one process (None), or reduced over two as training does."""
    objective = make_objective(case)
    batch = joint_batch() if rank is None else share(joint_batch(), rank)
    wrapped = (
        objective
        if rank is None
        else DistributedDataParallel(objective, find_unused_parameters=True)
    )
    with torch.no_grad():  # so that queues hold something
        objective(batch, Noise(0, 2, CPU), set(objective.LOSSES))
    objective.after_step()
    values, _ = wrapped(batch, Noise(0, 3, CPU), set(objective.LOSSES))
    torch.stack(list(values.values())).sum().backward()
    result = {f"loss.{k}": v.detach() for k, v in values.items()}
    if rank is not None:
        for value in result.values():  # as the metrics are
            dist.all_reduce(value)
            value /= 2
    gradients = {k: p.grad for k, p in objective.named_parameters() if p.grad is not None}
    return {**result, **{f"gradient.{k}": v for k, v in gradients.items()}}


def contrast_by_cache(case: str, rank: int | None) -> dict[str, Tensor]:
    """The contrast of a step in one process (None), or by cached gradients in two.

    Each of the two has two batches of two rows.
    """
    objective = make_objective(case)
    name = objective.LOSSES[0]
    if rank is None:
        values, _ = objective(joint_batch(), Noise(0, 0, CPU), set())
        values[name].backward()
        value = values[name].detach()
    else:
        # Rows 0, 1, 4, 5 and 2, 3, 6, 7 of the joint batch are two batches of two processes.
        mine = share(joint_batch(), rank)
        batches = [mine.rows(slice(0, 2)), mine.rows(slice(2, 4))]
        wrapped = DistributedDataParallel(objective, find_unused_parameters=True)
        parameters = [p for p in objective.parameters() if p.requires_grad]
        cached = CachedContrast(2, parameters)
        with torch.no_grad():
            for batch in batches:
                objective(batch, Noise(0, 0, CPU), set(), cached)
        with wrapped.no_sync():
            values, _ = wrapped(batches[0], Noise(0, 0, CPU), set(), cached)
            (values[name] / 2).backward()
        values, _ = wrapped(batches[1], Noise(0, 0, CPU), set(), cached)
        (values[name] / 2).backward()
        value = values[name].detach()
    gradients = {k: p.grad for k, p in objective.named_parameters() if p.grad is not None}
    # Of parameters that no contrast uses, DDP makes zeros.
    return {"loss": value, **{k: g for k, g in gradients.items() if bool(g.any())}}


def primitives(rank: int) -> dict[str, Tensor]:
    """Gathers of every type, of uneven lengths, with and without gradient."""
    x = torch.arange(3.0).add(10 * rank).requires_grad_()
    whole = gather(x)
    (whole * torch.arange(6.0)).sum().backward()
    assert x.grad is not None
    tokens = torch.full((2, 3 + rank, 2), float(rank + 1), requires_grad=True)
    padded = gather_padded(tokens)
    padded.square().sum().backward()
    assert tokens.grad is not None
    mask = torch.ones(2, 3 + rank, dtype=torch.bool)
    total = torch.tensor(6.0 if rank else 2.0)
    return {
        "whole": whole.detach(),
        "gradient": x.grad,
        "long": gather(torch.tensor([rank, rank + 5])),
        "bool": gather(torch.tensor([bool(rank), True])),
        "padded": padded.detach(),
        "padded_gradient": tokens.grad,
        "mask": gather_padded(mask),
        "mean": global_mean(total, 3 if rank else 1),
        "none": global_mean(torch.tensor(0.0), 0),
    }


# A training whose contrast is over 16 pairs, and how two processes of little memory get there. Its
# steps start from a view of each picture that went through a frozen block.
WIDE = [
    *("pretrain.objective=clip", "data.flip=false", "data.crop_scale=0.6", "pretrain.epochs=2"),
    "model.image_options={patch_size = 8, embed_dim = 24, depth = 2, num_heads = 2}",
    *("pretrain.frozen_blocks=1", "pretrain.cached_views=1"),
]
WIDE_BATCH = ["pretrain.batch_size=4", "pretrain.contrastive_batch=8"]


def training(data: Path, out: Path, settings: list[str]) -> dict[str, Tensor]:
    """A whole pretraining; the state of this process's objective at its end."""
    made: list[torch.nn.Module] = []

    def create(*arguments: Any) -> torch.nn.Module:
        made.append(create_objective(*arguments))
        return made[0]

    setattr(run, "create_objective", create)  # noqa: B010
    result = train.pretrain(data, overrides=settings, output=out, progress=Progress(quiet=True))
    state = {k: v.clone() for k, v in made[0].state_dict().items()}
    return {**state, "rerank_weights": torch.tensor(result.rerank_weights)}


def work(rank: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", f"file://{out / 'meet'}", rank=rank, world_size=2)
    results = {"primitives": primitives(rank)}
    for case in CASES:
        results[case] = losses_and_gradients(case, rank)
    for case in CACHED:
        results[f"cached.{case}"] = contrast_by_cache(case, rank)
    settings = json.loads((out / "settings.json").read_text())
    results["training"] = training(data, out / "run", [*TINY, *settings])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    dist.init_process_group("gloo", f"file://{out / 'again'}", rank=rank, world_size=2)
    training(data, out / "cached", [*BARE, *WIDE, *WIDE_BATCH])
    torch.save(results, out / f"{rank}.pt")


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    arguments = (Path(sys.argv[1]), Path(sys.argv[2]))
    start_processes(work, args=arguments, nprocs=2, start_method="fork")
