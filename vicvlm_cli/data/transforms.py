"""Pictures to pixels: antialiased resizing on the host, augmentation batched on the device."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vicvlm_cli.settings import DataConfig

# A caption that names a side is false of the mirrored picture. A word too many here costs no more
# than a picture that is not mirrored.
_SIDE = re.compile(
    r"\b(?:left|right|leftmost|rightmost|lefthand|righthand"
    r"|(?:links|rechts)\w*|(?:linke|rechte)[mns]?|(?:linker|rechter)\w*"  # German, Dutch
    r"|gauches?|droite?s?"  # French
    r"|(?:izquierd|derech)[ao]s?"  # Spanish
    r"|(?:sinistr|destr)[aeio]"  # Italian
    r"|(?:esquerd|direit)[ao]s?)\b",  # Portuguese
    re.IGNORECASE,
)
# Head room for random crops: the loader's pictures are this much larger than the model's.
CROP_MARGIN = 1.125
# Side of the crops that are embedded beside a whole picture, in that of the picture. They are shown
# as large as it is: things in them are of the sizes that random crops train on.
VIEW_CROP = 0.8


def image_to_array(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture as uint8 [3, size, size], resized with antialiasing.

    The picture is squashed to a square rather than cropped: captions describe all of it.
    """
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)  # [3, H, W]
    if image.size != (size, size):
        # Pillow's own filter, to a grey level, in a quarter of its time.
        pixels = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]
    # By numpy: torch would wake its threads for it, and decoding threads are many already.
    return np.ascontiguousarray(pixels.numpy())


def enlarged_side(size: int, views: int) -> int | None:
    """Side of the whole picture whose windows of ``size`` are its crops; None: there are none."""
    return round(size / VIEW_CROP) if views > 2 else None


def other_views(whole: Tensor, enlarged: Tensor | None, views: int) -> Iterator[Tensor]:
    """What is embedded beside the pictures as they are, up to ``views`` with these.

    Their mirror images, then their centres, then their corners, every second one mirrored: fewer
    than the ten crops of Krizhevsky et al. (NeurIPS 2012, sec. 4.1), and all of the picture first.

    Args:
        whole: [B, 3, S, S].
        enlarged: the same pictures [B, 3, L, L] with L of :func:`enlarged_side`.
        views: 1, 2, 3 or 7.
    """
    if views > 1:
        yield whole.flip(3)
    if enlarged is None:
        return
    size, far = whole.shape[3], enlarged.shape[3] - whole.shape[3]
    corners = [(0, 0), (0, far), (far, 0), (far, far)] if views > 3 else []
    for number, (top, left) in enumerate([(far // 2, far // 2), *corners]):
        crop = enlarged[:, :, top : top + size, left : left + size]
        yield crop.flip(3) if number % 2 == 0 and number else crop


def names_no_side(caption: str) -> bool:
    """Whether a horizontal flip keeps ``caption`` true.

    It may be in English, German, French, Spanish, Italian, Portuguese or Dutch.
    """
    return _SIDE.search(caption) is None


def random_crop(image: Tensor, size: int, scale: float, noise: Tensor, flip: Tensor) -> Tensor:
    """Random resized crops and flips of a whole batch at once.

    Args:
        image: uint8 [B, 3, H, W].
        size: side of the result.
        scale: smallest area of a crop as a share of the picture; 1 keeps all of it.
        noise: uniform [B, 4] in [0, 1): area, aspect ratio, and the crop's place.
        flip: bool [B], which rows are mirrored.

    Returns:
        float [B, 3, size, size] in [0, 255].
    """
    if scale == 1 and image.shape[2:] == (size, size):
        return torch.where(flip[:, None, None, None], image.flip(3), image).float()
    area = scale + (1 - scale) * noise[:, 0]
    ratio = torch.exp((noise[:, 1] * 2 - 1) * float(np.log(4 / 3)) * float(scale < 1))
    half_w = (area * ratio).sqrt().clamp(max=1.0)  # [B], half of the [-1, 1] range covered
    half_h = (area / ratio).sqrt().clamp(max=1.0)
    center_x = (noise[:, 2] * 2 - 1) * (1 - half_w)
    center_y = (noise[:, 3] * 2 - 1) * (1 - half_h)
    sign = 1.0 - 2.0 * flip.to(half_w.dtype)
    # Centres of the pixels in [-1, 1]. Without rotation x and y are apart, and adding them is a
    # fraction of the time of affine_grid's matrix products.
    place = (torch.arange(size, device=image.device) * 2 + 1) / size - 1
    x = center_x[:, None] + (half_w * sign)[:, None] * place  # [B, size]
    y = center_y[:, None] + half_h[:, None] * place
    shape = (len(image), size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(
        image.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


class Draws(NamedTuple):
    """What chance decides of each picture: see :func:`random_crop` and :func:`color_jitter`."""

    flip: Tensor  # bool [B]
    crop: Tensor  # uniform [B, 4]
    color: Tensor  # uniform [B, 3]


def augmented(image: Tensor, size: int, data: DataConfig, draws: Draws) -> Tensor:
    """Random crops, flips and colours of uint8 [B, 3, H, W]: float [B, 3, size, size]."""
    image = random_crop(image, size, data.crop_scale, draws.crop, draws.flip)
    return color_jitter(image, data.color_jitter, draws.color) if data.color_jitter else image


def color_jitter(image: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Brightness, contrast and saturation changed by up to ``strength`` each.

    ``image`` is float [B, 3, H, W] in [0, 255] and ``noise`` uniform [B, 3]. Hue stays: captions
    name colours.
    """
    factor = 1 + strength * (noise * 2 - 1)
    image = image * factor[:, 0, None, None, None]
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    image = mean + (image - mean) * factor[:, 1, None, None, None]
    gray = image.mean(dim=1, keepdim=True)
    image = gray + (image - gray) * factor[:, 2, None, None, None]
    return image.clamp(0, 255)
