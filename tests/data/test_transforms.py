"""Pixels: antialiased, whole, and changed only as the noise says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vicvlm_cli.data.transforms import (
    color_jitter,
    image_to_array,
    names_no_side,
    random_crop,
)


def ramps(size: int = 64, rows: int = 1) -> Tensor:
    """Red grows from left to right, green from top to bottom, both over [0, 255]; blue is 7."""
    line = torch.linspace(0, 255, size).round().to(torch.uint8)
    image = torch.full((3, size, size), 7, dtype=torch.uint8)
    image[0], image[1] = line[None, :], line[:, None]
    return image.expand(rows, -1, -1, -1)


def test_shrinking_averages_fine_patterns() -> None:
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    small = image_to_array(Image.fromarray(board).convert("RGB"), 16)
    assert small.shape == (3, 16, 16) and small.dtype == np.uint8
    assert abs(small.astype(int) - 128).max() < 30  # without antialiasing: 0 or 255


@pytest.mark.parametrize("shape", [(97, 130), (40, 31), (64, 200)])
def test_resizing_is_pillows(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    slow = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    apart = abs(image_to_array(image, 48).astype(int) - slow)
    assert apart.max() <= 2 and apart.mean() < 0.05


def test_the_whole_picture_is_squashed_into_the_square() -> None:
    wide = np.zeros((40, 160, 3), dtype=np.uint8)
    wide[:, :20, 0] = wide[:, -20:, 1] = 255  # both ends of a wide picture
    small = image_to_array(Image.fromarray(wide), 32)
    assert small[0, 16, 0] > 200 and small[1, 16, -1] > 200
    assert small[0, 16, 16] < 30 and small[1, 16, 16] < 30


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    array = image_to_array(Image.fromarray(pixels), 24)
    assert np.array_equal(array, pixels.transpose(2, 0, 1))
    assert array.flags.c_contiguous


@pytest.mark.parametrize(
    "caption",
    ["a dog left of a cat", "The rightmost cup", "RIGHT there.", "on the left, two men", "left"],
)
def test_captions_that_name_a_side(caption: str) -> None:
    assert not names_no_side(caption)


@pytest.mark.parametrize(
    "caption",
    [
        *("ein Hund links neben einer Katze", "Rechts ein Baum", "der linken Hand"),
        *("am rechten Rand", "linker Fuß"),
        *("een hond links van een kat", "rechtsboven een boom", "in de linkerhand"),
        *("un chien à gauche d'un chat", "le bras droit", "la main droite", "les deux de gauche"),
        *("un perro a la izquierda", "el brazo derecho", "con la mano derecha"),
        *("un cane a sinistra", "nell'angolo destro", "sulla destra", "le due sedie sinistre"),
        *("um cão à esquerda", "o braço direito", "à DIREITA do barco", "os bancos esquerdos"),
    ],
)
def test_captions_that_name_a_side_in_other_languages(caption: str) -> None:
    assert not names_no_side(caption)


@pytest.mark.parametrize(
    "caption",
    [
        *("a bright light", "leftover pizza", "an upright piano", "two dogs", ""),
        *("linked arms", "a sinister face", "an adroit rider", "a golf course", "he destroys it"),
        *("ein Rechteck auf Gras", "eine rechteckige Kiste", "ein Hund am Strand"),
        *("un chien sur la plage", "un perro en la playa", "una maestra", "um cão na praia"),
    ],
)
def test_captions_that_name_none(caption: str) -> None:
    assert names_no_side(caption)


def test_the_largest_crop_is_the_picture_itself() -> None:
    image = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    kept = torch.zeros(3, dtype=torch.bool)
    same = random_crop(image, 16, 1.0, torch.rand(3, 4), kept)
    torch.testing.assert_close(same, image.float(), rtol=0, atol=1e-3)
    mirrored = random_crop(image, 16, 1.0, torch.rand(3, 4), ~kept)
    torch.testing.assert_close(mirrored, image.float().flip(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_crops_equal_those_by_torch_s_own_affine_grid(scale: float, size: int) -> None:
    image = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    noise, flip = torch.rand(5, 4), torch.tensor([True, False, False, True, True])
    area = scale + (1 - scale) * noise[:, 0]
    ratio = torch.exp((noise[:, 1] * 2 - 1) * math.log(4 / 3) * (scale < 1))
    theta = torch.zeros(5, 2, 3)
    for b in range(5):
        half_w = min(1.0, math.sqrt(float(area[b] * ratio[b])))
        half_h = min(1.0, math.sqrt(float(area[b] / ratio[b])))
        theta[b, 0] = torch.tensor([half_w * (-1 if flip[b] else 1), 0, 0])
        theta[b, 1] = torch.tensor([0, half_h, 0])
        theta[b, 0, 2] = (noise[b, 2] * 2 - 1) * (1 - half_w)
        theta[b, 1, 2] = (noise[b, 3] * 2 - 1) * (1 - half_h)
    grid = F.affine_grid(theta, [5, 3, size, size], align_corners=False)
    slow = F.grid_sample(image.float(), grid, padding_mode="reflection", align_corners=False)
    fast = random_crop(image, size, scale, noise, flip)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-2)


def test_each_row_is_flipped_as_it_is_told() -> None:
    flip = torch.tensor([True, False, True])
    noise = torch.rand(1, 4).expand(3, -1)
    crops = random_crop(ramps(rows=3), 32, 0.5, noise, flip)
    torch.testing.assert_close(crops[0], crops[1].flip(-1), rtol=0, atol=1e-3)
    torch.testing.assert_close(crops[0], crops[2], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.9])
def test_crops_have_the_drawn_area_and_lie_inside(scale: float) -> None:
    noise = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    size = 64
    crops = random_crop(ramps(size, 200), size, scale, noise, torch.zeros(200, dtype=torch.bool))
    assert crops.shape == (200, 3, size, size) and crops.dtype == torch.float32
    assert float(crops.min()) >= 0 and float(crops.max()) <= 255
    torch.testing.assert_close(crops[:, 2], torch.full_like(crops[:, 2], 7.0))
    # From the two ramps: how much of the width and the height is seen.
    width = (crops[:, 0].amax((1, 2)) - crops[:, 0].amin((1, 2))) / 255
    height = (crops[:, 1].amax((1, 2)) - crops[:, 1].amin((1, 2))) / 255
    area = scale + (1 - scale) * noise[:, 0]
    ratio = torch.exp((noise[:, 1] * 2 - 1) * np.log(4 / 3))
    expected_width = (area * ratio).sqrt().clamp(max=1)
    expected_height = (area / ratio).sqrt().clamp(max=1)
    torch.testing.assert_close(width, expected_width, rtol=0, atol=0.03)
    torch.testing.assert_close(height, expected_height, rtol=0, atol=0.03)
    # And that crops come from everywhere, not only from the middle.
    left = crops[:, 0].amin((1, 2)) / 255
    room = (1 - expected_width).clamp(min=1e-3)
    place = (left / room)[expected_width < 0.9]
    if len(place):
        torch.testing.assert_close(place, noise[expected_width < 0.9, 2], rtol=0, atol=0.15)


def test_a_crop_depends_on_its_own_noise_alone() -> None:
    image, noise = ramps(rows=4), torch.rand(4, 4)
    flip = torch.tensor([True, False, False, True])
    whole = random_crop(image, 24, 0.5, noise, flip)
    part = random_crop(image[2:], 24, 0.5, noise[2:], flip[2:])
    torch.testing.assert_close(whole[2:], part)


def test_colours_change_as_drawn_and_no_more() -> None:
    image = torch.rand(2, 3, 8, 8) * 100 + 60
    half = torch.full((2, 3), 0.5)
    torch.testing.assert_close(color_jitter(image, 0.4, half), image)
    torch.testing.assert_close(color_jitter(image, 0.0, torch.rand(2, 3)), image)
    brighter, flatter, greyer = half.clone(), half.clone(), half.clone()
    brighter[:, 0], flatter[:, 1], greyer[:, 2] = 1.0, 0.0, 0.0
    torch.testing.assert_close(color_jitter(image, 0.4, brighter), (image * 1.4).clamp(0, 255))
    mean = image.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(color_jitter(image, 0.4, flatter), mean + 0.6 * (image - mean))
    gray = image.mean(1, keepdim=True)
    torch.testing.assert_close(color_jitter(image, 0.4, greyer), gray + 0.6 * (image - gray))
    strong = color_jitter(image * 1.5, 1.0, torch.ones(2, 3))
    assert float(strong.max()) <= 255 and float(strong.min()) >= 0
