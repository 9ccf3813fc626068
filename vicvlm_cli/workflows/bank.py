"""The query bank of a trained model: captions and pictures of the training split, encoded."""

from __future__ import annotations

import torch

from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.inference import encode_image_batches, encode_text_batches
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.report.progress import Progress

SIZE = 2048  # captions, and pictures; at 256 dimensions 2 MB of a checkpoint


def make_bank(
    vlm: RetrievalModel,
    tokenizer: Tokenizer,
    split: Split,
    *,
    device: torch.device,
    precision: str = "auto",
    progress: Progress,
) -> QueryBank:
    """``SIZE`` captions and pictures of ``split``, or all there are, evenly spread over it.

    Pictures that cannot be read are left out.
    """
    captions = [caption for group in split.captions for caption in group]
    chosen = [captions[i] for i in _spread(len(captions))]
    pictures = _spread(len(split))
    texts = torch.empty(len(chosen), vlm.config.projection_dim)
    for index, text in encode_text_batches(
        vlm, tokenizer, chosen, device=device, precision=precision
    ):
        texts[index] = text.features.cpu()
    images = []
    with progress.bar("query bank", len(pictures), "images") as bar:
        for batch in encode_image_batches(
            vlm,
            pictures,
            lambda i: split.image(i, at_least=vlm.eval_image_size),
            device=device,
            precision=precision,
        ):
            images.append(batch.encoded.features.cpu())
            bar.advance(len(batch.rows) + len(batch.bad))
    # What a checkpoint keeps: the weights are chosen with it, not with something finer.
    return QueryBank(texts.half().float(), torch.cat(images).half().float())


def _spread(count: int) -> list[int]:
    number = min(count, SIZE)
    return [i * count // number for i in range(number)]
