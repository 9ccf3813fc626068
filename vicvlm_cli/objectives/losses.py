"""The losses, as pure functions of tensors. Each cites its equation; none knows of a model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def itc(similarity: Tensor, image_id: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch (CLIP, arXiv 2103.00020, fig. 3).

    Other captions and copies of the same picture are left out: never negatives. With K captions a
    picture, each of them is contrasted with the other pictures, and the picture, for each of them,
    with all captions of the others.

    Args:
        similarity: [B, K * B], cosine times inverse temperature, pictures in rows; column k * B + i
            is a caption of picture i.
        image_id: long [B], equal where two rows share a picture.
    """
    rows, columns = similarity.shape
    picture = torch.arange(columns, device=similarity.device) % rows  # [K * B]
    own = similarity[picture, torch.arange(columns, device=similarity.device)]
    same = image_id[:, None] == image_id[picture][None, :]
    # The lowest number in place of minus infinity: a row may have nothing to contrast with.
    others = similarity.masked_fill(same, torch.finfo(similarity.dtype).min)
    to_text = torch.logaddexp(own, others.logsumexp(1)[picture]) - own
    to_image = torch.logaddexp(own, others.logsumexp(0)) - own
    return (to_text.mean() + to_image.mean()) / 2


def itc_trivial(rows: int, columns: int) -> Tensor:
    """:func:`itc` of a constant guess over ``rows`` pictures and ``columns`` captions."""
    others = (rows - 1) * columns // rows
    return torch.tensor((math.log(rows) + math.log(1 + others)) / 2)


def sigmoid(logits: Tensor, same: Tensor) -> Tensor:
    """Pairwise sigmoid loss, summed over texts and averaged over pictures (SigLIP, 2303.15343).

    Args:
        logits: [B, K], pictures in rows, captions in columns.
        same: bool [B, K], the pairs of one picture: all of them are positives.
    """
    return F.softplus(torch.where(same, -logits, logits)).sum() / len(logits)


def sigmoid_base_rate(same: Tensor) -> Tensor:
    """:func:`sigmoid` of the best constant guess: the entropy of the share of positives."""
    p = same.float().mean()
    return same.shape[1] * (torch.special.entr(p) + torch.special.entr(1 - p))


@torch.no_grad()
def sigmoid_bias(scores: Tensor, same: Tensor) -> Tensor:
    """What to add to ``scores`` so that as many positives are expected as there are.

    Args:
        scores: [B, K], logits without a bias.
        same: bool [B, K], the positives, some but not all.
    """
    scores, same = scores.cpu(), same.cpu()  # not all devices have float64
    share = same.double().mean()
    prior = share.log() - (-share).log1p()
    # A score's own distance from the prior is at most how far the bias has to go.
    low, high = prior - scores.max(), prior - scores.min()
    for _ in range(40):
        middle = (low + high) / 2
        above = (scores + middle).double().sigmoid().mean() > share
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def hinge(similarity: Tensor, image_id: Tensor, margin: float, hardest: bool) -> Tensor:
    """How far negatives come within ``margin`` of the pair, both ways, mean over the batch.

    Pairs of one picture are never negatives.

    Args:
        similarity: cosines [B, B], pictures in rows.
        image_id: long [B].
        hardest: of each row's negatives only the hardest counts (VSE++, 1707.05612, eq. 6);
            else the mean of those within the margin (eq. 5, its sum made independent of B).
    """
    same = image_id[:, None] == image_id[None, :]
    own = similarity.diagonal()
    total = similarity.new_zeros(())
    for scores in (similarity, similarity.T):
        cost = F.relu(margin + scores - own[:, None]).masked_fill(same, 0.0)  # [B, B]
        if hardest:
            total = total + cost.amax(dim=1).mean()
        else:
            total = total + cost.sum() / (cost > 0).sum().clamp(min=1)
    return total


def kd(logits: Tensor, image_id: Tensor, candidate_id: Tensor) -> Tensor:
    """Contrastive distillation: each row finds its own picture among a teacher's (CRD, 1910.10699).

    Args:
        logits: [B, B + K]; candidate i is the teacher's feature of row i's picture for i < B, the
            others are of earlier batches.
        image_id: long [B], and ``candidate_id`` long [B + K]; other candidates of a row's own
            picture are left out.
    """
    same = image_id[:, None] == candidate_id[None, :]
    own = torch.arange(len(image_id), device=logits.device)
    same[own, own] = False
    return F.cross_entropy(logits.masked_fill(same, float("-inf")), own)


def itm(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross entropy of matched [P] and mismatched [Q] log-odds, mean over all P + Q."""
    logits = torch.cat([positive, negative])
    labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
    return F.binary_cross_entropy_with_logits(logits, labels)


def itm_base_rate(negatives: float) -> float:
    """Entropy of always guessing the share of matches, with ``negatives`` for each match."""
    p = 1 / (1 + negatives)
    return -(p * math.log(p) + (1 - p) * math.log(1 - p))


def mlm_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Summed cross entropy of [M, vocab_size] logits at the M masked positions (BERT, sec. 3.1).

    ``target``: the hidden tokens, long [M], or how likely each is, [M, vocab_size].
    """
    return F.cross_entropy(logits.float(), target, reduction="sum")


def mim_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error [B, M, D] at masked positions, mean over D, summed over B and M (L2)."""
    return (prediction.float() - target).square().mean(dim=-1).sum()


def mim_trivial(target: Tensor, masked: Tensor) -> Tensor:
    """What the best guess without looking scores: each position's mean plus the picture's own.

    Args:
        target: [B, N, D], the targets of all patches.
        masked: long [B, M].
    """
    rows = target.shape[0]
    residual = target - target.mean(dim=0, keepdim=True)
    residual = residual - residual.mean(dim=1, keepdim=True)
    error = residual.square().mean(dim=-1).gather(1, masked).mean()
    return error * rows / max(rows - 1, 1)  # the batch mean has seen the row itself


def variance(z: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Hinge on each dimension's deviation over the batch [B, D] (VICReg, 2105.04906, eq. 1-2)."""
    return F.relu(gamma - (z.float().var(dim=0) + eps).sqrt()).mean()


def covariance(z: Tensor) -> Tensor:
    """Squared off-diagonal covariance over D (VICReg, eq. 3-4), for [B, D]."""
    c = _covariance_matrix(z)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


def covariance_of_copies(z: Tensor) -> Tensor:
    """:func:`covariance` if every dimension were one and the same, at the variances there are."""
    v = z.float().var(dim=0)
    return (v.sum().square() - v.square().sum()) / z.shape[1]


def _covariance_matrix(z: Tensor) -> Tensor:
    z = z.float() - z.float().mean(dim=0)
    with torch.autocast(z.device.type, enabled=False):
        return z.T @ z / max(len(z) - 1, 1)


def invariance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of paired rows [B, D] (VICReg, eq. 5, averaged over dimensions)."""
    return F.mse_loss(a.float(), b.float())


def soft_targets(positive: Tensor, belief: Tensor | None, alpha: float) -> Tensor:
    """Momentum distillation's targets (ALBEF, 2107.07651, eq. 6 and 7): probabilities [R, C].

    Args:
        positive: bool [R, C], one or more in each row: they share ``1 - alpha`` equally.
        belief: [R, C] logits of the momentum model, whose softmax gets ``alpha``; None: no share.
    """
    hard = positive.float() / positive.sum(dim=1, keepdim=True)
    return hard if belief is None else (1 - alpha) * hard + alpha * belief.float().softmax(dim=1)


def divergence_sum(logits: Tensor, target: Tensor) -> Tensor:
    """KL divergence of softmax(``logits``) from ``target``, both [R, C], summed over the rows.

    The cross entropy less the targets' own entropy: the same gradient, and 0 is the best there is,
    however many positives share a row. With one positive a row it is the cross entropy.
    """
    return F.kl_div(logits.float().log_softmax(dim=1), target, reduction="sum")


def l1_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error [..., D], mean over D, summed over all else (L1; MAMO, 2210.04183, MIM)."""
    return (prediction.float() - target).abs().mean(dim=-1).sum()


def l1_trivial(target: Tensor, masked: Tensor) -> Tensor:
    """:func:`mim_trivial` for :func:`l1_sum`: the same guess, its absolute error."""
    rows = target.shape[0]
    residual = target - target.mean(dim=0, keepdim=True)
    residual = residual - residual.mean(dim=1, keepdim=True)
    error = residual.abs().mean(dim=-1).gather(1, masked).mean()
    return error * math.sqrt(rows / max(rows - 1, 1))  # the batch mean has seen the row itself


def mean_trivial(target: Tensor) -> Tensor:
    """Squared error of guessing the mean of [M, D] for each of its rows, mean over D and M."""
    error = (target - target.mean(dim=0)).square().mean(dim=-1).sum()
    return error / max(len(target) - 1, 1)  # the mean has seen the row itself
