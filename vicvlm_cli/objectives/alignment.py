"""Contrast and matching of one batch: what every objective with ITC and ITM shares."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM, Encoded, RetrievalModel
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.cached import Cached, in_float32
from vicvlm_cli.objectives.negatives import hard_negatives
from vicvlm_cli.objectives.ranks import Noise, gather, gather_padded, rank, world_size


class Contrast(NamedTuple):
    """Over the global batch: ``similarity`` [G, G] logits, ``image_id`` [G], features [G, P].

    ``trivial``: the loss of a constant guess.
    """

    loss: Tensor
    trivial: Tensor
    similarity: Tensor
    image_id: Tensor
    image_features: Tensor
    text_features: Tensor


def contrast(
    model: RetrievalModel,
    image: Encoded,
    text: Encoded,
    batch: Batch,
    cached: Cached = None,
) -> Contrast:
    """Symmetric InfoNCE over the batches of all processes, with the true gradient.

    With ``cached``, the loss and its trivial value are over all batches of the step; all else is
    of this one.
    """
    rows = contrasted_rows(model, image, text, batch)
    of_rows = partial(info_nce, model.logit_scale)
    here: Contrast = in_float32(of_rows, *(gather(x) for x in rows))
    if cached is None:
        return here
    loss, trivial = cached(of_rows, *rows)
    return here._replace(loss=loss, trivial=trivial)


def contrasted_rows(
    model: RetrievalModel, image: Encoded, text: Encoded, batch: Batch
) -> list[Tensor]:
    """What :func:`info_nce` needs of a batch: its rows.

    Further captions that the batch has of its pictures are contrasted too. An image pass costs
    many times a caption's, and each caption of a picture says something else of it.
    """
    rows = [image.features.float(), text.features.float(), batch.image_id]
    if batch.more_ids is not None and batch.more_mask is not None:
        flat = model.encode_text(batch.more_ids.flatten(0, 1), batch.more_mask.flatten(0, 1))
        rows.append(flat.features.float().view(*batch.more_ids.shape[:2], -1))
    return rows


def info_nce(
    log_scale: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    image_id: Tensor,
    more: Tensor | None = None,
) -> Contrast:
    """Symmetric InfoNCE of pictures and captions [G, P], and of ``more`` captions [G, E, P]."""
    scale = log_scale.exp()
    similarity = scale * image_features @ text_features.T  # [G, G]
    whole = similarity
    if more is not None:
        each = (scale * image_features @ x.T for x in more.unbind(1))
        whole = torch.cat([similarity, *each], dim=1)
    loss = losses.itc(whole, image_id)
    trivial = losses.itc_trivial(len(image_id), whole.shape[1])
    return Contrast(loss, trivial, similarity, image_id, image_features, text_features)


def match(
    model: VLM, image: Encoded, text: Encoded, contrasted: Contrast, noise: Noise, number: int
) -> tuple[Tensor, Tensor]:
    """Image-text matching with ``number`` hard negatives each way from the global batch.

    Returns:
        The loss, and the pooled feature [B, D] of the matched pairs.
    """
    assert text.mask is not None
    rows = len(image.tokens)
    mine = slice(rank() * rows, (rank() + 1) * rows)
    total = len(contrasted.image_id)
    same = contrasted.image_id[mine, None] == contrasted.image_id[None, :]  # [B, G]
    similarity = contrasted.similarity
    wrong_text = hard_negatives(similarity[mine], same, noise.rand(rows, total), number)
    wrong_image = hard_negatives(similarity.T[mine], same, noise.rand(rows, total), number)

    # Rows of the global batch: B matched pairs, B * number wrong captions, as many wrong pictures.
    own = torch.arange(mine.start, mine.stop, device=similarity.device)
    again = own.repeat_interleave(number)
    images = torch.cat([own, again, wrong_image.flatten()])
    texts = torch.cat([own, wrong_text.flatten(), again])
    pictures, of = gather(image.tokens), images
    if world_size() > 1:  # most of the global batch may not be among them
        used, of = images.unique(return_inverse=True)
        pictures = pictures[used]
    fused = model.fuse(
        pictures,
        None,
        gather_padded(text.tokens)[texts],
        gather_padded(text.mask)[texts],
        of=of,
        want="pooled",
    )
    logits = model.match_fused(
        fused, contrasted.image_features[images], contrasted.text_features[texts]
    )
    loss = losses.itm(logits[:rows], logits[rows:])
    return loss, fused.pooled[:rows]


def require_matching(model: VLM, objective: str) -> None:
    """Refuse a model that has nothing to match with.

    Raises:
        UsageError: the model is a dual encoder alone.
    """
    if model.itm_head is None:
        raise UsageError(
            f"{objective} matches pairs in a fusion encoder, and model.fusion is "
            f"{model.config.fusion}: choose another fusion, or the objective clip"
        )


@torch.no_grad()
def clamp_temperature(model: RetrievalModel, lowest: float = 0.01) -> None:
    """Keep the temperature at ``lowest`` or above (CLIP, arXiv 2103.00020, sec. 2.5)."""
    model.logit_scale.clamp_(max=-math.log(lowest))
