"""Writing a prepared data set, shard by shard, so that an interrupted run continues.

A shard and its list of rejected items appear whole; what was in memory is made again. Shards of
another fingerprint are left alone until the new manifest is in place.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicvlm_cli.data.prepared import MANIFEST, REJECTED, Manifest, split_hash
from vicvlm_cli.data.sources.listing import SPLITS, Item, Rejected, escaped

SHARD_IMAGES = 1000
SHARD_BYTES = 64 << 20
_OURS = re.compile(
    r"(?P<split>\w+)-[0-9a-f]{8}-(\d{5}\.(arrow|json)|[0-9a-f]{8}-\d+\.npy)(\.[\w.-]+\.tmp)?"
)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it appears whole or not at all.

    A lone surrogate is written as its escape, which JSON reads back.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)  # a part, for which there was no room


@dataclass
class _OpenShard:
    rows: list[tuple[Item, bytes]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    size: int = 0


class ShardWriter:
    """Collects encoded items into shards below `path`, beginning after the finished ones.

    `done` holds the image_id of every item that an earlier run has settled (stored or rejected),
    `lost` the reason of every picture that is left out, by its image_id.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.done: set[str] = set()
        self.rejected: dict[Rejected, None] = {}  # a set that keeps the order
        self.lost: dict[str, str] = {}
        self._images = dict.fromkeys(SPLITS, 0)
        self._open = {split: _OpenShard() for split in SPLITS}
        self._finished: dict[str, list[str]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            while (shard := self._shard(split)).is_file():
                if not self._take_over(split, shard):
                    break

    def add(self, item: Item, data: bytes) -> None:
        """Store an encoded picture; writes a shard when it is full."""
        shard = self._open[item.split]
        shard.rows.append((item, data))
        shard.size += len(data)
        self._images[item.split] += 1
        if len(shard.rows) >= SHARD_IMAGES or shard.size >= SHARD_BYTES:
            self._flush(item.split)

    def reject(self, rejected: Rejected, settled: bool = True) -> None:
        """Note what is left out (once, though an earlier run may have noted it too).

        Not `settled` is an item of which only a caption or a second split is left out: it may still
        be stored, so no later run may take it for done.
        """
        if rejected in self.rejected:
            return
        self._note(rejected)
        if settled and rejected.split in self._open:
            self._open[rejected.split].rejected.append(rejected)

    def _note(self, rejected: Rejected) -> None:
        self.rejected[rejected] = None
        if not rejected.of_caption:
            self.lost[rejected.image_id] = rejected.reason

    def write_rejected(self) -> Path:
        """List what is left out of a data set that is not finished, and tell where.

        The list of one that is there stays as it is.
        """
        there = os.path.exists(self.path / MANIFEST)
        file = self.path / (f"rejected-{self.fingerprint[:8]}.jsonl" if there else REJECTED)
        self._list_rejected(file)
        return file

    def _list_rejected(self, file: Path) -> None:
        lines = [json.dumps(vars(item), ensure_ascii=False) + "\n" for item in self.rejected]
        write_whole(file, "".join(lines))

    def counts(self) -> dict[str, int]:
        """The images of each split so far."""
        return {split: number for split, number in self._images.items() if number}

    def finish(self, **facts: Any) -> Manifest:
        """Write what is left and the manifest (with `facts` in it), then drop other shards."""
        for split in SPLITS:
            if self._open[split].rows:
                self._flush(split)
        shards = {split: files for split, files in self._finished.items() if files}
        images, captions, hashes, sizes = {}, {}, {}, {}
        for split, files in shards.items():
            rows = [row for file in files for row in _read_captions(self.path / file)]
            images[split] = len(rows)
            captions[split] = sum(len(said) for _, said in rows)
            hashes[split] = split_hash(rows)
            sizes[split] = sum((self.path / file).stat().st_size for file in files)
        manifest = Manifest(
            images=images,
            captions=captions,
            split_hash=hashes,
            size_bytes=sizes,
            shards=shards,
            rejected=dict(Counter(self.lost.values())),
            fingerprint=self.fingerprint,
            **facts,
        )
        self._list_rejected(self.path / REJECTED)
        write_whole(self.path / MANIFEST, manifest.to_json())
        self._clear({file for files in shards.values() for file in files})
        return manifest

    def _shard(self, split: str) -> Path:
        number = len(self._finished[split])
        return self.path / split / f"{split}-{self.fingerprint[:8]}-{number:05d}.arrow"

    def _take_over(self, split: str, shard: Path) -> bool:
        """Count a shard of an earlier run as done; False if it is damaged."""
        try:
            stored = [image_id for image_id, _ in _read_captions(shard)]
            sidecar = json.loads(shard.with_suffix(".json").read_text(encoding="utf-8"))
            rejected = [Rejected(**entry) for entry in sidecar]
        except (OSError, ValueError, TypeError, KeyError):  # pyarrow's errors are among these
            return False
        self._images[split] += len(stored)
        self.done.update(stored)
        self.done.update(item.image_id for item in rejected)
        for item in rejected:
            self._note(item)
        self._finished[split].append(f"{split}/{shard.name}")
        return True

    def _flush(self, split: str) -> None:
        from datasets import Features, Image, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        features = Features(
            image_id=Value("string"),
            split=Value("string"),
            image=Image(),
            captions=Sequence(Value("string")),
            path=Value("string"),
        )
        content, target = self._open[split], self._shard(split)
        target.parent.mkdir(parents=True, exist_ok=True)
        sidecar = json.dumps([vars(item) for item in content.rejected], ensure_ascii=False)
        write_whole(target.with_suffix(".json"), sidecar)  # first: a shard is done with its list
        beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        with ArrowWriter(path=str(beside), features=features) as writer:
            for item, data in content.rows:
                path = escaped(item.path)
                writer.write(
                    {
                        "image_id": item.image_id,
                        "split": item.split,
                        "image": {"bytes": data, "path": Path(path).name},
                        "captions": list(item.captions),
                        "path": path,
                    }
                )
            writer.finalize()
        os.replace(beside, target)
        self._finished[split].append(f"{split}/{target.name}")
        self._open[split] = _OpenShard()

    def _clear(self, keep: set[str]) -> None:
        """Remove sidecars, leftovers, decoded pictures and old shards; nothing but our own."""
        for file in self.path.glob(f"rejected-{'[0-9a-f]' * 8}.jsonl"):
            file.unlink()
        for split in SPLITS:
            for file in (self.path / split).glob(f"{split}-*"):
                ours = _OURS.fullmatch(file.name)
                if ours and ours["split"] == split and f"{split}/{file.name}" not in keep:
                    file.unlink()


def _read_captions(shard: Path) -> list[tuple[str, list[str]]]:
    import datasets

    table = datasets.Dataset.from_file(str(shard)).data
    return list(
        zip(table.column("image_id").to_pylist(), table.column("captions").to_pylist(), strict=True)
    )
