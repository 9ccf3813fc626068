"""Any picture that Pillow reads becomes RGB; everything else gets a reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vicvlm_cli.data import images
from vicvlm_cli.data.images import BadImage, encode_image, load_rgb

RED = (220, 30, 20)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height))


def middle(data: bytes) -> tuple[int, int, int]:
    image = load_rgb(data)
    assert image.mode == "RGB"
    return image.getpixel((image.width // 2, image.height // 2))  # type: ignore[return-value]


def reason(source: str | Path | bytes) -> str:
    with pytest.raises(BadImage) as bad:
        load_rgb(source)
    return bad.value.reason


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_goes_over_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (*RED, 0)).convert(mode)
    assert middle(saved(clear, "TIFF" if mode == "PA" else "PNG")) == (255, 255, 255)


def test_half_transparency_is_blended() -> None:
    assert middle(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)))) == (127, 127, 127)


def test_transparent_palette_colour() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    assert middle(saved(image)) == RED
    assert middle(saved(image, transparency=1)) == (255, 255, 255)


def test_cmyk_grey_and_one_bit() -> None:
    cmyk = Image.new("RGB", (16, 16), RED).convert("CMYK")
    assert np.abs(np.subtract(middle(saved(cmyk, "JPEG", quality=95)), RED)).max() < 6
    assert middle(saved(Image.new("L", (8, 8), 99))) == (99, 99, 99)
    assert middle(saved(Image.new("1", (8, 8), 1))) == (255, 255, 255)


def test_sixteen_bits_and_floats_keep_their_brightness() -> None:
    deep = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    assert middle(saved(deep)) == (128, 128, 128)
    assert middle(saved(deep, "TIFF")) == (128, 128, 128)
    unit = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    assert middle(saved(unit, "TIFF")) == (128, 128, 128)
    bytes_in_floats = Image.fromarray(np.full((8, 8), 200.0, np.float32))
    assert middle(saved(bytes_in_floats, "TIFF")) == (200, 200, 200)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "white")
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the left half comes to the top
    upright = load_rgb(saved(image, exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 3)) == RED
    assert upright.getpixel((5, 16)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_spoils_no_picture() -> None:
    data = saved(Image.new("RGB", (8, 8), RED), exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert middle(data) == RED


def test_unicode_file_names(tmp_path: Path) -> None:
    path = tmp_path / "Hündchen 狗.png"
    path.write_bytes(saved(Image.new("RGB", (4, 4), RED)))
    assert load_rgb(path).getpixel((0, 0)) == RED
    assert load_rgb(str(path)).size == (4, 4)


def test_what_is_no_picture_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(photo(200, 200), "JPEG")
    assert reason(whole[: len(whole) // 2]) == "truncated"
    assert reason(saved(photo(200, 200))[:3000]) == "truncated"
    assert reason(b"<html>not found</html>") == "not an image"
    assert reason(b"") == "empty file"
    assert reason(tmp_path / "nothing.jpg") == "missing"
    assert reason(tmp_path) == "unreadable"
    monkeypatch.setattr(images, "MAX_PIXELS", 200 * 200 - 1)
    assert reason(whole) == "decompression bomb"


def test_a_header_that_claims_far_too_much_is_a_bomb() -> None:
    header = saved(Image.new("1", (8, 8)), "PPM").replace(b"8 8", b"60000 60000")
    assert reason(header) == "decompression bomb"


def test_encode_keeps_small_jpegs_as_they_are() -> None:
    data = saved(photo(120, 80), "JPEG", quality=77)
    assert encode_image(data, 80) == data


def test_encode_resizes_the_short_side_and_never_enlarges(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    path.write_bytes(saved(photo(900, 600), "JPEG"))
    small = Image.open(io.BytesIO(encode_image(path, 64)))
    assert (small.format, small.size) == ("JPEG", (96, 64))
    same = Image.open(io.BytesIO(encode_image(saved(photo(30, 20)), 64)))
    assert (same.format, same.size) == ("JPEG", (30, 20))


def test_encode_stores_rotated_jpegs_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encode_image(saved(photo(40, 24), "JPEG", exif=exif), 64)
    stored = Image.open(io.BytesIO(data))
    assert stored.size == (24, 40)
    assert 0x0112 not in stored.getexif()


def test_decoding_at_a_lower_scale_stays_close_to_the_full_one() -> None:
    data = saved(photo(1024, 768), "JPEG", quality=95)
    full = load_rgb(data).resize((85, 64), Image.Resampling.BICUBIC)
    quick = load_rgb(encode_image(data, 64))
    assert quick.size == full.size
    difference = np.asarray(full).astype(int) - np.asarray(quick).astype(int)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_encode_leaves_long_comments_behind(kind: str) -> None:
    text = "x" * 70_000
    image = photo(40, 24)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text("comment", text)
        data = saved(image, kind, pnginfo=info)
    else:
        data = saved(image, kind, comment=text.encode())
    for side in (12, 64):  # resized and not
        stored = Image.open(io.BytesIO(encode_image(data, side)))
        assert (stored.format, stored.info.get("comment")) == ("JPEG", None)


def test_what_no_jpeg_can_hold_is_a_bad_picture() -> None:
    with pytest.raises(BadImage, match="no JPEG can hold it"):
        encode_image(saved(Image.new("RGB", (70_000, 2))), 64)


def test_encode_passes_bad_pictures_on(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="missing"):
        encode_image(tmp_path / "nothing.jpg", 64)
    with pytest.raises(BadImage, match="not an image"):
        encode_image(b"GIF?", 64)
