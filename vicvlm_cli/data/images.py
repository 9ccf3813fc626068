"""Pictures in: any file Pillow reads becomes an RGB image, or a `BadImage` with a plain reason.

Pictures out: `encode_image` re-encodes once to the short side of the prepared data set.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485  # Pillow's own limit for a warning: a 256 MB RGB image
JPEG_QUALITY = 90
JPEG_SIDE = 65_500  # pixels that libjpeg takes at most
_EXIF_ORIENTATION = 0x0112

# Pillow warns above this limit and raises above twice of it; here both are refused by name.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged metadata of readable pictures


class BadImage(Exception):
    """A picture that cannot be used; `reason` is short and the same for every such picture."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return BadImage, (self.reason,)


ImageSource = str | Path | bytes | Image.Image


def load_rgb(source: ImageSource, at_least: int | None = None) -> Image.Image:
    """Decode a picture completely and return it upright, as 8-bit RGB.

    EXIF rotation is applied, transparency goes over white, CMYK, palette, grey and 16-bit are
    converted. `at_least` allows a JPEG to be decoded at a lower scale whose short side is still
    at least twice that many pixels (large photographs decode several times faster).

    Raises `BadImage`: missing, empty file, not an image, truncated, decompression bomb, unreadable.
    """
    if isinstance(source, Image.Image):
        return _decode(source, None)
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), len(source), at_least)
    path = Path(source)
    try:
        with path.open("rb") as file:
            return _open(file, path.stat().st_size, at_least)
    except FileNotFoundError:
        raise BadImage("missing") from None
    except OSError:  # a folder, no permission, a failing disk
        raise BadImage("unreadable") from None


def encode_image(source: ImageSource, side: int) -> bytes:
    """JPEG bytes with a short side of at most `side` pixels (never enlarged).

    The original bytes are kept where they are already an upright RGB JPEG of that size. A drawn
    image (a `PIL.Image.Image`) is stored at high quality without chroma subsampling.
    Raises `BadImage` as `load_rgb` does, and where JPEG cannot hold the picture.
    """
    if isinstance(source, (str, Path)):
        try:
            source = Path(source).read_bytes()
        except FileNotFoundError:
            raise BadImage("missing") from None
        except OSError:
            raise BadImage("unreadable") from None
    image = load_rgb(source, at_least=side)
    if isinstance(source, bytes) and min(image.size) <= side and _is_plain_jpeg(source):
        return source
    if min(image.size) > side:
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if max(image.size) > JPEG_SIDE:  # libjpeg would write to stderr too
        raise BadImage("no JPEG can hold it")
    drawn = isinstance(source, Image.Image)
    options = {"quality": 95, "subsampling": 0} if drawn else {"quality": JPEG_QUALITY}
    buffer = io.BytesIO()
    try:  # without what Pillow would take over from the file: it may be too long for a JPEG
        image.save(buffer, "JPEG", comment=b"", xmp=b"", **options)
    except Exception:  # as when decoding: one odd picture must not end the run
        raise BadImage("no JPEG can hold it") from None
    return buffer.getvalue()


def _open(file: IO[bytes], length: int, at_least: int | None) -> Image.Image:
    if length == 0:
        raise BadImage("empty file")
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except Image.DecompressionBombError:
        raise BadImage("decompression bomb") from None
    except Exception:  # plugins raise whatever hostile headers provoke
        raise BadImage("not an image") from None
    return _decode(image, at_least)


def _decode(image: Image.Image, at_least: int | None) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("decompression bomb")
    if min(image.size) == 0:
        raise BadImage("not an image")
    try:
        if at_least is not None and image.format == "JPEG":
            image.draft(None, (2 * at_least, 2 * at_least))  # only ever whole fractions, above that
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Image.DecompressionBombError:
        raise BadImage("decompression bomb") from None
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, struct.error, …
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        raise BadImage("truncated" if truncated else "unreadable") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _from_deep(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: integers span 16 bits; floats span 0 to 1, or 0 to 255."""
    values: np.ndarray = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        values = values * 255 if values.max(initial=0) <= 1 else values
    else:
        values = values / 257
    grey = np.nan_to_num(values).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _is_plain_jpeg(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block spoils no picture
        return 1
