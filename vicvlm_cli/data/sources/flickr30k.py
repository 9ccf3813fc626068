"""Flickr30k (Young et al., 2014): 31,014 of its photographs in the Karpathy split."""

from __future__ import annotations

from vicvlm_cli.data.sources.caption_tables import read_table
from vicvlm_cli.data.sources.captions import read_image_list, read_karpathy, read_token
from vicvlm_cli.data.sources.published import CaptionFiles, PublishedData, SplitLists

FLICKR30K = PublishedData(
    name="flickr30k",
    folders=("flickr30k-images", "flickr30k_images", "flickr30k_entities", "images", "annotations"),
    hints=("flickr30k", "flickr_30k", "flickr-30k", "caption", "images", "archive"),
    captions=(
        CaptionFiles(r"dataset_flickr30k.*\.json(\.gz)?", read_karpathy, "karpathy"),
        CaptionFiles(r"flickr30k_(train|val|test)\.json", read_image_list, "karpathy", parts=True),
        CaptionFiles(r"results(_\d+)?\.token(\.gz)?", read_token),
        CaptionFiles(r"(results|captions)\.(csv|txt|tsv)", read_table),
    ),
    counts={
        "karpathy": {"train": 29_000, "val": 1_014, "test": 1_000},
        "entities": {"train": 29_783, "val": 1_000, "test": 1_000},
    },
    split_lists=SplitLists(r"(train|val|test)\.txt", "entities"),
    get=(
        "get flickr30k-images.tar.gz from the University of Illinois "
        "(https://shannon.cs.illinois.edu/DenotationGraph/, a form to fill in) and "
        "caption_datasets.zip from Andrej Karpathy "
        "(https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)."
    ),
)
