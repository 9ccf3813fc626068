"""Training batches: from prepared shards, from the decoded file, and as torchvision loads them.

One core each. What the device does (crops, flips, normalising of ours) is measured apart: on a GPU
it is nothing, and torchvision's loader does it with Pillow.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import material
import torch
from rows import Row, alternate, median_ratio
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from vicvlm_cli.config import load_config
from vicvlm_cli.data.batches import Plan, Rows, batches
from vicvlm_cli.data.decoded import make_decoded
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.vlm import create_model
from vicvlm_cli.objectives import create_objective
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.loop import augment
from vicvlm_cli.workflows.prepare import prepare

PICTURES, BATCH = 320, 32
SIZE, MODEL_SIZE = 252, 224  # of the loader's pictures, with room for crops, and of the model's
AIM = 3000  # pairs a second, what a step should reach on a GPU
REPEATS = 5
QUIET = Progress(quiet=True)


def run() -> list[Row]:
    """Rates in pairs a second."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        raw = material.folder_of_pictures(root / "raw" / "all", PICTURES, (500, 375), "train")
        path = prepare("folder", raw, output=root / "data", image_side=256, progress=QUIET).path
        split = PreparedDataset.open(path).split("train")
        tokenizer = Tokenizer.train([" ".join(material.WORDS)], 1000)
        plan = Plan(tuple(len(c) for c in split.captions), "one", BATCH, seed=0)
        file = make_decoded(split, SIZE, QUIET)
        anew = batches(Rows(split, tokenizer, SIZE, 40), plan)
        cached = batches(Rows(split, tokenizer, SIZE, 40, decoded=file), plan)
        batch = next(cached)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        seconds = alternate(
            {
                "uncached": lambda: consume(anew, 4),
                "cached": lambda: consume(cached, 40),
                "torchvision": torchvision_batches(raw.parent, 4),
                "device": lambda: augment(
                    batch, MODEL_SIZE, DATA, Noise(0, 0, torch.device("cpu"))
                ),
            },
            REPEATS,
        )
        cached.close()  # type: ignore[attr-defined]  # a generator, with a thread of its own
        torch.set_num_threads(threads)
        pairs = {"uncached": 4, "cached": 40, "torchvision": 4, "device": 1}
        rate = {k: pairs[k] * BATCH / statistics.median(v) for k, v in seconds.items()}
        _, spread = median_ratio(seconds["torchvision"], seconds["uncached"])
        step = step_rate(next(anew), tokenizer)
    unit, size = "pairs/s", "ViT-S/16 at 224, one core"
    return [
        Row(
            *("loader, uncached : torchvision ImageFolder", rate["uncached"], rate["torchvision"]),
            *(unit, ">= 2.0", f"{size}; 500 x 375 JPEGs, ours prepared at 256", spread),
        ),
        Row(
            *("loader, cached : aim of a step on a GPU", rate["cached"], AIM, unit, ">= 1.0"),
            f"{size}; captions and collation included",
        ),
        Row(
            *("loader, cached : step on this device", rate["cached"], step, unit, ">= 1.0"),
            f"{size}; the step is VicVLM's with all losses",
        ),
        Row(
            *("crops and flips on the CPU : step", rate["device"], step, unit, ">= 10.0"),
            "what a CPU spends on them beside the step; one core",
        ),
    ]


CONFIG = load_config(
    "vicvlm-small-flickr30k", overrides=["model.image_weights=''", "model.text_encoder=''"]
)
DATA = CONFIG.data


def consume(stream: Iterator[Any], number: int) -> None:
    """Takes ``number`` batches."""
    for batch in islice(stream, number):
        assert len(batch.image) == BATCH


def torchvision_batches(folder: Path, number: int) -> Callable[[], None]:
    """The usual input of a vision training, in this process."""
    chain = transforms.Compose(
        [
            transforms.RandomResizedCrop(MODEL_SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    loader = DataLoader(ImageFolder(str(folder), chain), batch_size=BATCH, shuffle=True)

    def load() -> None:
        for image, _ in islice(loader, number):
            assert len(image) == BATCH

    return load


def step_rate(batch: Any, tokenizer: Tokenizer) -> float:
    """Pairs a second of forward and backward of the preset for Flickr30k, every loss on."""
    model = create_model(CONFIG.model, tokenizer.vocab_size)
    objective = create_objective(model, tokenizer, CONFIG.pretrain).train()
    noise = Noise(0, 0, torch.device("cpu"))
    batch = batch.rows(slice(16))
    batch.image = augment(batch, MODEL_SIZE, DATA, noise)

    def step() -> None:
        with torch.autocast("cpu"):
            values, _ = objective(batch, noise, set(CONFIG.pretrain.losses))
        torch.stack(list(values.values())).sum().backward()

    return 16 / alternate({"step": step}, repeats=1, warmup=0)["step"][0]
