"""The options of the six commands: types, names and help. What they do stands in ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def _option(help: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=help, **extra)


def _argument(help: str, **extra: Any) -> Any:
    return typer.Argument(help=help, show_default=False, **extra)


_DATA = "Prepared data set. [default: the last prepared]"
_CHECKPOINT = "A model.safetensors. [default: the last trained or evaluated]"

# every command
AsJson = Annotated[bool, _option("Print one JSON document instead of tables.", "--json")]
DataPath = Annotated[Path | None, _option(_DATA, "--data")]
CheckpointArgument = Annotated[Path | None, _argument(_CHECKPOINT)]
EncodeBatch = Annotated[int, _option("Pictures encoded at a time.", min=1)]

# prepare
Source = Annotated[str, _argument("scenes (built in), flickr30k, flickr8k, coco or folder.")]
RawFolder = Annotated[Path, _argument("Where the raw files are, or DIR/SOURCE.", metavar="DIR")]
PreparedFolder = Annotated[
    Path | None, _option("Where to write. [default: DIR/SOURCE, of a folder DIR/prepared]")
]
ImageSide = Annotated[int, _option("Short side of the stored pictures, in pixels.", min=1)]
MaxBad = Annotated[float, _option("Share of pictures that may be left out.", min=0, max=1)]
Workers = Annotated[int | None, _option("Threads. [default: one a core]", min=1)]
DataSeed = Annotated[int, _option("Seed of scenes, and of a split that has to be made.")]
SplitScheme = Annotated[str | None, _option("A known split other than the source's default.")]
HubName = Annotated[str | None, _option("Fetch this Hugging Face repository.", metavar="REPO")]
TrainSize = Annotated[int | None, _option("scenes: training pictures. [default: 12000]", min=1)]
ValSize = Annotated[int | None, _option("scenes: validation pictures. [default: 500]", min=1)]
TestSize = Annotated[int | None, _option("scenes: test pictures. [default: 500]", min=1)]

# pretrain and finetune: an option left out leaves the setting to the preset
Target = Annotated[
    Literal["byol", "pixel"] | None, _option("What masked patches must predict. [default: byol]")
]
Contrast = Annotated[
    Literal["softmax", "sigmoid"] | None, _option("clip: which loss. [default: softmax]", "--loss")
]
Variant = Annotated[
    Literal["paper", "seed"] | None,
    _option("mamo: as published, or VicVLM's first baseline. [default: paper]", "--variant"),
]
Teacher = Annotated[str | None, _option("s_smke: any timm model by name or folder, to learn from.")]
TeacherWeights = Annotated[
    str | None,
    _option("s_smke: the teacher's, a local file or 'hub'. [default: the folder's, or hub]"),
]
Objective = Annotated[str | None, _option("The method. [default: vicvlm]")]
Preset = Annotated[str | None, _option("Named settings. [default: by the data set]")]
ConfigFile = Annotated[Path | None, _option("TOML file of settings, laid over the preset.")]
ImageEncoder = Annotated[str | None, _option("Any timm ViT by name.")]
ImageWeights = Annotated[str | None, _option("Its weights: a local file, or 'hub'.")]
TextEncoder = Annotated[
    str | None, _option("Any transformers BERT by name or folder. [default: from scratch]")
]
Epochs = Annotated[float | None, _option("Passes over the training split.")]
MaxMinutes = Annotated[
    float | None, _option("End the schedule at this wall time, if not its epochs.")
]
PairBatch = Annotated[int | None, _option("Image-text pairs a process and step.")]
ContrastBatch = Annotated[
    int | None,
    _option("Pairs that ITC is over, a multiple of the batch size. [default: one batch]"),
]
LearningRate = Annotated[float | None, _option("Peak learning rate.")]
Cache = Annotated[
    bool | None,
    _option("Decode the pictures once, into a file beside the data set.", "--cache/--no-cache"),
]
Seed = Annotated[int | None, _option("Seed of everything random.")]
Precision = Annotated[
    Literal["auto", "no", "bf16", "fp16"] | None, _option("Mixed precision. [default: auto]")
]
Settings = Annotated[
    list[str] | None,
    _option("Any setting, as pretrain.grad_clip=0.5; repeatable.", "--set", metavar="KEY=VALUE"),
]
RunFolder = Annotated[Path | None, _option("Folder of the run. [default: a new one in runs/]")]
Resume = Annotated[Path | None, _option("Go on with an interrupted run.", metavar="RUN_DIR")]
Track = Annotated[
    Literal["none", "tensorboard", "wandb"], _option("Where metrics go besides metrics.jsonl.")
]
Profile = Annotated[
    Path | None,
    _option("Trace 5 steps into this folder or .json[.gz] file.", "--profile", metavar="PATH"),
]

# evaluate, embed, retrieve
SplitName = Annotated[str, _option("Which split.", "--split")]
SplitOrAll = Annotated[
    str | None, _option("Which split of a prepared data set. [default: all]", "--split")
]
Candidates = Annotated[
    int, _option("Candidates a query that are scored pair by pair; 0: none.", "--top-k", min=0)
]
ImageScale = Annotated[
    float | None,
    _option(
        "Side of the pictures, in that of training. [default: the checkpoint's]", "--image-scale"
    ),
]
Views = Annotated[
    int | None,
    _option(
        "Views of each picture, whose mean is its feature: 1, 2 with its mirror image, 3 with its "
        "centre, 7 with its corners. [default: the checkpoint's]",
        "--views",
    ),
]
AllPairs = Annotated[bool, _option("Score every pair; what it costs is said first.", "--all-pairs")]
Pictures = Annotated[
    Path | None,
    _argument("Folder of pictures or prepared data set. [default: the last prepared]"),
]
CheckpointPath = Annotated[Path | None, _option(_CHECKPOINT, "--checkpoint")]
GalleryFolder = Annotated[
    Path | None,
    _option(
        "Folder of the gallery; what has not changed is kept. [default: gallery/ beside the "
        "checkpoint]"
    ),
]
Query = Annotated[str | None, _argument("What to look for, in words.")]
QueryImage = Annotated[Path | None, _option("Look for pictures like this one instead.")]
GalleryPath = Annotated[Path | None, _option("Gallery. [default: the last embedded]")]
OwnCheckpoint = Annotated[
    Path | None, _option("A model.safetensors. [default: the one that made the gallery]")
]
Hits = Annotated[int, _option("How many pictures.", "--top-k", min=1)]
Rerank = Annotated[
    bool | None,
    _option(
        "Let ITM, or the pair score of scan and vilt, order the best pictures. [default: where its "
        "weight in the checkpoint is above 0]",
        "--rerank/--no-rerank",
    ),
]
Sheet = Annotated[Path | None, _option("Draw the result into this picture file.")]
