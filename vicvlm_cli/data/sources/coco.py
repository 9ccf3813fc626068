"""COCO captions (Lin et al., 2014; Chen et al., 2015), by default in the Karpathy split.

Karpathy's `restval` (the part of val2014 that he left over) belongs to train: 113,287 images.
"""

from __future__ import annotations

import re

from vicvlm_cli.data.sources.captions import read_coco, read_image_list, read_karpathy
from vicvlm_cli.data.sources.files import base
from vicvlm_cli.data.sources.published import CaptionFiles, PublishedData


def image_number(name: str) -> str:
    """COCO's own number: COCO_val2014_000000391895.jpg and 000000391895.jpg are one picture."""
    found = re.search(r"(\d{12})\.jpe?g$", base(name), re.IGNORECASE)
    return found[1] if found else base(name)


COCO = PublishedData(
    name="coco",
    folders=(
        *("train2014", "val2014", "test2014", "train2017", "val2017"),
        *("coco2014", "coco2017", "mscoco", "images", "annotations"),
    ),
    hints=(
        "coco",
        "train2014",
        "val2014",
        "train2017",
        "val2017",
        "annotations",
        "caption",
        "images",
    ),
    captions=(
        CaptionFiles(r"dataset_coco.*\.json(\.gz)?", read_karpathy, "karpathy"),
        CaptionFiles(
            r"coco(_karpathy)?_(train|val|test)\.json", read_image_list, "karpathy", parts=True
        ),
        CaptionFiles(r"captions_(train|val)2014\.json(\.gz)?", read_coco, "2014", parts=True),
        CaptionFiles(r"captions_(train|val)2017\.json(\.gz)?", read_coco, "2017", parts=True),
    ),
    counts={
        "karpathy": {"train": 113_287, "val": 5_000, "test": 5_000},
        "2014": {"train": 82_783, "val": 40_504},
        "2017": {"train": 118_287, "val": 5_000},
    },
    key=image_number,
    get=(
        "get train2014.zip and val2014.zip from https://cocodataset.org/#download and "
        "caption_datasets.zip from Andrej Karpathy "
        "(https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)."
    ),
)
