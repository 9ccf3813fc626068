"""The other side of embed.py: reads a name a line, answers with the seconds that it took."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

BATCH = 64


def open_clip_encoder(bf16: bool) -> Callable[[list[Path]], Any]:
    """As in open_clip's README, in batches; its ``torch.autocast("cuda")`` is nothing on a CPU."""
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-16")
    model.eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def encode(paths: list[Path]) -> torch.Tensor:
        found = []
        enabled = bf16 or device == "cuda"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=enabled):
            for start in range(0, len(paths), BATCH):
                images = [preprocess(Image.open(path)) for path in paths[start : start + BATCH]]
                features = model.encode_image(torch.stack(images).to(device))
                found.append(features / features.norm(dim=-1, keepdim=True))
        return torch.cat(found)

    return encode


def sentence_transformers_encoder(scratch: Path) -> Callable[[list[Path]], Any]:
    """As in sentence-transformers' documentation: ``encode`` of a list of pictures."""
    folder = scratch / "clip"
    vision = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12)
    vision |= dict(num_attention_heads=6, patch_size=16, image_size=224, projection_dim=256)
    text = dict(vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=1)
    text |= dict(num_attention_heads=2, projection_dim=256, eos_token_id=1, pad_token_id=1)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)
    CLIPModel(config).save_pretrained(folder)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>", "ab"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    model = SentenceTransformer(str(folder))
    return lambda paths: model.encode(
        [Image.open(path) for path in paths], batch_size=BATCH, show_progress_bar=False
    )


def main() -> None:
    folder, scratch, threads = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(threads))
    paths = sorted(Path(folder).glob("*.jpg"))
    encoders = {
        "open_clip": open_clip_encoder(bf16=False),
        "open_clip in bf16": open_clip_encoder(bf16=True),
        "sentence-transformers": sentence_transformers_encoder(Path(scratch)),
    }
    for encode in encoders.values():
        encode(paths[:8])
    for line in sys.stdin:
        began = time.perf_counter()
        assert len(encoders[line.strip()](paths)) == len(paths)
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


if __name__ == "__main__":
    main()
