"""A whole model in one safetensors file: weights, and in its header config, tokenizer, origin."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vicvlm_cli.config import from_dict, to_dict
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.device import best_device
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.inference import LoadedModel
from vicvlm_cli.model.create import build_model
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import RerankWeights, RetrievalModel
from vicvlm_cli.settings import VIEWS, ModelConfig

FORMAT_VERSION = 2  # 2: may hold a query bank
BANK = "query_bank."  # what its tensors' names begin with
FILE_NAME = "model.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself.

    ``config`` is the whole run's configuration with the resolved model; ``data`` names the split
    trained on (``source``, ``split_name``, ``split_hash``; ``before``: those of the trainings that
    it came from); ``rerank_weights`` are those of the matching log-odds beside the similarity,
    chosen on validation; ``sha256`` is the file's.
    """

    format_version: int
    config: dict[str, Any]
    data: dict[str, Any]
    objective: str
    rerank_weights: RerankWeights
    sha256: str
    path: Path

    @property
    def origins(self) -> list[dict[str, Any]]:
        """What was trained on: last, and before that."""
        own = {key: value for key, value in self.data.items() if key != "before"}
        return [own, *self.data.get("before", [])]


def save_model(
    path: Path,
    model: RetrievalModel,
    tokenizer: Tokenizer,
    *,
    config: dict[str, Any],
    data: dict[str, Any],
    objective: str,
    rerank_weights: RerankWeights,
    bank: QueryBank | None = None,
) -> None:
    """Write the whole model; the file appears complete or not at all.

    ``config`` is the run's configuration as plain data; its ``model`` part is replaced by the
    model's own, which rebuilds without hub or local weights. ``bank``: with its weights.
    """
    resolved = to_dict(model.config)
    header = {
        "format": "vicvlm",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps({**config, "model": resolved}),
        "tokenizer": tokenizer.to_json(),
        "data": json.dumps(data),
        "objective": objective,
        "rerank_weights": json.dumps(rerank_weights),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if bank is not None:
        if bank.weights is None:
            raise ValueError("the weights of the query bank have not been chosen")
        header["query_bank_weights"] = json.dumps(bank.weights)
        tensors |= {
            f"{BANK}texts": bank.texts.half(),
            f"{BANK}images": bank.images.half(),
            f"{BANK}text_image": bank.text_image,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, beside, metadata=header)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_model(
    path: str | Path,
    device: torch.device | str | None = None,
    *,
    eval_image_scale: float | None = None,
    eval_views: int | None = None,
) -> LoadedModel:
    """Load a checkpoint, or the ``model.safetensors`` of a run's folder, ready for inference.

    The one loader. It reads safetensors only, so that nothing in the file can run.

    Args:
        path: file or run folder.
        device: where the model goes; None picks the GPU if there is one.
        eval_image_scale: side of the pictures to embed, in that of training; None is the
            checkpoint's own.
        eval_views: of each picture, whose mean is its feature; None is the checkpoint's own.

    Raises:
        UserError: the file is missing, truncated, foreign, or made by a newer version, or the model
            takes no other size of pictures.
        UsageError: a number of views that there is not.
    """
    if eval_views is not None and eval_views not in VIEWS:
        raise UsageError(f"views of a picture are {', '.join(map(str, VIEWS))}, not {eval_views}")
    path = Path(path)
    if os.path.isdir(path):  # Path's own raises where one may not look
        path = path / FILE_NAME
    header, tensors = _read(path)
    try:
        config = json.loads(header["config"])
        if config["model"].pop("eval_mirror", False):  # what files had before there were crops
            config["model"]["eval_views"] = 2
        model = build_model(from_dict(ModelConfig, config["model"]))
        config["model"] = to_dict(model.config)  # older files have timm's tag, or lack settings
        tokenizer = Tokenizer.from_json(header["tokenizer"])
        # Older files have one number for both directions.
        weights = header.get("rerank_weights") or header["rerank_weight"]
        info = CheckpointInfo(
            format_version=int(header["format_version"]),
            config=config,
            data=json.loads(header["data"]),
            objective=header["objective"],
            rerank_weights=RerankWeights.of(json.loads(weights)),
            sha256=_sha256(path),
            path=path.resolve(),
        )
    except (KeyError, ValueError, TypeError, UserError) as error:
        raise UserError(
            f"{path} has a damaged vicvlm header: {error}; train or copy it again"
        ) from error
    given = {"eval_image_scale": eval_image_scale, "eval_views": eval_views}
    asked: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if asked:
        model = build_model(replace(model.config, **asked))
    bank = _bank(header, tensors, path) if "query_bank_weights" in header else None
    own = model.state_dict()
    wrong = sorted(
        k for k in own.keys() | tensors.keys() if _shape(own.get(k)) != _shape(tensors.get(k))
    )
    if wrong:
        raise UserError(
            f"{path} does not hold the weights that its header promises ({len(wrong)} differ, "
            f"the first is {wrong[0]}): copy it again"
        )
    model.load_state_dict(tensors)
    device = torch.device(device) if device is not None else best_device()
    return LoadedModel(model.to(device).eval(), tokenizer, info, device, bank=bank)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not os.path.isfile(path):
        raise UserError(
            f"there is no checkpoint at {path}: name a model.safetensors or its run folder"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(header, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}): copy or train it again"
        ) from error
    return header, tensors


def _bank(header: dict[str, str], tensors: dict[str, Tensor], path: Path) -> QueryBank:
    """The query bank, whose tensors are taken out of ``tensors``."""
    try:
        given = json.loads(header["query_bank_weights"])
        weights = RerankWeights(*map(float, given))
        texts, images = (tensors.pop(f"{BANK}{name}").float() for name in ("texts", "images"))
        text_image = tensors.pop(f"{BANK}text_image")
        dim = json.loads(header["config"])["model"]["projection_dim"]
        sound = (
            isinstance(given, list)
            and len(given) == 2
            and all(0 <= weight < math.inf for weight in weights)
            and texts.shape == (len(text_image), dim)
            and images.shape == (len(images), dim)
            and len(text_image) > 0
            and text_image.dtype == torch.long
            and bool(((text_image >= 0) & (text_image < len(images))).all())
            and bool(texts.isfinite().all() and images.isfinite().all())
        )
    except (KeyError, ValueError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} has a damaged query bank; train or copy it again")
    return QueryBank(texts, images, text_image, weights)


def _check_header(header: dict[str, str], path: Path) -> None:
    if header.get("format") != "vicvlm":
        raise UserError(
            f"{path} holds weights, but not of a vicvlm model: name a model.safetensors "
            "written by vicvlm pretrain or finetune"
        )
    version = header.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by a newer vicvlm (format {version}, this one reads up to "
            f"{FORMAT_VERSION}): upgrade with pip install -U vicvlm"
        )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
