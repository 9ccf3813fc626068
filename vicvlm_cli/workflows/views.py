"""Views of the pictures that the image encoder's frozen blocks see once, before a training.

What a frozen block makes of a picture never changes. So a few augmented views of each picture go
through the frozen blocks beforehand, into a file of the run, and each step starts where the trained
blocks do. All else that a step does with a picture (masks, an EMA target) is given the very view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vicvlm_cli.data.arrays import read_array, write_array
from vicvlm_cli.data.batches import Batch, Rows
from vicvlm_cli.data.transforms import Draws, augmented
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM, RetrievalModel
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import DataConfig, TrainConfig

FILE_NAME = "views.npy"
BLOCK = 128  # views at a time through the encoder
STREAM = 1  # of the random numbers that choose a step's views
CPU = torch.device("cpu")


class Views:
    """``number`` views of each of ``pictures`` pictures: how each is cropped, flipped, coloured.

    Every second one is mirrored, for captions that name no side.
    """

    def __init__(self, pictures: int, number: int, size: int, data: DataConfig, seed: int) -> None:
        self.number, self.size, self.data, self.seed = number, size, data, seed
        rng = np.random.default_rng((seed, 0, STREAM))
        self.draws = torch.from_numpy(rng.random((pictures, number, 7), dtype=np.float32))
        # int16 [pictures, number, prefix + N, D], the bits of bfloat16.
        self.tokens: np.ndarray | None = None

    def pixels(self, image: Tensor, picture: Tensor, view: Tensor) -> Tensor:
        """float [B, 3, size, size], those views of ``image`` uint8 [B, 3, H, W] on any device.

        ``picture`` and ``view`` are long [B], on the CPU.
        """
        draws = self.draws[picture, view].to(image.device)
        flip = ((view % 2 == 1) & self.data.flip).to(image.device)
        return augmented(image, self.size, self.data, Draws(flip, draws[:, :4], draws[:, 4:]))

    def choose(self, batch: Batch, step: int, device: torch.device) -> Batch:
        """``batch``, as the loader gave it, on ``device`` with a view of each picture.

        ``image`` is the view and ``begun`` what the frozen blocks made of it.
        """
        assert self.tokens is not None
        picture = batch.image_id
        draw = Noise(self.seed, step, CPU, STREAM).rand(len(picture))
        view = (draw * self.number).long()
        if self.data.flip:
            view -= (view % 2) * ~batch.flip_ok
        bits = torch.from_numpy(self.tokens[picture.numpy(), view.numpy()])
        batch = replace(batch, begun=bits.view(torch.bfloat16)).to(device)
        batch.image = self.pixels(batch.image, picture, view)
        return batch


def check_views(model: RetrievalModel, config: TrainConfig) -> None:
    """Refuse ``cached_views`` where there is nothing to keep, ``frozen_epochs`` of nothing.

    Raises:
        UsageError: no block is frozen, or the model has no image encoder of its own.
    """
    if config.frozen_epochs and not config.frozen_blocks:
        raise UsageError(
            "frozen_epochs is how long blocks are frozen, and no block is: set frozen_blocks too, "
            "or frozen_epochs to 0"
        )
    if not config.cached_views:
        return
    if not config.frozen_blocks:
        raise UsageError(
            "cached_views keeps what frozen blocks make of pictures, and no block is frozen: set "
            "frozen_blocks too, or cached_views to 0"
        )
    if not isinstance(model, VLM):
        raise UsageError(
            f"{config.objective} reads words and patches together from the first block on: set "
            "cached_views to 0"
        )


def make_views(
    accelerator: Accelerator,
    model: VLM,
    rows: Rows,
    config: TrainConfig,
    data: DataConfig,
    folder: Path,
    resumed: bool,
    progress: Progress,
) -> Views:
    """The views that ``cached_views`` asks for, in a file of ``folder``.

    A run that is ``resumed`` finds its file again.

    Raises:
        UserError: there is no room for the file.
    """
    encoder, number = model.image_encoder, config.cached_views
    views = Views(len(rows.split), number, model.config.image_size, data, config.seed)
    shape = (len(rows.split), number, encoder.prefix + encoder.num_patches, encoder.width)
    path = folder / FILE_NAME
    kept = read_array(path, "<i2", shape) if resumed else None
    if accelerator.is_local_main_process and kept is None:
        folder.mkdir(parents=True, exist_ok=True)  # on every machine
        drop_views(folder)
        size = np.prod(shape, dtype=np.int64) * 2 / 1e9
        progress.say(
            f"{number} views of each picture go through {encoder.frozen} frozen blocks first "
            f"({size:.1f} GB in {path}, until the run is over)"
        )
        write_array(
            path,
            "<i2",
            shape,
            _encoded(accelerator, model, views, rows, progress),
            what="what the frozen blocks make of the views",
            otherwise="make room there, or lower cached_views",
        )
    accelerator.wait_for_everyone()
    views.tokens = read_array(path, "<i2", shape)
    return views


def drop_views(folder: Path) -> None:
    """Give back the room, also that of a process that was killed while it wrote."""
    for file in folder.glob(f"{FILE_NAME}*"):
        file.unlink(missing_ok=True)


def _encoded(
    accelerator: Accelerator, model: VLM, views: Views, rows: Rows, progress: Progress
) -> Iterator[bytes]:
    """The bits of every view, picture after picture."""
    encoder, device = model.image_encoder, accelerator.device
    training = encoder.training
    encoder.eval()
    total = len(rows.split)
    block = max(1, BLOCK // views.number)  # pictures
    each = torch.arange(views.number)
    with progress.bar("encoding views", total, "images") as bar:
        for start in range(0, total, block):
            picture = torch.arange(start, min(start + block, total))
            image = rows.images(picture.numpy()).to(device)
            again = image.repeat_interleave(views.number, dim=0)
            pixels = views.pixels(
                again, picture.repeat_interleave(views.number), each.repeat(len(picture))
            )
            with torch.no_grad(), accelerator.autocast():
                begun = encoder.begin(model.normalize(pixels))
            yield begun.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()
            bar.advance(len(picture))
    encoder.train(training)
