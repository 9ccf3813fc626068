"""Features of a whole split: encoded once, and their tokens kept for re-ranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UserError
from vicvlm_cli.inference import (
    IMAGE_BATCH,
    autocast_dtype,
    encode_image_batches,
    encode_text_batches,
)
from vicvlm_cli.model.vlm import RetrievalModel
from vicvlm_cli.report.progress import Progress


class TokenBank:
    """Token features of n items without their padding, to gather for any batch of pairs.

    On a GPU they stay there while they fit into a third of what is free, else in main memory.
    Memory: the real tokens of n items in `dtype`, nothing that grows with pairs. `most`: how many
    tokens all items have together at most; where they have no masks it is found out.
    """

    def __init__(self, count: int, device: torch.device, dtype: torch.dtype, most: int) -> None:
        self.device, self.dtype, self._most = device, dtype, most
        self.lengths = torch.zeros(count, dtype=torch.long)
        self._starts = torch.zeros(count, dtype=torch.long)
        self._chunks: list[Tensor] = []
        self._filled = 0
        self._home = device
        self._masked = True

    def add(self, index: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        """Stores tokens [B, L, D] at mask [B, L] as the items `index` [B]; each item once."""
        self._masked = mask is not None
        if not self._chunks:
            number = tokens.shape[1] * len(self.lengths) if mask is None else self._most
            needed = number * tokens.shape[2] * self.dtype.itemsize
            if self.device.type == "cuda":
                fits = needed < torch.cuda.mem_get_info(self.device)[0] / 3
                self._home = self.device if fits else torch.device("cpu")
            if mask is None:  # all have as many: one place for all, or joining would double it
                shape = (tokens.shape[1] * len(self.lengths), tokens.shape[2])
                self._chunks = [torch.empty(shape, dtype=self.dtype, device=self._home)]
        if mask is None:
            lengths = torch.full((len(tokens),), tokens.shape[1])
            real = tokens.flatten(0, 1).to(self._home, self.dtype)
            self._chunks[0][self._filled : self._filled + len(real)] = real
        else:
            lengths = mask.sum(1).cpu()
            self._chunks.append(tokens[mask].to(self._home, self.dtype))
        self.lengths[index] = lengths
        self._starts[index] = self._filled + lengths.cumsum(0) - lengths
        self._filled += int(lengths.sum())

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, L, D] of items `index` [B] and their mask [B, L] (None: no item has one)."""
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks)]
        lengths = self.lengths[index]
        position = torch.arange(int(lengths.max()))
        mask = position < lengths[:, None]
        at = self._starts[index][:, None] + position.where(mask, 0)
        tokens = self._chunks[0][at.to(self._home)].to(self.device)
        return tokens, mask.to(self.device) if self._masked else None


@dataclass(frozen=True)
class SplitFeatures:
    """Unit features of a split's images [I, P] and captions [T, P]; text_image [T] joins them.

    The token banks are None where no re-ranking was asked for.
    """

    image: Tensor
    text: Tensor
    text_image: Tensor
    image_tokens: TokenBank | None
    text_tokens: TokenBank | None


def encode_split(
    vlm: RetrievalModel,
    tokenizer: Tokenizer,
    split: Split,
    *,
    device: torch.device,
    precision: str = "auto",
    batch_size: int = IMAGE_BATCH,
    keep_tokens: bool = True,
    images: int | None = None,
    views: int | None = None,
    progress: Progress,
) -> SplitFeatures:
    """Encodes the first `images` (None: all) of a split, with all of their captions.

    `views` of each picture: None is the model's own number.

    Raises UserError where the split holds no image, or one that cannot be read.
    """
    count = len(split) if images is None else min(images, len(split))
    captions = split.captions[:count]
    texts = [caption for group in captions for caption in group]
    if not texts:
        raise UserError(f"{split.title} has nothing to evaluate: choose another with --split")
    group_sizes = torch.tensor([len(group) for group in captions])
    dim = vlm.config.projection_dim
    image, text = torch.empty(count, dim), torch.empty(len(texts), dim)
    dtype = autocast_dtype(device, precision) or torch.float32
    image_tokens = TokenBank(count, device, dtype, most=0) if keep_tokens else None
    most = len(texts) * vlm.config.max_tokens
    text_tokens = TokenBank(len(texts), device, dtype, most) if keep_tokens else None
    with progress.bar("encoding pictures", count, "images") as bar:
        for batch in encode_image_batches(
            vlm,
            range(count),
            lambda i: split.image(i, at_least=vlm.eval_image_size),
            device=device,
            precision=precision,
            batch_size=batch_size,
            views=views,
        ):
            for i, reason in batch.bad:
                raise split.damage(i, reason)
            index = torch.tensor(batch.rows)
            image[index] = batch.encoded.features.cpu()
            if image_tokens is not None:
                image_tokens.add(index, batch.encoded.tokens, batch.encoded.mask)
            bar.advance(len(index))
    with progress.bar("encoding captions", len(texts), "captions") as bar:
        for index, encoded in encode_text_batches(
            vlm, tokenizer, texts, device=device, precision=precision
        ):
            text[index] = encoded.features.cpu()
            if text_tokens is not None:
                text_tokens.add(index, encoded.tokens, encoded.mask)
            bar.advance(len(index))
    text_image = torch.arange(count).repeat_interleave(group_sizes)
    return SplitFeatures(image, text, text_image, image_tokens, text_tokens)
