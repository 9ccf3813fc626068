"""Evaluation with re-ranking, beside the loop of ALBEF's evaluation, over the same model.

ALBEF encodes captions padded to 30 tokens, and for every query gathers its top k, repeats the
query's own tokens k times and runs the fusion layers over them, in float32. Its queries are alike,
so a sample of them is timed, once before and once after ours, and counted up to all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import material
import numpy as np
import torch
import torch.nn.functional as F
from rows import Row
from torch import Tensor

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.data.transforms import image_to_array
from vicvlm_cli.evaluation.evaluate import evaluate_split
from vicvlm_cli.inference import LoadedModel
from vicvlm_cli.model.fusion import Fused, masked_mean
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import ModelConfig
from vicvlm_cli.workflows.prepare import prepare

PICTURES, TOP_K = 1000, 128
SAMPLE = 24  # queries of each direction, each time
MAX_LENGTH = 30  # ALBEF's configs/Retrieval_flickr.yaml and evaluation()
MODEL = ModelConfig(
    image_encoder="vit_tiny_patch16_224",
    image_options={"depth": 2},
    text_layers=2,
    fusion_layers=2,
    text_width=128,
    text_heads=4,
    fusion="cross_attention",
)
QUIET = Progress(quiet=True)


def run() -> list[Row]:
    """Seconds of a whole evaluation."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        raw = material.folder_of_pictures(root / "raw", PICTURES, (224, 224), "test")
        path = prepare("folder", raw, output=root / "data", progress=QUIET).path
        split = PreparedDataset.open(path).split("test")
        model = load_model(material.checkpoint(root, MODEL))
        albef = [albef_seconds(model, split)]
        began = time.perf_counter()
        evaluate_split(
            model.vlm,
            model.tokenizer,
            split,
            device=model.device,
            top_k=TOP_K,
            rerank_weights=RerankWeights.of(0.5),
            progress=QUIET,
        )
        ours = time.perf_counter() - began
        albef.append(albef_seconds(model, split))
    note = (
        f"{PICTURES:,} pictures, {5 * PICTURES:,} captions, top {TOP_K}; 197 tokens a picture, "
        f"2 fusion layers of width {MODEL.text_width}; ALBEF's from {2 * SAMPLE} of "
        f"{6 * PICTURES:,} queries, twice"
    )
    row = Row(
        *("evaluate : ALBEF's loop", 1 / ours, 1 / statistics.mean(albef), "evaluations/s"),
        *(">= 5.0", note, (min(albef) / ours, max(albef) / ours)),
    )
    return [row]


@dataclass
class Encodings:
    """As ALBEF keeps them: tokens in float32, padded."""

    image: Tensor  # [I, P]
    text: Tensor  # [T, P]
    patches: Tensor  # [I, N, D], projected already: ALBEF's fusion has no such layer
    words: Tensor  # [T, MAX_LENGTH, D]
    mask: Tensor  # [T, MAX_LENGTH]


@torch.no_grad()
def albef_seconds(model: LoadedModel, split: Split) -> float:
    """Encoding of everything, and the queries of both directions from a sample."""
    began = time.perf_counter()
    encoded = encode(model, split)
    encoding = time.perf_counter() - began
    generator = np.random.default_rng(0)
    seconds = encoding
    similarity = encoded.image @ encoded.text.T
    for by_text, scores in ((False, similarity), (True, similarity.T)):
        sample = generator.choice(len(scores), SAMPLE, replace=False)
        began = time.perf_counter()
        for query in sample:
            _, index = scores[query].topk(TOP_K)
            images = torch.full((TOP_K,), int(query)) if not by_text else index
            texts = index if not by_text else torch.full((TOP_K,), int(query))
            match(model, encoded, images, texts)
        seconds += (time.perf_counter() - began) / SAMPLE * len(scores)
    return seconds


def encode(model: LoadedModel, split: Split) -> Encodings:
    """Batches of 64 pictures and 256 captions, as in ALBEF."""
    vlm: Any = model.vlm
    image, patches = [], []
    for start in range(0, len(split), 64):
        rows = range(start, min(start + 64, len(split)))
        pixels = np.stack([image_to_array(split.image(i), 224) for i in rows])
        found = vlm.encode_image(torch.from_numpy(pixels).to(model.device))
        image.append(found.features)
        patches.append(vlm.fusion.image_projection(found.tokens))
    captions = [caption for group in split.captions for caption in group]
    ids, mask = model.tokenizer(captions, MAX_LENGTH)
    ids, mask = (F.pad(x, (0, MAX_LENGTH - x.shape[1])).to(model.device) for x in (ids, mask))
    text, words = [], []
    for rows, real in zip(ids.split(256), mask.split(256), strict=True):
        tokens = vlm.text_encoder.bert(input_ids=rows, attention_mask=real).last_hidden_state
        pooled = vlm.text_projection(tokens[:, 0] + masked_mean(tokens, real))
        text.append(F.normalize(pooled, dim=-1))
        words.append(tokens)
    return Encodings(torch.cat(image), torch.cat(text), torch.cat(patches), torch.cat(words), mask)


def match(model: LoadedModel, encoded: Encodings, images: Tensor, texts: Tensor) -> Tensor:
    """Scores [k] of one query's pairs, through the layers as transformers runs them."""
    vlm: Any = model.vlm
    mask = encoded.mask[texts]
    hide = torch.zeros(mask.shape, device=mask.device)
    hide = hide.masked_fill(~mask, torch.finfo(hide.dtype).min)[:, None, None, :]
    bert = vlm.fusion.bert
    out = bert.encoder(
        bert.embeddings(inputs_embeds=encoded.words[texts]),
        attention_mask=hide,
        encoder_hidden_states=encoded.patches[images],
        encoder_attention_mask=None,
    ).last_hidden_state
    fused = Fused(pooled=masked_mean(out, mask), text=out, image=None)
    return vlm.match_fused(fused, encoded.image[images], encoded.text[texts])
