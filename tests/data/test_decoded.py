"""The file of decoded pictures: whole or not there, and never of other pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vicvlm_cli.data.decoded import DecodedFile, make_decoded
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.data.transforms import image_to_array
from vicvlm_cli.errors import UserError
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.prepare import prepare

QUIET = Progress(quiet=True)


def make_data(folder: Path, seed: int = 0) -> PreparedDataset:
    sizes = {"train": 5, "val": 2, "test": 2}
    return PreparedDataset.open(
        prepare(
            "scenes", folder, image_side=24, sizes=sizes, seed=seed, workers=1, progress=QUIET
        ).path
    )


def decoded_files(data: PreparedDataset) -> list[str]:
    return sorted(file.name for file in data.path.glob("*/*.npy*"))


def test_it_holds_the_decoded_pictures_and_is_made_once(tmp_path, monkeypatch):
    split = make_data(tmp_path).split("train")
    monkeypatch.setattr("vicvlm_cli.data.decoded.BLOCK", 2)
    file = make_decoded(split, 20, QUIET)
    wanted = np.stack([image_to_array(split.image(i), 20) for i in range(5)])
    assert np.array_equal(file.pixels, wanted)
    assert not file.pixels.flags.writeable
    written = file.path.stat().st_mtime_ns
    assert make_decoded(split, 20, QUIET).path.stat().st_mtime_ns == written
    assert make_decoded(split, 16, QUIET).pixels.shape == (5, 3, 16, 16)


def test_a_damaged_file_is_made_anew(tmp_path):
    split = make_data(tmp_path).split("train")
    file = make_decoded(split, 20, QUIET)
    wanted = np.array(file.pixels)
    for damage in (file.path.read_bytes()[:-1], b"", file.path.read_bytes()[:200]):
        file.path.write_bytes(damage)
        assert not DecodedFile(split, 20).is_whole()
        assert np.array_equal(make_decoded(split, 20, QUIET).pixels, wanted)


def test_other_pictures_have_another_file_and_drop_the_old(tmp_path):
    data = make_data(tmp_path)
    make_decoded(data.split("train"), 20, QUIET)
    make_decoded(data.split("val"), 20, QUIET)
    assert len(decoded_files(data)) == 2
    other = make_data(tmp_path, seed=1)
    assert decoded_files(other) == []
    assert not DecodedFile(other.split("train"), 20).is_whole()


def test_without_room_nothing_is_written(tmp_path, monkeypatch):
    data = make_data(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=5999)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"takes 0.0 GB and .*train has 0.0 GB left: make room"):
        make_decoded(data.split("train"), 20, QUIET)  # 6,000 bytes
    assert decoded_files(data) == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_begun_is_removed(tmp_path, monkeypatch, failure):
    data = make_data(tmp_path)
    decode = Split.image

    def image(self, i, at_least=None):
        if i == 3:
            raise failure
        return decode(self, i, at_least)

    monkeypatch.setattr(Split, "image", image)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as caught:
        make_decoded(data.split("train"), 20, QUIET)
    assert decoded_files(data) == []
    if expected is UserError:
        assert "No space left on device; make room there, or leave out --cache" in str(caught.value)
