from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_training import WEIGHTS
from typer.testing import CliRunner

from vicvlm_cli import __version__, cli, remembered
from vicvlm_cli.workflows import evaluate as evaluate_workflow

pytestmark = pytest.mark.usefixtures("forgetful")
COMMANDS = ("prepare", "pretrain", "finetune", "evaluate", "embed", "retrieve")
# A model and a training as small as they get: what is tested is the way, not what is learned.
SMALL = [
    "model.image_options.embed_dim=32",
    "model.image_options.num_heads=2",
    "model.image_options.depth=1",
    "model.image_options.patch_size=16",
    "model.text_width=32",
    "model.text_layers=1",
    "model.fusion_layers=1",
    "pretrain.validate_every=0",
    "finetune.validate_every=0",
    "data.workers=0",
    *(f"pretrain.losses.{name}.weight={weight}" for name, weight in WEIGHTS.items()),
    "finetune.losses.itm.weight=1",
]


def run(*args, **environment):
    return CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="vicvlm", env=environment)


def python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder where all six commands have run, each on what the last left; what they said."""
    folder = tmp_path_factory.mktemp("home")
    state = str(folder / "state.json")
    settings = [word for setting in SMALL for word in ("--set", setting)]
    lines = [
        ["prepare", "scenes", folder, "--train", 48, "--val", 12, "--test", 24],
        ["pretrain", "--target", "byol", "--epochs", 4, "--batch-size", 16, *settings],
        ["finetune", "--epochs", 1, "--batch-size", 16],
        ["evaluate", "--top-k", 8],
        ["embed", "--split", "test"],
        ["retrieve", "a red circle", "--rerank", "--sheet", folder / "found.png", "--top-k", 3],
    ]
    before = os.getcwd()
    os.chdir(folder)
    said = {str(line[0]): run(*line, VICVLM_STATE=state) for line in lines}
    os.chdir(before)
    return SimpleNamespace(
        path=folder,
        state=state,
        said=said,
        data=folder / "scenes",
        checkpoint=folder / "runs" / "finetune-scenes" / "model.safetensors",
        gallery=folder / "runs" / "finetune-scenes" / "gallery",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_all_six_commands_work_from_their_defaults(home, command):
    said = home.said[command]
    assert said.exit_code == 0, said.output
    assert "Traceback" not in said.stderr
    assert "\x1b" not in said.output  # no colours and no bars: this is not a terminal


def test_every_default_taken_is_said(home):
    stderr = {command: said.stderr for command, said in home.said.items()}
    data = f"data: {home.data} (last prepared; --data to change)"
    pretrained = home.path / "runs" / "pretrain-scenes" / "model.safetensors"
    last = "(last trained or evaluated; CHECKPOINT to change)"
    assert data in stderr["pretrain"] and "--preset to change" in stderr["pretrain"]
    assert data in stderr["finetune"] and f"checkpoint: {pretrained} {last}" in stderr["finetune"]
    assert data in stderr["evaluate"] and f"{home.checkpoint} {last}" in stderr["evaluate"]
    assert "(last prepared; SOURCE to change)" in stderr["embed"]
    assert f"gallery: {home.gallery} (last embedded; --gallery to change)" in stderr["retrieve"]


def test_results_are_tables(home):
    for loss in ("itc", "itm", "mlm", "mim", "joint_mim", "variance", "covariance", "invariance"):
        assert f"│ {loss} " in home.said["pretrain"].stdout
    assert "trivial" in home.said["pretrain"].stdout
    evaluated = home.said["evaluate"].stdout
    assert evaluated.count("image retrieval (text to image)") == 3  # alone, banked, re-ranked
    assert "24 images, 120 captions" in evaluated and "seed0" in evaluated
    assert home.said["retrieve"].stdout.count("scenes/test-") == 3
    with Image.open(home.path / "found.png") as sheet:
        assert sheet.width > 300


@pytest.mark.parametrize(
    "line, keys",
    [
        (
            ["prepare", "scenes", "{path}", "--train=48", "--val=12", "--test=24"],
            ["path", "images"],
        ),
        (["evaluate", "{checkpoint}", "--data={data}", "--top-k=0"], ["dual", "data"]),
        (["embed", "{data}", "--checkpoint={checkpoint}", "--output=new"], ["gallery", "count"]),
        (["retrieve", "a ring", "--gallery={gallery}", "--top-k=2"], ["query", "hits"]),
    ],
)
def test_json_is_all_there_is_on_stdout(home, line, keys):
    said = run(*(word.format(**vars(home)) for word in line), "--json")
    assert said.exit_code == 0, said.output
    document = json.loads(said.stdout)
    assert set(keys) <= set(document)


def test_what_a_library_prints_stays_out_of_the_json(monkeypatch):
    def noisy(*args, progress, **options):
        print("hello from a library")
        return SimpleNamespace(to_dict=lambda: {"fine": True})

    monkeypatch.setattr(evaluate_workflow, "evaluate", noisy)
    said = run("evaluate", "model.safetensors", "--data", "data", "--json")
    assert json.loads(said.stdout) == {"fine": True}
    assert "hello from a library" in said.stderr


def test_training_can_be_told_in_options_or_settings_and_options_win(home):
    said = run(
        *("pretrain", "--data", home.data, "--target", "pixel", "--max-minutes", 0, "--lr", 1e-5),
        *(word for setting in SMALL for word in ("--set", setting)),
        *(
            "--set",
            "pretrain.lr=7",
            "--set",
            "pretrain.epochs=1",
            "--set",
            "pretrain.batch_size=24",
        ),
        *("--output", "run", "--json"),
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["steps"] == 2  # 48 pictures by 24
    with open("run/metrics.jsonl", encoding="utf-8") as file:
        rates = [row["lr"] for row in map(json.loads, file) if row["kind"] == "train"]
    assert max(rates) <= 1e-5
    assert remembered.last("checkpoint").parent.name == "run"


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_contrast_over_several_batches_is_an_option(home, command):
    first = [home.checkpoint] if command == "finetune" else []
    line = [command, *first, "--data", home.data, "--batch-size", 8, "--contrastive-batch"]
    small = [word for setting in SMALL for word in ("--set", setting)] if not first else []
    said = run(*line, 20, *small, "--output", "run")
    assert said.exit_code == 2 and "--contrastive-batch is 20, not a multiple" in said.stderr
    assert "Traceback" not in said.stderr
    said = run(*line, 24, "--epochs", 1, *small, "--output", "run", "--json")
    assert said.exit_code == 0, said.output
    result = json.loads(said.stdout)
    assert result["pairs"] == 24 * result["steps"]


def test_retrieve_makes_the_first_gallery_itself(home):
    remembered.remember("data", home.data)
    said = run("evaluate", home.checkpoint, "--top-k", 0)  # makes it the last checkpoint
    assert said.exit_code == 0, said.output
    said = run("retrieve", "a dog on a beach", "--top-k", 1)
    assert said.exit_code == 0, said.output
    assert "gallery: there is none yet, so one is made first" in said.stderr
    assert remembered.last("gallery") == home.gallery


NOTHING = "there is no prepared data set yet: give --data, or make one with `vicvlm prepare"


@pytest.mark.parametrize(
    "line, code, text",
    [
        ("prepare", 2, "Missing argument"),
        ("prepare paintings .", 2, "there is no source 'paintings'; choose from scenes"),
        ("prepare scenes . --max-bad 2", 2, "--max-bad"),
        ("prepare scenes . --image-side 0", 2, "--image-side"),
        ("prepare flickr30k .", 1, "flickr30k"),
        ("prepare folder .", 1, "caption"),
        ("pretrain", 2, NOTHING),
        ("pretrain --data nowhere", 1, "nowhere is not a prepared data set"),
        ("pretrain --data {data} --target jepa", 2, "'byol', 'pixel'"),
        ("pretrain --data {data} --preset vicvlm-tinny", 2, "did you mean 'vicvlm-tiny'?"),
        ("pretrain --data {data} --config none.toml", 2, "cannot read the configuration none.toml"),
        ("pretrain --data {data} --set lr", 2, "is not KEY=VALUE"),
        ("pretrain --data {data} --set pretrain.lrr=1", 2, "did you mean 'lr'?"),
        ("pretrain --data {data} --epochs 0", 2, "pretrain.epochs is 0"),
        ("pretrain --data {data} --objective magic", 2, "magic"),
        ("pretrain --data {data} --image-encoder vit_none", 1, "vit_none"),
        ("pretrain --data {data} --image-weights none.pth", 1, "none.pth"),
        ("pretrain --data {data} --resume nowhere", 1, "nowhere cannot be resumed"),
        ("pretrain --data {data} --track paper", 2, "'tensorboard'"),
        ("pretrain --data {data} --profile none/a.json", 1, "there is no folder none; make it"),
        ("finetune {checkpoint} --data {data} --profile none", 1, "there is no folder none; make"),
        ("finetune --data {data}", 2, "there is no checkpoint yet: give CHECKPOINT"),
        ("finetune {data}/manifest.json --data {data}", 1, "not a safetensors file"),
        ("finetune {checkpoint} --data {data} --resume run", 2, "leave out CHECKPOINT"),
        ("finetune {checkpoint} --data {data} --set model.fusion_layers=2", 2, "cannot be changed"),
        ("evaluate", 2, "there is no checkpoint yet"),
        (
            "evaluate none.safetensors --data {data}",
            1,
            "there is no checkpoint at none.safetensors",
        ),
        ("evaluate {checkpoint}", 2, NOTHING),
        ("evaluate {checkpoint} --data {data} --split dev", 1, "it has train, val, test"),
        ("evaluate {checkpoint} --data {data} --top-k -1", 2, "--top-k"),
        ("embed --checkpoint {checkpoint}", 2, "there is no prepared data set yet: give SOURCE"),
        ("embed nowhere --checkpoint {checkpoint}", 1, "there is no folder nowhere"),
        ("embed . --checkpoint {checkpoint}", 1, "hold no pictures"),
        ("embed {data} --checkpoint {checkpoint} --output {data}", 1, "is not a gallery"),
        ("retrieve", 2, "give either words"),
        ("retrieve dog --image dog.jpg", 2, "give either words"),
        ("retrieve dog", 2, NOTHING.replace("--data", "SOURCE")),
        ("retrieve dog --gallery {data}", 1, "is not a gallery"),
        ("retrieve dog --gallery {gallery} --top-k 0", 2, "--top-k"),
        ("retrieve --image none.jpg --gallery {gallery}", 1, "none.jpg"),
        ("retrieve dog --gallery {gallery} --checkpoint {other}", 1, "made by another model"),
        ("retrieve dog --gallery {gallery} --sheet found.doc", 2, "found.doc"),
        ("conquer", 2, "No such command 'conquer'"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(home, line, code, text):
    places = vars(home) | {"other": home.path / "runs" / "pretrain-scenes" / "model.safetensors"}
    said = run(*line.format(**places).split())
    assert (said.exit_code, said.stdout) == (code, ""), said.output
    assert text in said.stderr
    assert len([line for line in said.stderr.splitlines() if "rror: " in line]) == 1


def test_what_was_remembered_and_is_gone_is_named(tmp_path):
    remembered.remember("data", tmp_path / "old")
    said = run("pretrain")
    assert said.exit_code == 1
    assert f"{tmp_path / 'old'}, is no longer there: give --data" in said.stderr


def test_version_and_help_as_a_module():
    shown = python("-m", "vicvlm_cli", "--version")
    assert (shown.returncode, shown.stdout) == (0, f"vicvlm {__version__}\n")
    shown = python("-m", "vicvlm_cli", "conquer")
    assert shown.returncode == 2 and "Usage: vicvlm" in shown.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    code = (
        "import sys\nfrom vicvlm_cli.cli import app\n"
        f"app([{command!r}, '--help'], 'vicvlm', standalone_mode=False)\n"
        "print(sorted({'torch', 'timm', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    shown = python("-c", code).stdout
    assert f"Usage: vicvlm {command}" in shown
    assert shown.endswith("[]\n")
