"""The query bank of a trained model: captions and pictures of the training split, encoded."""

from __future__ import annotations

import torch

from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.inference import encode_image_batches, encode_text_batches
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.report.progress import Progress

# At 256 dimensions 1.5 MB of a checkpoint. Twice as many pictures gain no more recall, and each is
# encoded in all views that the model embeds.
PICTURES = 1024
CAPTIONS = 2048


def make_bank(
    vlm: RetrievalModel,
    tokenizer: Tokenizer,
    split: Split,
    *,
    device: torch.device,
    precision: str = "auto",
    progress: Progress,
) -> QueryBank:
    """``PICTURES`` of ``split``, or all there are, evenly spread over it, with captions.

    As many of each as ``CAPTIONS`` allows, and one at least. Pictures that cannot be read are left
    out.
    """
    number = min(len(split), PICTURES)
    pictures = [i * len(split) // number for i in range(number)]
    images, read = [], []
    with progress.bar("query bank", len(pictures), "images") as bar:
        for batch in encode_image_batches(
            vlm,
            pictures,
            lambda i: split.image(i, at_least=vlm.eval_image_size),
            device=device,
            precision=precision,
        ):
            images.append(batch.encoded.features.cpu())
            read += batch.rows
            bar.advance(len(batch.rows) + len(batch.bad))
    chosen = [split.captions[pictures[i]][: max(CAPTIONS // number, 1)] for i in read]
    captions = [caption for group in chosen for caption in group]
    texts = torch.empty(len(captions), vlm.config.projection_dim)
    for index, text in encode_text_batches(
        vlm, tokenizer, captions, device=device, precision=precision
    ):
        texts[index] = text.features.cpu()
    sizes = torch.tensor([len(group) for group in chosen])
    # What a checkpoint keeps: the weights are chosen with it, not with something finer.
    return QueryBank(
        texts.half().float(),
        torch.cat(images).half().float(),
        torch.arange(len(chosen)).repeat_interleave(sizes),
    )
