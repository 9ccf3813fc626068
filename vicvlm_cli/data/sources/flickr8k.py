"""Flickr8k (Hodosh et al., 2013): 8,000 photographs; Karpathy's split is the official one."""

from __future__ import annotations

from vicvlm_cli.data.sources.caption_tables import read_table
from vicvlm_cli.data.sources.captions import read_karpathy, read_token
from vicvlm_cli.data.sources.published import CaptionFiles, PublishedData, SplitLists

FLICKR8K = PublishedData(
    name="flickr8k",
    folders=("Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_text", "images"),
    hints=("flickr8k", "flicker8k", "flickr_8k", "flickr-8k", "caption", "images", "archive"),
    captions=(
        CaptionFiles(r"dataset_flickr8k.*\.json(\.gz)?", read_karpathy, "karpathy"),
        CaptionFiles(r"flickr8k\.token\.txt(\.gz)?", read_token),
        CaptionFiles(r"(results|captions)\.(csv|txt|tsv)", read_table),
    ),
    counts={
        "karpathy": {"train": 6_000, "val": 1_000, "test": 1_000},
        "official": {"train": 6_000, "val": 1_000, "test": 1_000},
    },
    split_lists=SplitLists(r"flickr_?8k\.(train|dev|test)images\.txt", "official"),
    get=(
        "get Flickr8k_Dataset.zip and Flickr8k_text.zip from Jason Brownlee's copy "
        "(https://github.com/jbrownlee/Datasets/releases) or archive.zip from Kaggle "
        "(adityajn105/flickr8k), and caption_datasets.zip from Andrej Karpathy "
        "(https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip)."
    ),
)
