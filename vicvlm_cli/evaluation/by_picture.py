"""Pairs scored picture by picture, for fusions that read a picture once for many captions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vicvlm_cli.evaluation.tokens import SplitFeatures, TokenBank
from vicvlm_cli.inference import TEXT_BATCH, inferring
from vicvlm_cli.model.fusion import CrossAttentionFusion
from vicvlm_cli.model.many_captions import begin_captions, fuse_captions
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.report.progress import Progress

CAPTIONS = 64  # of a picture at a time; its keys and values then cost next to nothing
LENGTHS = 3  # captions of so many neighbouring lengths go together
# Bytes of the tokens of one batch in float32; the widest tensor is four times that.
TOKEN_BYTES = {"cpu": 2 * 2**20, "cuda": 128 * 2**20}


def batches_by_picture(
    image_index: Tensor, lengths: Tensor, tokens: int, limit: int
) -> Iterator[Tensor]:
    """Batches of pairs, long [G, C]: C captions of each of G pictures.

    The captions of a row are of like length. Where a picture has fewer than C, its last pair is
    repeated.

    Args:
        image_index: long [n], the picture of each pair.
        lengths: long [n], the tokens of its caption.
        tokens: of a picture.
        limit: tokens of a batch, padding included, unless a single picture has more.
    """
    step = (lengths - 1) // LENGTHS
    key = image_index * (int(step.max()) + 1) + step
    order = key.argsort(stable=True)
    counts = key[order].unique_consecutive(return_counts=True)[1].tolist()
    pieces = [piece for part in order.split(counts) for piece in part.split(CAPTIONS)]
    shapes = sorted((int(step[piece[0]]), len(piece), i) for i, piece in enumerate(pieces))
    batch: list[Tensor] = []
    of = 0
    for now, captions, i in shapes:  # the last of a batch has the most captions
        size = (len(batch) + 1) * (tokens + captions * (now + 1) * LENGTHS)
        if batch and (now != of or size > limit):
            yield _joined(batch)
            batch = []
        batch.append(pieces[i])
        of = now
    if batch:
        yield _joined(batch)


def _joined(pieces: list[Tensor]) -> Tensor:
    most = max(map(len, pieces))
    return torch.stack([torch.cat([p, p[-1:].expand(most - len(p))]) for p in pieces])


def match_by_picture(
    vlm: VLM,
    features: SplitFeatures,
    image_index: Tensor,
    text_index: Tensor,
    *,
    precision: str,
    progress: Progress,
) -> Tensor:
    """As `rerank.match_pairs`, for a model with a `CrossAttentionFusion`."""
    images, texts, fusion = features.image_tokens, features.text_tokens, vlm.fusion
    assert images is not None and texts is not None and isinstance(fusion, CrossAttentionFusion)
    logits = torch.empty(len(image_index))
    if len(logits) == 0:
        return logits
    device = images.device
    limit = TOKEN_BYTES.get(device.type, TOKEN_BYTES["cpu"]) // (4 * vlm.config.text_width)
    lengths, tokens = texts.lengths[text_index], int(images.lengths.max())
    with (
        progress.bar("re-ranking", len(logits), "pairs") as bar,
        inferring(vlm, device, precision),  # around all: weights are cast to bf16 once
    ):
        begun = _begun(fusion, texts)
        for pairs in batches_by_picture(image_index, lengths, tokens, limit):
            image, text = image_index[pairs[:, 0]], text_index[pairs.flatten()]
            words, mask = begun.gather(text)  # [G * C, L, D]
            assert mask is not None
            fused = fuse_captions(
                fusion,
                *images.gather(image),
                words.unflatten(0, pairs.shape),
                mask.unflatten(0, pairs.shape),
            )
            of_image = features.image[image_index[pairs.flatten()]].to(device)
            logit = vlm.match_fused(fused, of_image, features.text[text].to(device))
            logits[pairs.flatten()] = logit.float().cpu()
            bar.advance(len(pairs.unique()))
    return logits


def _begun(fusion: CrossAttentionFusion, texts: TokenBank) -> TokenBank:
    """All captions through what no picture takes part in."""
    most = int(texts.lengths.sum())
    begun = TokenBank(len(texts.lengths), texts.device, texts.dtype, most)
    for index in texts.lengths.argsort(stable=True).split(TEXT_BATCH):
        words, mask = texts.gather(index)
        assert mask is not None
        begun.add(index, begin_captions(fusion, words, mask), mask)
    return begun
