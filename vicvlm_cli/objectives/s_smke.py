"""S-SMKE: two short encoders under one shared block, taught by a frozen image encoder."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.image_encoder import read_folder
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import clamp_temperature, contrasted_rows, info_nce
from vicvlm_cli.objectives.cached import Cached, in_float32, over_step
from vicvlm_cli.objectives.queue import FeatureQueue
from vicvlm_cli.objectives.ranks import Noise, gather
from vicvlm_cli.objectives.retrieval import Losses


class Teacher(nn.Module):
    """A frozen timm model: pixels in [0, 255] [B, 3, S, S] to pooled features [B, T].

    Args:
        name: of a model, or a local folder of one, whose card may say what pictures it sees.
        weights: a local file, or ``hub``; ``""``: the folder's own, or else the hub's.

    Raises:
        UsageError: timm has no model of that name, and there is no such folder.
        UserError: the folder does not hold what is needed, or the weights cannot be loaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str = "") -> None:
        super().__init__()
        card: dict[str, Any] = {}
        if Path(name).is_dir():
            name, weights, card = read_folder(Path(name), weights)
        elif not timm.is_model(name):
            stem = Path(name).name.split(".")[0]
            close = timm.list_models(f"*{stem}*")[:3] or ["vit_base_patch16_224"]
            raise UsageError(
                f"timm has no model {name!r} to teach, and there is no such folder: try "
                f"{', '.join(close)}"
            )
        weights = weights or "hub"
        if weights != "hub" and not Path(weights).is_file():
            raise UserError(f"there are no teacher weights at {weights}")
        network = _load_teacher(name, weights, card)
        self.network = network.requires_grad_(False).eval()
        self.size: tuple[int, int] = tuple(network.pretrained_cfg["input_size"][1:])
        for key in ("mean", "std"):
            pixels = torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) * 255
            self.register_buffer(key, pixels, persistent=False)
        # By trying: what timm calls num_features is not what every network gives.
        self.width: int = self(torch.zeros(1, 3, *self.size)).shape[1]

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: what it teaches does not change."""
        return self

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Pooled features of unit length."""
        image = F.interpolate(image.float(), self.size, mode="bilinear", antialias=True)
        return F.normalize(self.network((image - self.mean) / self.std).float(), dim=-1)


def _load_teacher(name: str, weights: str, card: dict[str, Any]) -> Any:
    own = card if weights == "hub" else {**card, "file": weights}
    made = partial(timm.create_model, name, num_classes=0, pretrained_cfg_overlay=own)
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(0)
            random = made()
            torch.manual_seed(0)
            network = made(pretrained=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the weights of the teacher {name!r} could not be loaded from {weights}: {reason}"
            ) from error
    # timm leaves what a file lacks as it was: random, and from one seed the same in both.
    pairs = zip(network.named_parameters(), random.parameters(), strict=True)
    missing = [key for (key, a), b in pairs if a.ndim > 1 and torch.equal(a, b)]
    if missing:
        raise UserError(
            f"{weights} does not hold the weights of the teacher {name!r}: {len(missing)} are "
            f"missing, the first is {missing[0]}; name the model they are of with --teacher"
        )
    return network


class SSMKE(nn.Module):
    """Contrast on both outputs of the shared block, and distillation from an image teacher.

    Pictures and captions both learn to find the teacher's feature of their picture among those of
    the batch and of a bank of earlier ones.

    Raises:
        UsageError: no teacher is named, or an option is out of range.
        UsageError, UserError: what :class:`Teacher` raises.
    """

    LOSSES = ("itc", "kd")
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "shared", "image_layers": 6},
        "pretrain": {"losses": {"itc": {}, "kd": {}}},
        # Of the final output alone: that is what is embedded.
        "finetune": {"objective": "clip", "losses": {"itc": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """``teacher`` and ``teacher_weights``: as :class:`Teacher` takes them.

        ``bank_size``: teacher features kept of earlier batches (the paper: 65,536).
        """

        teacher: str = ""
        teacher_weights: str = ""
        bank_size: int = 4096

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        if model.shared is None:
            raise UsageError(
                "s_smke needs the shared block of model.fusion=shared, which "
                "--objective s_smke chooses"
            )
        if config.bank_size < 0:
            raise UsageError("options.bank_size must be 0 or more")
        if not config.teacher:
            raise UsageError(
                "s_smke learns from a teacher: name a timm model with --teacher; where there is no "
                "network, its local folder, or a local file of its weights with --teacher-weights"
            )
        self.model, self.config = model, config
        self.teacher = Teacher(config.teacher, config.teacher_weights)
        width, out = model.config.text_width, model.config.projection_dim
        self.image_head = nn.Linear(width, out)  # of the output after attention
        self.text_head = nn.Linear(width, out)
        self.kd_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.teacher.width))
        start = -math.log(model.config.temperature)
        self.attended_scale = nn.Parameter(torch.tensor(start))
        self.kd_scale = nn.Parameter(torch.tensor(start))
        self.bank = FeatureQueue(config.bank_size, self.teacher.width)
        self._pending: list[tuple[Tensor, Tensor]] = []  # of this step, for the bank at its end

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active`` (ITC always), and the trivial value of each."""
        image = self.model.encode_image(batch.image, batch.begun)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        assert image.attended is not None and text.attended is not None
        first = F.normalize(self.image_head(image.attended), dim=-1)
        second = F.normalize(self.text_head(text.attended), dim=-1)
        final = contrasted_rows(self.model, image, text, batch)
        loss, guess = over_step(
            self._contrast, first.float(), second.float(), *final, cached=cached
        )
        values, trivial = {"itc": loss}, {"itc": guess}
        if "kd" in active:
            values["kd"], trivial["kd"] = self._distil(batch, image, text)
        return values, trivial

    def _contrast(self, images: Tensor, texts: Tensor, *final: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ITC of attended features [G, P] and of ``final`` rows, and its trivial value."""
        a = info_nce(self.model.logit_scale, *final)
        b = info_nce(self.attended_scale, images, texts, final[2])
        return (a.loss + b.loss) / 2, (a.trivial + b.trivial) / 2

    def _distil(self, batch: Batch, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        image_id = gather(batch.image_id)
        taught = gather(self.teacher(batch.image))  # [G, T]
        bank, bank_id = self.bank.filled()
        candidates = torch.cat([taught, bank])  # [G + K, T]
        ids = torch.cat([image_id, bank_id])
        total = taught.new_zeros(())
        for encoded in (image, text):
            student = F.normalize(gather(self.kd_head(encoded.tokens[:, 0]).float()), dim=-1)
            total = total + in_float32(self._kd, student, candidates, image_id, ids) / 2
        if self.training:
            self._pending.append((taught, image_id))
        return total, torch.tensor(math.log(len(candidates)))

    def _kd(self, student: Tensor, candidates: Tensor, image_id: Tensor, ids: Tensor) -> Tensor:
        logits = self.kd_scale.exp() * student @ candidates.T  # [G, G + K]
        return losses.kd(logits, image_id, ids)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound the temperatures and fill the bank; once an optimiser step."""
        clamp_temperature(self.model)
        for taught, image_id in self._pending:
            self.bank.push(taught, image_id)
        self._pending.clear()
        for scale in (self.attended_scale, self.kd_scale):
            scale.clamp_(max=math.log(100))
