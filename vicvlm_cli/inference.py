"""A trained model at work: pictures and texts to features, pairs to scores.

`LoadedModel` is the Python API; the functions above it serve live models in training too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vicvlm_cli.data.given import check_batch_size, listed, loader
from vicvlm_cli.data.images import BadImage, ImageSource
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.data.transforms import enlarged_side, image_to_array, other_views
from vicvlm_cli.device import supports_bf16
from vicvlm_cli.errors import UserError
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import Encoded, RetrievalModel
from vicvlm_cli.report.progress import Progress

if TYPE_CHECKING:
    from vicvlm_cli.checkpoint import CheckpointInfo

IMAGE_BATCH = 64
TEXT_BATCH = 256
T = TypeVar("T")


def autocast_dtype(device: torch.device, precision: str = "auto") -> torch.dtype | None:
    """The half-precision type to compute in, None for float32.

    `precision` is "no", "bf16", "fp16", or "auto": bfloat16 where the device gains from it.
    """
    if precision == "auto":
        precision = "bf16" if supports_bf16(device) else "no"
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@contextmanager
def inferring(vlm: RetrievalModel, device: torch.device, precision: str = "auto") -> Iterator[None]:
    """Evaluation mode, no gradients, autocast; every module's own mode is put back at the end."""
    modes = [(module, module.training) for module in vlm.modules()]
    dtype = autocast_dtype(device, precision)
    vlm.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _embedded(vlm: RetrievalModel, whole: Tensor, enlarged: Tensor | None, views: int) -> Encoded:
    """Pictures uint8 [B, 3, S, S], and enlarged where there are crops of them, encoded.

    Features are the mean over the ``views``, tokens those of the whole picture.
    """
    encoded = vlm.encode_image(whole)
    features = encoded.features.float()
    for view in other_views(whole, enlarged, views):  # one at a time: no more memory than one takes
        features = features + vlm.encode_image(view).features.float()
    return _normalized(encoded._replace(features=features))


def _normalized(encoded: Encoded) -> Encoded:
    # Half precision leaves lengths that are off by up to 1 %, and a gallery stores unit vectors.
    return encoded._replace(features=F.normalize(encoded.features.float(), dim=-1))


class ImageBatch(NamedTuple):
    """Encoded pictures, their positions among the sources, and (position, reason) of failures."""

    rows: list[int]
    encoded: Encoded
    bad: list[tuple[int, str]]


def encode_image_batches(
    vlm: RetrievalModel,
    sources: Iterable[T],
    load: Callable[[T], Image.Image],
    *,
    device: torch.device,
    precision: str = "auto",
    batch_size: int = IMAGE_BATCH,
    views: int | None = None,
) -> Iterator[ImageBatch]:
    """Encodes pictures in batches, in order; threads decode the next batch meanwhile.

    `load` turns one source into an RGB picture; those for which it raises `BadImage` are left out
    and named with the reason. A batch may come out empty. `views` of each picture: None is the
    model's own number, `eval_views`. Raises UsageError where `batch_size` is below 1.
    """
    check_batch_size(batch_size)
    views = vlm.config.eval_views if views is None else views
    sides = [vlm.eval_image_size]
    if (enlarged := enlarged_side(sides[0], views)) is not None:
        sides.append(enlarged)

    def read(source: T) -> list[np.ndarray] | str:
        try:
            image = load(source)
            return [image_to_array(image, side) for side in sides]
        except BadImage as error:
            return error.reason

    remaining, start = iter(sources), 0
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:

        def submit() -> list[Future[list[np.ndarray] | str]]:
            return [pool.submit(read, source) for source in islice(remaining, batch_size)]

        waiting = submit()
        while waiting:
            read_now, waiting = [future.result() for future in waiting], submit()
            good = {i: p for i, p in enumerate(read_now, start) if not isinstance(p, str)}
            bad = [(i, p) for i, p in enumerate(read_now, start) if isinstance(p, str)]
            start += len(read_now)
            pixels = []
            for number, side in enumerate(sides):
                rows = [arrays[number] for arrays in good.values()]
                stacked = np.stack(rows) if rows else np.empty((0, 3, side, side), "u1")
                pixels.append(torch.from_numpy(stacked).to(device))
            with inferring(vlm, device, precision):
                encoded = _embedded(vlm, pixels[0], pixels[1] if pixels[1:] else None, views)
            yield ImageBatch(list(good), encoded, bad)


def encode_text_batches(
    vlm: RetrievalModel,
    tokenizer: Tokenizer,
    texts: list[str],
    *,
    device: torch.device,
    precision: str = "auto",
    batch_size: int = TEXT_BATCH,
) -> Iterator[tuple[Tensor, Encoded]]:
    """Encodes texts, shortest first so that little is padding: (positions [B], Encoded).

    Raises UsageError where `batch_size` is below 1.
    """
    check_batch_size(batch_size)
    if not texts:
        return
    input_ids, mask = tokenizer(texts, vlm.config.max_tokens)
    lengths = mask.sum(1)
    for index in lengths.argsort(stable=True).split(batch_size):
        longest = int(lengths[index].max())
        with inferring(vlm, device, precision):
            encoded = vlm.encode_text(
                input_ids[index, :longest].to(device), mask[index, :longest].to(device)
            )
            encoded = _normalized(encoded)
        yield index, encoded


@dataclass
class LoadedModel:
    """A trained model, ready to use; `checkpoint.load_model(path)` makes one.

    Features are float32 on the CPU and of unit length: an inner product is a cosine similarity.
    """

    vlm: RetrievalModel
    tokenizer: Tokenizer
    info: CheckpointInfo
    device: torch.device
    precision: str = "auto"
    bank: QueryBank | None = None  # what hubs are told by; older checkpoints have none

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.vlm.config.projection_dim

    @property
    def logit_scale(self) -> float:
        """The inverse temperature that cosines are multiplied with in a combined score."""
        return self.vlm.similarity_scale

    def encode_images(
        self,
        images: Iterable[ImageSource],
        batch_size: int = IMAGE_BATCH,
        progress: Progress | None = None,
        *,
        views: int | None = None,
    ) -> Tensor:
        """Features [n, P] of pictures given as paths, encoded bytes or PIL images.

        Each is the mean over so many `views`, as `gallery.views`; None is the model's own number.
        Raises UserError naming the first picture that cannot be read.
        """
        images = listed(images, "image", "pictures")
        rows = [torch.empty(0, self.dim)]
        with (progress or Progress(quiet=True)).bar("pictures", len(images), "images") as bar:
            for batch in self._image_batches(images, batch_size, views):
                rows.append(batch.encoded.features.cpu())
                bar.advance(len(batch.rows))
        return torch.cat(rows)

    def encode_texts(
        self,
        texts: Iterable[str],
        batch_size: int = TEXT_BATCH,
        progress: Progress | None = None,
    ) -> Tensor:
        """Features [n, P] of texts; what is longer than the model reads is cut."""
        texts = listed(texts, "text", "strings")
        features = torch.empty(len(texts), self.dim)
        with (progress or Progress(quiet=True)).bar("texts", len(texts), "texts") as bar:
            for index, encoded in encode_text_batches(
                self.vlm,
                self.tokenizer,
                texts,
                device=self.device,
                precision=self.precision,
                batch_size=batch_size,
            ):
                features[index] = encoded.features.cpu()
                bar.advance(len(index))
        return features

    def off_images(self, features: Tensor) -> Tensor:
        """What the query bank takes off the cosines of pictures with features [n, P]: [n].

        Those that are in the bank are told though they come from other files, or in other views.
        """
        if self.bank is None:
            return torch.zeros(len(features))
        return self.bank.off_images(features, anew=True)

    def score_pairs(
        self, images: Iterable[ImageSource], texts: Iterable[str], batch_size: int = IMAGE_BATCH
    ) -> Tensor:
        """How well picture i fits text i, [n], as the model's method scores it; higher is better.

        The similarity, exp(logit_scale) * cosine, where the cosine is less what the query bank
        takes off hubs among pictures, plus, where there is a matching head, ITM times the weight
        for captions that look for pictures, chosen on validation. Or the model's pair score alone
        (SCAN, ViLT).

        Raises UserError where the numbers differ or a picture cannot be read.
        """
        of_pair = self.vlm.pair_score
        scale, weight = self.logit_scale, 0.0
        if of_pair is not None:
            scale, weight = of_pair.weights(scale, self.info.rerank_weights.image_retrieval)
        scores = [torch.empty(0)]
        # What stands alone reads no feature, which is all that other views are for.
        for _, image, text in self._pairs(images, texts, batch_size, views=None if scale else 1):
            score = scale * (image.features * text.features).sum(1)
            if weight:
                with inferring(self.vlm, self.device, self.precision):
                    score = score + weight * self.vlm.match(image, text)
            scores.append(score.cpu() - scale * self.off_images(image.features.cpu()))
        return torch.cat(scores)

    def match_pairs(
        self,
        images: Iterable[ImageSource],
        texts: Iterable[str],
        features: Tensor | None = None,
        batch_size: int = IMAGE_BATCH,
    ) -> Tensor:
        """What the model has to say of picture i and text i beyond their cosine, [n].

        That is the log-odds of a matching head, or the pair score that stands alone. `features`
        [n, P] of the pictures, as of a gallery, which a matching head reads too, spare the views
        that they are the mean of.

        Raises UserError as :meth:`score_pairs`, and where the model cannot match.
        """
        if self.vlm.pair_score is None:
            raise UserError("this model has no matching head: score_pairs gives its similarities")
        logits = [torch.empty(0)]
        views = None if features is None and not self.vlm.pair_score.alone else 1
        for rows, image, text in self._pairs(images, texts, batch_size, views):
            if features is not None:
                image = image._replace(features=features[rows].to(self.device))
            with inferring(self.vlm, self.device, self.precision):
                logits.append(self.vlm.match(image, text).cpu())
        return torch.cat(logits)

    def _pairs(
        self,
        images: Iterable[ImageSource],
        texts: Iterable[str],
        batch_size: int,
        views: int | None,
    ) -> Iterator[tuple[list[int], Encoded, Encoded]]:
        images, texts = listed(images, "image", "pictures"), listed(texts, "text", "strings")
        if len(images) != len(texts):
            raise UserError(
                f"pairs need as many texts as pictures, not {len(texts)} and {len(images)}: "
                "repeat the one that belongs to several"
            )
        for batch in self._image_batches(images, batch_size, views):
            words = texts[batch.rows[0] : batch.rows[-1] + 1]
            input_ids, mask = self.tokenizer(words, self.vlm.config.max_tokens)
            with inferring(self.vlm, self.device, self.precision):
                text = self.vlm.encode_text(input_ids.to(self.device), mask.to(self.device))
                text = _normalized(text)
            yield batch.rows, batch.encoded, text

    def _image_batches(
        self, images: list[ImageSource], batch_size: int, views: int | None = None
    ) -> Iterator[ImageBatch]:
        for batch in encode_image_batches(
            self.vlm,
            images,
            loader(images, self.vlm.eval_image_size),
            device=self.device,
            precision=self.precision,
            batch_size=batch_size,
            views=views,
        ):
            for i, reason in batch.bad:
                source = images[i]
                name = str(source) if isinstance(source, str | os.PathLike) else f"number {i}"
                raise UserError(f"picture {name} cannot be read: {reason}")
            yield batch
