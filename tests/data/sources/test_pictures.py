"""Pictures stream out of folders and archives; nothing leaves its folder."""

from __future__ import annotations

import io
import random
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.sources import pictures
from vicvlm_cli.data.sources.listing import Item, draw
from vicvlm_cli.data.sources.pictures import has_pictures, stream_pictures

NOISE = random.Random(0).randbytes(200_000)


def wanted(*names: str) -> dict[str, Item]:
    return {name: Item(name, "train", ("x",)) for name in names}


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def result(files: list[Path], items: dict[str, Item]) -> dict[str, object]:
    warnings: list[str] = []
    found: dict[str, object] = {}
    for item, picture in stream_pictures(files, items, warnings):
        try:
            found[item.image_id] = draw(picture)
        except BadImage as bad:
            found[item.image_id] = bad.reason
    if warnings:
        found["warnings"] = warnings
    return found


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"])
def test_every_kind_of_archive(tmp_path: Path, ending: str) -> None:
    content = [("images/b.jpg", b"bee"), ("images/readme", b"-"), ("images/a.jpg", b"ay")]
    path = tmp_path / f"images.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content:
                archive.writestr(name, data)
    else:
        mode = {"tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(ending, "w:gz")
        tar(path, content, mode)
    stream = list(stream_pictures([path], wanted("a.jpg", "b.jpg", "c.jpg"), []))
    assert [(item.image_id, picture) for item, picture in stream] == [
        ("b.jpg", b"bee"),
        ("a.jpg", b"ay"),
    ]
    assert stream[0][0].path == f"images.{ending}!images/b.jpg"


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "zip"])
def test_an_archive_of_captions_alone_has_no_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    path = tmp_path / f"captions.{ending}"

    def holds(*names: str) -> bool:
        if ending == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.writestr(name, b"x")
        else:
            tar(path, [(name, b"x") for name in names], "w:gz" if ending == "tar.gz" else "w")
        return has_pictures([path])

    assert not holds("dataset.json", "__MACOSX/._a.jpg")
    assert holds("dataset.json", "images/a.JPG")
    path.write_bytes(b"<html>404</html>")  # which its reader tells
    assert has_pictures([path])
    monkeypatch.setattr("vicvlm_cli.data.sources.files.MAX_READ_THROUGH", 10)
    assert holds("dataset.json") == (ending == "tar.gz")


def test_loose_files_come_before_archives_and_each_picture_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"loose")
    gz = tar(tmp_path / "1.tar.gz", [("c.jpg", b"gz"), ("b.jpg", b"gz")], "w:gz")
    plain = tar(tmp_path / "2.tar", [("a.jpg", b"tar"), ("b.jpg", b"tar")])
    found = result([gz, plain, tmp_path / "a.jpg"], wanted("a.jpg", "b.jpg", "c.jpg"))
    assert found == {"a.jpg": (tmp_path / "a.jpg"), "b.jpg": b"tar", "c.jpg": b"gz"}


def test_reading_ends_with_the_last_wanted_picture(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", [("a.jpg", b"a"), ("b.jpg", NOISE)], "w:gz")
    path.write_bytes(path.read_bytes()[:-9000])
    assert result([path], wanted("a.jpg")) == {"a.jpg": b"a"}  # the damage is never reached


def test_members_outside_the_folder_and_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    tar(
        path, [("../a.jpg", b"a"), ("/etc/passwd", b"p"), ("ok/../../b.jpg", b"b"), ("d.jpg", b"d")]
    )
    with tarfile.open(path, "a") as archive:
        for name, kind in [("c.jpg", tarfile.SYMTYPE), ("e.jpg", tarfile.LNKTYPE)]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    found = result([path], wanted("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"))
    outside = "archive member outside the folder"
    assert found == {
        "a.jpg": outside,
        "/etc/passwd": outside,
        "b.jpg": outside,
        "d.jpg": b"d",
        "c.jpg": "link in an archive",
        "e.jpg": "link in an archive",
    }


def test_zip_links_and_escapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("..\\a.jpg", b"a")
        link = zipfile.ZipInfo("b.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("C:/c.jpg", b"c")
    found = result([path], wanted("a.jpg", "b.jpg", "c.jpg"))
    outside = "archive member outside the folder"
    assert found == {"a.jpg": outside, "b.jpg": "link in an archive", "c.jpg": outside}


def test_a_huge_member_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 1000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"\0" * 1001)
        archive.writestr("b.jpg", b"b")
    assert result([path], wanted("a.jpg", "b.jpg")) == {
        "a.jpg": "decompression bomb",
        "b.jpg": b"b",
    }


def test_an_archive_cut_short_keeps_what_came_before(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar.gz", [("a.jpg", b"a"), ("b.jpg", NOISE)], "w:gz")
    path.write_bytes(path.read_bytes()[:-9000])
    found = result([path], wanted("a.jpg", "b.jpg"))
    (warning,) = found.pop("warnings")  # type: ignore[misc]
    assert found == {"a.jpg": b"a"}
    assert "x.tar.gz is damaged or cut short" in warning and "fetch it again" in warning


def test_a_member_with_a_wrong_checksum_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"aaaaaaaa")
        archive.writestr("b.jpg", b"b")
    path.write_bytes(path.read_bytes().replace(b"aaaaaaaa", b"aaaaXaaa"))
    assert result([path], wanted("a.jpg", "b.jpg")) == {"a.jpg": "unreadable", "b.jpg": b"b"}


def test_what_is_called_an_archive_and_is_none(tmp_path: Path) -> None:
    for name in ("x.zip", "x.tar", "x.tar.gz"):
        (tmp_path / name).write_bytes(b"<html>404</html>")
        found = result([tmp_path / name], wanted("a.jpg"))
        assert "fetch it again" in found["warnings"][0]  # type: ignore[index]


def test_unicode_names_match_however_they_are_composed(tmp_path: Path) -> None:
    name = "Hündchen 狗.jpg"
    apart = unicodedata.normalize("NFD", name)
    assert result([tar(tmp_path / "x.tar", [(apart, b"u")])], wanted(name)) == {name: b"u"}
    unmarked = tmp_path / "x.zip"  # UTF-8 bytes without the flag that says so
    with zipfile.ZipFile(unmarked, "w") as archive:
        archive.writestr(name, b"u")
    data = bytearray(unmarked.read_bytes())
    data[7] &= ~0x08
    data[data.index(b"PK\x01\x02") + 9] &= ~0x08
    unmarked.write_bytes(bytes(data))
    assert result([unmarked], wanted(name)) == {name: b"u"}
