"""One file, one loader: exact round trips, and a clear sentence for every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CAPTIONS, make_batch, make_model, make_tokenizer

from vicvlm_cli import checkpoint
from vicvlm_cli.checkpoint import FORMAT_VERSION, load_model, save_model
from vicvlm_cli.config import load_config, to_dict
from vicvlm_cli.errors import UserError
from vicvlm_cli.model.query_bank import QueryBank
from vicvlm_cli.model.vlm import VLM, RerankWeights

DATA = {"source": "scenes", "split_name": "drawn", "split": "train", "split_hash": "ab12"}


def save(
    path: Path,
    model: VLM | None = None,
    weights: tuple[float, float] = (0, 0),
    bank: QueryBank | None = None,
) -> Path:
    save_model(
        path,
        model or make_model(),
        make_tokenizer(),
        config=to_dict(load_config("vicvlm-tiny")),
        data=DATA,
        objective="vicvlm",
        rerank_weights=RerankWeights(*weights),
        bank=bank,
    )
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "model.safetensors")


def test_a_query_bank_comes_back_and_older_files_have_none(saved: Path, tmp_path: Path) -> None:
    assert load_model(saved, device="cpu").bank is None
    rows = torch.randn(5, make_model().config.projection_dim).half().float()
    bank = QueryBank(rows[:3], rows[3:], torch.tensor([0, 1, 1]), RerankWeights(0.5, 1.0))
    path = save(tmp_path / "model.safetensors", bank=bank)
    loaded = load_model(path, device="cpu").bank
    assert loaded is not None and loaded.weights == (0.5, 1.0)
    for name in ("texts", "images", "text_image"):
        assert torch.equal(getattr(loaded, name), getattr(bank, name))
    # Its tensors alone are as unexpected as any others.
    assert "differ, the first is query_bank.images" in refusal(
        rewrite(path, tmp_path / "a.safetensors", query_bank_weights=None)
    )
    old = rewrite(saved, tmp_path / "b.safetensors", format_version="1")
    assert load_model(old, device="cpu").bank is None


@pytest.mark.parametrize(
    "change",
    [
        {"query_bank.texts": None},
        {"query_bank.text_image": None},
        {"query_bank.texts": torch.ones(3, 5)},
        {"query_bank.texts": torch.ones(3)},
        {"query_bank.images": torch.full((2, 16), torch.nan)},
        {"query_bank.text_image": torch.tensor([0, 1, 2])},
        {"query_bank.text_image": torch.tensor([0.0, 1.0, 1.0])},
        "null",
        "[0.5]",
        "[0.5, -1]",
        "[0.5, NaN]",
        '"05"',
        "half",
    ],
)
def test_a_damaged_query_bank_is_refused(change: dict | str, tmp_path: Path) -> None:
    rows = torch.randn(5, 16)
    bank = QueryBank(rows[:3], rows[3:], torch.tensor([0, 1, 1]), RerankWeights(0.5, 1.0))
    path = save(tmp_path / "model.safetensors", bank=bank)
    assert bank.texts.shape[1] == make_model().config.projection_dim
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), load_file(path)
    if isinstance(change, str):
        header["query_bank_weights"] = change
    else:
        tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    save_file(tensors, path, metadata=header)
    assert "has a damaged query bank" in refusal(path)


def test_a_bank_without_weights_is_not_saved(tmp_path: Path) -> None:
    bank = QueryBank(torch.ones(1, 16), torch.ones(1, 16), torch.zeros(1).long())
    with pytest.raises(ValueError, match="have not been chosen"):
        save(tmp_path / "model.safetensors", bank=bank)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_path_that_may_not_be_looked_at_has_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no checkpoint at" in refusal(tmp_path / ("long" * 99))


def rewrite(saved: Path, path: Path, **header: str | None) -> Path:
    """A copy of ``saved`` with header keys changed, or left out where None."""
    with safe_open(saved, framework="pt") as file:
        old = file.metadata()
    new = {k: v for k, v in {**old, **header}.items() if v is not None}
    save_file(load_file(saved), path, metadata=new)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_the_round_trip_is_exact(fusion: str, tmp_path: Path) -> None:
    model = make_model(seed=3, fusion=fusion, image_mean=(0.4, 0.5, 0.6), image_positions="sincos")
    weights = RerankWeights(0.1 + 0.2, 5.0)  # no short decimal
    path = save(tmp_path / "deep" / "er" / "model.safetensors", model, weights)
    loaded = load_model(path, device="cpu")
    assert loaded.vlm.config == model.config
    ours, theirs = model.state_dict(), loaded.vlm.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(loaded.vlm.mean, model.mean) and torch.equal(loaded.vlm.std, model.std)
    assert not loaded.vlm.training
    assert loaded.tokenizer.to_json() == make_tokenizer().to_json()
    assert torch.equal(loaded.tokenizer(CAPTIONS, 24)[0], make_tokenizer()(CAPTIONS, 24)[0])
    assert loaded.info.rerank_weights == weights
    assert loaded.info.data == DATA
    assert loaded.info.objective == "vicvlm"
    assert loaded.info.format_version == FORMAT_VERSION
    assert loaded.info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    expected = json.loads(json.dumps(to_dict(load_config("vicvlm-tiny"))))
    assert {k: v for k, v in loaded.info.config.items() if k != "model"} == {
        k: v for k, v in expected.items() if k != "model"
    }
    batch = make_batch(3)
    image, text = (
        model.encode_image(batch.image),
        model.encode_text(batch.input_ids, batch.attention_mask),
    )
    assert torch.equal(loaded.vlm.encode_image(batch.image).features, image.features)
    assert torch.equal(loaded.vlm.match(image, text), model.match(image, text))


def test_what_was_trained_on_before_comes_with_it(saved: Path, tmp_path: Path) -> None:
    assert load_model(saved, device="cpu").info.origins == [DATA]  # as earlier versions write it
    before = [{**DATA, "split_hash": "cd34"}, {"source": "folder"}]
    data = json.dumps({**DATA, "before": before})
    path = rewrite(saved, tmp_path / "later.safetensors", data=data)
    assert load_model(path, device="cpu").info.origins == [DATA, *before]


def test_a_run_folder_stands_for_its_checkpoint(saved: Path) -> None:
    assert load_model(saved.parent, device="cpu").info.path == saved.resolve()


def test_half_precision_weights_come_back_in_single(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path / "half.safetensors", make_model().half()), device="cpu")
    assert {p.dtype for p in loaded.vlm.parameters()} == {torch.float32}


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert f"there is no checkpoint at {tmp_path / 'no.safetensors'}" in refusal(
        tmp_path / "no.safetensors"
    )
    assert str(tmp_path / "model.safetensors") in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(share: float, saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: int(share * len(content))])
    assert f"{cut} is truncated or not a safetensors file" in refusal(cut)


class Poison:
    """Runs when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_file_is_refused_and_never_run(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(
        {"weights": torch.zeros(3), "x": Poison()}, path, _use_new_zipfile_serialization=zipped
    )
    assert "not a safetensors file" in refusal(path)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": torch.zeros(2, 2)}, path)
    assert "not of a vicvlm model" in refusal(path)
    save_file({"conv1.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    assert "not of a vicvlm model" in refusal(path)


def test_a_newer_file_asks_for_an_upgrade(saved: Path, tmp_path: Path) -> None:
    newer = rewrite(saved, tmp_path / "new.safetensors", format_version=str(FORMAT_VERSION + 1))
    assert "written by a newer vicvlm" in refusal(newer)
    # Whatever else a later format changes, the version is what must be said.
    odd = rewrite(saved, tmp_path / "odd.safetensors", format_version="99", config=None)
    assert "upgrade" in refusal(odd)


@pytest.mark.parametrize(
    "header",
    [
        {"config": None},
        {"config": "{"},
        {"config": "[]"},
        {"config": '{"model": []}'},
        {"config": '{"model": {"width": 3}}'},
        {"config": '{"model": {"fusion": "add"}}'},
        {"tokenizer": None},
        {"tokenizer": "{}"},
        {"tokenizer": "not json"},
        {"data": "{"},
        {"rerank_weights": "much"},
        {"rerank_weights": "[1.0, 2.0, 3.0]"},
        {"rerank_weights": '[1.0, "much"]'},
        {"rerank_weights": "null"},
        {"format_version": "one"},
        {"objective": None},
    ],
    ids=lambda h: "-".join(f"{k}:{v}" for k, v in h.items()),
)
def test_a_damaged_header_is_refused(
    header: dict[str, str | None], saved: Path, tmp_path: Path
) -> None:
    path = rewrite(saved, tmp_path / "damaged.safetensors", **header)
    message = refusal(path)
    assert str(path) in message and "damaged" in message


def test_an_older_file_has_one_weight_for_both_directions(saved: Path, tmp_path: Path) -> None:
    path = rewrite(saved, tmp_path / "a.safetensors", rerank_weights=None, rerank_weight="0.5")
    assert load_model(path, device="cpu").info.rerank_weights == (0.5, 0.5)


@pytest.mark.parametrize(("mirror", "views"), [(True, 2), (False, 1)])
def test_an_older_file_says_whether_pictures_are_mirrored(
    mirror: bool, views: int, saved: Path, tmp_path: Path
) -> None:
    with safe_open(saved, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    del config["model"]["eval_views"]
    config["model"]["eval_mirror"] = mirror
    path = rewrite(saved, tmp_path / "a.safetensors", config=json.dumps(config))
    loaded = load_model(path, device="cpu")
    assert loaded.vlm.config.eval_views == views
    load_config(base=loaded.info.config)  # fine-tuning starts from it
    assert load_model(path, device="cpu", eval_views=7).vlm.config.eval_views == 7


def test_weights_that_do_not_fit_the_header_are_refused(saved: Path, tmp_path: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(saved)
    path = tmp_path / "other.safetensors"
    for wrong in (
        {k: v for k, v in tensors.items() if k != "itm_head.bias"},
        {**tensors, "itm_head.bias": torch.zeros(2)},
        {**tensors, "itm_head.other": torch.zeros(2)},
    ):
        save_file(wrong, path, metadata=header)
        message = refusal(path)
        assert "does not hold the weights" in message and "itm_head." in message


def test_a_failed_save_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model.safetensors")
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(path, make_model(seed=5))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
