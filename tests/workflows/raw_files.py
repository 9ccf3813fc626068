"""Raw files to prepare, and runs of it that are stopped."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows import prepare as workflow
from vicvlm_cli.workflows.prepare import PrepareResult, prepare

QUIET = Progress(quiet=True)


def jpeg(shade: int, size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def flickr8k(folder: Path, number: int = 20, broken: dict[int, bytes | None] | None = None) -> Path:
    """A tar.gz of `number` pictures, the last two for val, and a Karpathy JSON."""
    folder.mkdir(exist_ok=True)
    images = []
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        for i in reversed(range(number)):  # not in the order of the captions
            data = (broken or {}).get(i, jpeg(10 * i))
            if data is not None:
                info = tarfile.TarInfo(f"images/{i}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for i in range(number):
        split = "val" if i >= number - 2 else "train"
        sentences = [{"raw": f"picture {i}, {k}"} for k in range(5)]
        images.append({"filename": f"{i}.jpg", "split": split, "sentences": sentences})
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    return folder


def run(folder: Path, **options: object) -> PrepareResult:
    source = options.pop("source", "flickr8k")
    return prepare(source, folder, image_side=32, progress=QUIET, **options)  # type: ignore[arg-type]


def stop_after(pictures: int, calls: list[object], patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many pictures are encoded; ``calls`` are those that were begun."""
    real = workflow.encode_image

    def encode(source: object, side: int) -> bytes:
        calls.append(source)
        if len(calls) > pictures:
            raise KeyboardInterrupt
        return real(source, side)  # type: ignore[arg-type]

    patch.setattr(workflow, "encode_image", encode)
