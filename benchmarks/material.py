"""What benchmarks are measured on: drawn photographs, captions, models of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vicvlm_cli.checkpoint import save_model
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.settings import ModelConfig

WORDS = [a + b for a in ("ka", "lo", "mi", "ru", "te", "so") for b in ("na", "vel", "rim", "dus")]


def photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """Smooth fields of colour under fine noise; as JPEG of quality 90 about 100 kB at 500 x 375."""
    coarse = rng.integers(0, 256, (height // 25 + 2, width // 25 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 10, (height, width, 1)).astype(np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def captions(rng: np.random.Generator, number: int) -> list[str]:
    """Captions of as many words as Flickr30k's have: 12 on average, most between 7 and 20."""
    lengths = rng.lognormal(np.log(11.5), 0.38, number).round().clip(3, 38).astype(int)
    return [" ".join(rng.choice(WORDS, n)) for n in lengths]


def folder_of_pictures(
    folder: Path, number: int, size: tuple[int, int], split: str, seed: int = 0
) -> Path:
    """A folder of ``number`` JPEGs with five captions each, all of one split."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    texts = captions(rng, 5 * number)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for i in range(number):
            name = f"{i:06d}.jpg"
            photograph(rng, *size).save(folder / name, "JPEG", quality=90)
            line = {"file_name": name, "captions": texts[5 * i : 5 * i + 5], "split": split}
            file.write(json.dumps(line) + "\n")
    return folder


def checkpoint(folder: Path, config: ModelConfig, weight: float = 0.5) -> Path:
    """A checkpoint of random weights that reads the captions made here."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([" ".join(WORDS)], 1000)
    path = folder / "model.safetensors"
    save_model(
        path,
        create_model(config, tokenizer.vocab_size),
        tokenizer,
        config={},
        data={},
        objective="vicvlm",
        rerank_weights=RerankWeights.of(weight),
    )
    return path
