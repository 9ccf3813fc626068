"""Models, tokenizers and batches as small as they get: what is tested is never their size."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.create import create_model
from vicvlm_cli.settings import ModelConfig

CAPTIONS = [
    "a red circle above a blue square",
    "two dogs",
    "the small green triangle stands alone on a striped background of yellow",
    "a boat on the water at night",
    "nobody",
    "three birds over the long wooden bridge",
    "a child jumping into a swimming pool",
    "a man paints the wall white",
]


def make_tokenizer(vocab_size: int = 90) -> Tokenizer:
    """A vocabulary so small that longer words fall into several pieces."""
    return Tokenizer.train(CAPTIONS, vocab_size)


def make_config(**changes: Any) -> ModelConfig:
    """4 x 4 patches of 32 x 32 pixels, captions of at most 40 tokens, no dropout."""
    settings: dict[str, Any] = {
        "image_encoder": "vit_tiny_patch16_224",
        "image_size": 32,
        "image_options": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
        "text_layers": 1,
        "fusion_layers": 1,
        "text_width": 32,
        "text_heads": 2,
        "text_dropout": 0.0,
        "max_tokens": 40,
        "projection_dim": 16,
    }
    return ModelConfig(**{**settings, **changes})


def make_model(seed: int = 0, vocab_size: int | None = None, **changes: Any) -> Any:
    """A random model in evaluation mode, its small weights large enough to tell apart."""
    torch.manual_seed(seed)
    model = create_model(make_config(**changes), vocab_size or make_tokenizer().vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # weights and tables start at a deviation of 0.02
                parameter.mul_(4)
    return model.eval()


def make_batch(rows: int = 6, seed: int = 0, size: int = 32) -> Batch:
    """Random pictures, each with another caption."""
    generator = torch.Generator().manual_seed(seed)
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(rows)]
    input_ids, attention_mask = make_tokenizer()(captions, 24)
    return Batch(
        image=torch.randint(256, (rows, 3, size, size), generator=generator, dtype=torch.uint8),
        input_ids=input_ids,
        attention_mask=attention_mask,
        image_id=torch.arange(rows),
        flip_ok=torch.ones(rows, dtype=torch.bool),
        words=input_ids.flip(0),  # what the captions themselves do not say
    )


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Held here for as long as the process: a forked child that lets go of it would remove it.
    return tempfile.TemporaryDirectory(prefix="teacher-")


@cache
def teacher_weights() -> str:
    """A file of the smallest of timm's models, ``test_vit``, random."""
    torch.manual_seed(3)
    file = Path(_folder().name) / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    return str(file)


def pad(batch: Batch, more: int, seed: int = 1) -> Batch:
    """The same batch with ``more`` columns of padding, and rubbish wherever there is padding."""
    rows, length = batch.input_ids.shape
    top = int(batch.input_ids.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(top, (rows, length + more), generator=generator)
    mask = torch.zeros(rows, length + more, dtype=torch.bool)
    mask[:, :length] = batch.attention_mask
    ids[mask] = batch.input_ids[batch.attention_mask]
    return Batch(**{**batch.__dict__, "input_ids": ids, "attention_mask": mask})
