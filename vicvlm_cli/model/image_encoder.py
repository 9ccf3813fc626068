"""The image encoder: any timm ViT, over all patches or a kept subset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import timm.layers
import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.feed_forward import make_lean


def sincos_2d(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed sine-cosine positions [H*W, width] of a patch grid (MAE, arXiv 2111.06377, app. A)."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [v.reshape(-1, 1).double() * omega for v in (x, y)]  # [H*W, quarter] each
    parts = [f(a) for a in angles for f in (torch.sin, torch.cos)]
    table = torch.zeros(grid[0] * grid[1], width)
    table[:, : 4 * quarter] = torch.cat(parts, dim=1).float()
    return table


class ImageEncoder(nn.Module):
    """A timm ViT that returns all its tokens.

    Args:
        size: side in pixels of the pictures that it is trained on.
        eval_scale: what the side of pictures in evaluation is of ``size``, rounded to whole
            patches; positions are resampled to their grid.
        layers: of the first blocks, which alone are kept, under the final norm; 0, or more than
            there are: all.

    Raises:
        UserError: the name is not a timm ViT, its weights cannot be loaded, or ``size`` is not a
            multiple of its patches.
    """

    def __init__(
        self,
        name: str,
        size: int,
        options: dict[str, Any],
        positions: str,
        weights: str = "",
        eval_scale: float = 1.0,
        layers: int = 0,
    ) -> None:
        super().__init__()
        # timm decides between fused and eager attention when a block is made. Measured on CPUs in
        # bf16, the backward of the fused kernel costs more than half of a training step.
        timm.layers.set_fused_attn(torch.cuda.is_available())
        arguments = {"num_classes": 0, "img_size": size, **options}
        if eval_scale != 1:
            arguments["dynamic_img_size"] = True
        if weights == "hub":
            arguments["pretrained"] = True
        vit: Any = _create(name, weights, arguments)
        plain = isinstance(vit, VisionTransformer) and vit.attn_pool is None
        if not (plain and vit.cls_token is not None):
            raise UserError(
                f"{name!r} is not a plain ViT with a [CLS] token: name a timm "
                "vit_* or deit_* model, such as vit_small_patch16_224"
            )
        patch = max(vit.patch_embed.patch_size)
        if size % patch:
            raise UserError(
                f"model.image_size={size} is not a multiple of {name!r}'s patch of {patch}"
            )
        if weights and weights != "hub":
            _load_weights(vit, name, weights)
        if isinstance(vit.norm, nn.Identity):
            # Where the mean of the patches is to be normalised, timm keeps the final norm for it.
            # Not before: weights know it by that name.
            vit.norm, vit.fc_norm = vit.fc_norm, vit.norm
        self._blocks = len(vit.blocks)  # of the whole encoder
        if layers:  # not before: weights are of the whole, and are checked so
            vit.blocks = vit.blocks[:layers]
        make_lean(vit)
        self.vit = vit
        self.width: int = vit.embed_dim
        self.grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.prefix: int = vit.num_prefix_tokens
        self.frozen = 0  # lowest blocks that keep their weights
        self.eval_size: int = max(1, round(eval_scale * size / patch)) * patch
        if positions == "sincos" and not weights:
            # timm starts positions at a std of 0.02 beside patches of about 0.3; a short training
            # from scratch never learns them. Half-scale sine-cosine is there from the first step.
            with torch.no_grad():
                vit.pos_embed[:, -self.num_patches :] = 0.5 * sincos_2d(self.grid, self.width)

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return self.grid[0] * self.grid[1]

    def freeze(self, blocks: int, for_good: bool = True) -> None:
        """Let the lowest ``blocks``, and the embeddings below them, keep their weights.

        Nothing is kept for their backward pass, and there is none but to mask tokens, which come in
        below them. 0 frees all. Where it is not ``for_good`` they still want gradients, as
        processes must agree on from the beginning: what they get is for the training to drop.
        Blocks are counted in the whole encoder, whose presets know of no method that cuts it: of
        one that is cut, all that are left may be frozen.

        Raises:
            UserError: there are not so many blocks in the whole encoder.
        """
        vit: Any = self.vit
        if not 0 <= blocks <= self._blocks:
            raise UserError(
                f"frozen_blocks={blocks} is more than the image encoder's {self._blocks} blocks"
                ": set it to as many, or to 0"
            )
        self.requires_grad_(True)
        self.frozen = min(blocks, len(vit.blocks))
        if for_good:
            for parameter in self.frozen_parameters():
                parameter.requires_grad_(False)

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Those of the frozen blocks and of the embeddings below them; none where none is."""
        vit: Any = self.vit
        if not self.frozen:
            return []
        above = ("blocks.", "norm.")
        below = [p for name, p in vit.named_parameters() if not name.startswith(above)]
        return [*below, *vit.blocks[: self.frozen].parameters()]

    @torch.no_grad()
    def begin(self, image: Tensor) -> Tensor:
        """Normalised pictures [B, 3, S, S] through the frozen blocks: [B, prefix + N, width]."""
        vit: Any = self.vit
        return vit.blocks[: self.frozen](self._embed(image))

    def forward(
        self,
        image: Tensor,
        keep: Tensor | None = None,
        *,
        begun: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Normalised pictures to tokens.

        Args:
            image: float [B, 3, S, S], already normalised.
            keep: long [B, K], the patches to encode; the others are dropped before the first block
                (He et al., arXiv 2111.06377, sec. 3). None: all.
            begun: what :meth:`begin` gave for ``image``, which then is not looked at; or None.
            hidden: bool [B, N], the patches that ``mask_token`` [width] stands in for, before
                positions are added (BEiT, arXiv 2106.08254, sec. 2.3). None: none.

        Returns:
            [B, prefix + N or K, width], the class token first, after the final norm.
        """
        vit: Any = self.vit
        if begun is not None:
            assert keep is None and hidden is None, "the frozen blocks have seen the whole picture"
            return vit.norm(vit.blocks[self.frozen :](begun.float()))
        # A mask token learns through the frozen blocks; nothing else below them does.
        learns = torch.is_grad_enabled() and (not self.frozen or hidden is not None)
        with torch.set_grad_enabled(learns):
            x = self._embed(image, hidden, mask_token)
            if keep is not None:
                patches = x[:, self.prefix :]
                index = keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])
                x = torch.cat([x[:, : self.prefix], patches.gather(1, index)], dim=1)
            x = vit.blocks[: self.frozen](x)
        return vit.norm(vit.blocks[self.frozen :](x))

    def _embed(
        self, image: Tensor, hidden: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """What enters the first block, [B, prefix + N, width]."""
        vit: Any = self.vit
        x = vit.patch_embed(image)  # [B, N, D], or [B, H, W, D] where timm keeps the grid
        if hidden is not None:
            assert mask_token is not None
            x = torch.where(hidden.view(x.shape[:-1]).unsqueeze(-1), mask_token.to(x.dtype), x)
        embedded: Tensor = vit.norm_pre(vit._pos_embed(x))
        return embedded


def _create(name: str, weights: str, arguments: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('.')[0]}*")[:3] or ["vit_small_patch16_224"]
        raise UserError(f"timm has no model {name!r}: try {', '.join(close)}")
    if weights != "hub":  # a tag is of nothing else, and another timm may not know it
        name = architecture(name)
    try:
        return timm.create_model(name, **arguments)
    except (TypeError, AssertionError) as error:
        raise UserError(f"timm cannot make {name!r} with {arguments}: {error}") from error
    except Exception as error:
        if weights != "hub":
            raise
        raise _unusable(name, "the hub (is there a network?)", error) from error


def _load_weights(vit: VisionTransformer, name: str, file: str) -> None:
    """Load a local file into ``vit``, positions interpolated; a classifier is left out."""
    try:
        state = load_state_dict(file, weights_only=True)
        # The layer scale has another name in the files that DeiT III was published in.
        state = checkpoint_filter_fn(state, vit, adapt_layer_scale=True)
        missing = vit.load_state_dict(state, strict=False).missing_keys
    except Exception as error:
        raise _unusable(name, file, error) from error
    if missing:  # timm itself would leave them random
        raise UserError(
            f"{file} does not hold the weights of {name!r}: {len(missing)} are missing, the first "
            f"is {missing[0]}; name the model they are of with --image-encoder"
        )


def _unusable(name: str, place: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"the weights of {name!r} could not be loaded from {place}: {reason[:200]}; "
        "--image-weights takes a local .safetensors or .pth file of that model"
    )


def architecture(name: str) -> str:
    """A timm name without its tag, which says no more than which weights of the hub are meant."""
    return name.split(".")[0]


def resolve_image_encoder(name: str, weights: str) -> tuple[str, str, dict[str, Any]]:
    """A timm name or a local model folder as (timm name, weights, config entries).

    The config entries hold ``image_mean`` and ``image_std`` where the weights' own are known.

    Raises:
        UserError: a local folder or file that does not hold what is needed, or a tag that timm
            does not know.
    """
    if Path(name).is_dir():
        name, weights, card = read_folder(Path(name), weights)
        return name, weights, {f"image_{k}": card[k] for k in ("mean", "std") if k in card}
    if weights and weights != "hub" and not Path(weights).is_file():
        raise UserError(f"there are no image weights at {weights}")
    if not timm.is_model(name):
        return name, weights, {}
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{architecture(name)}.*")
        known = f"name one of {', '.join(tags)}" if tags else f"name it {architecture(name)}"
        raise UserError(f"timm has no weights {name!r}: {known}") from error
    if cfg is None or not weights:
        return name, weights, {}
    return name, weights, {"image_mean": tuple(cfg.mean), "image_std": tuple(cfg.std)}


def read_folder(folder: Path, weights: str = "") -> tuple[str, str, dict[str, Any]]:
    """A local model folder as (architecture, weights, what its card says of pictures).

    ``config.json``, the card, names a timm ``architecture``. Beside it lie the weights, if none
    are given. Of :data:`OF_PICTURES` comes what the card has, in it or in its ``pretrained_cfg``.

    Raises:
        UserError: the folder does not hold what is needed.
    """
    file = folder / "config.json"
    try:
        card = json.loads(file.read_text("utf-8"))
        name = card["architecture"]
        card = {**card, **(card.get("pretrained_cfg") or {})}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no config.json that names a timm 'architecture'") from error
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{file} names the architecture {name!r}, of which timm has no model")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])
    if not weights and not files:
        raise UserError(f"{folder} holds no .safetensors or .pth weights")
    known = {key: card[key] for key in OF_PICTURES if key in card}
    for key, value in known.items():
        kinds = [type(number) for number in value] if isinstance(value, list) else []
        number = {int} if key == "input_size" else {int, float}
        if len(kinds) != 3 or not {*kinds} <= number or (key != "mean" and min(value) <= 0):
            raise UserError(f"{file} says that {key} is {value!r}, not {OF_PICTURES[key]}")
    return name, weights or str(files[0]), {key: tuple(value) for key, value in known.items()}


OF_PICTURES = {
    "mean": "three numbers",
    "std": "three numbers above 0",
    "input_size": "three whole numbers above 0",
}
