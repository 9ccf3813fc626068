"""The text encoder against transformers' own BERT, and a pretrained BERT cut in two."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_config
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from vicvlm_cli.errors import UserError
from vicvlm_cli.model import text_encoder
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.text_encoder import TextEncoder, bert_config, load_bert

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 50}


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of attention: what a CPU runs and what a GPU runs."""
    kind: str = request.param
    monkeypatch.setattr(text_encoder, "attention_kind", lambda: kind)
    return kind


def randomize(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def bert_folder(folder: Path, layers: int = 5, **sizes: Any) -> BertModel:
    """A local BERT of random weights; returns the model it holds."""
    config = BertConfig(num_hidden_layers=layers, **{**SIZES, **sizes})
    bert = BertModel(config, add_pooling_layer=False)
    randomize(bert)
    bert.save_pretrained(folder)
    return bert.eval()


def captions(rows: int = 4, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length)[None] < torch.tensor([9, 5, 1, 7])[:rows, None]
    return ids, mask


def test_it_equals_transformers_own_bert(attention: str) -> None:
    encoder = TextEncoder(
        bert_config(vocab_size=50, width=32, heads=2, layers=3, dropout=0.1)
    ).eval()
    assert encoder.bert.config._attn_implementation == attention
    own = BertModel(BertConfig(num_hidden_layers=3, **SIZES), add_pooling_layer=False).eval()
    randomize(own)
    encoder.bert.load_state_dict(own.state_dict())
    ids, mask = captions()
    expected = own(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask)[mask], expected[mask], rtol=1e-4, atol=1e-5)
    # And each caption is what BERT makes of it alone, without any padding.
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = own(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(encoder(ids, mask)[row, :length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("max_tokens", "positions"), [(40, 512), (512, 512), (768, 768)])
def test_captions_above_berts_length_have_positions(max_tokens: int, positions: int) -> None:
    sizes: Any = {"vocab_size": 50, "width": 32, "heads": 2, "layers": 1, "dropout": 0.0}
    config = bert_config(**sizes, max_tokens=max_tokens)
    assert config.max_position_embeddings == positions
    ids = torch.ones(1, max_tokens, dtype=torch.long)
    assert TextEncoder(config)(ids, ids.bool()).shape == (1, max_tokens, 32)
    assert bert_config(**sizes).max_position_embeddings == 512  # that of earlier checkpoints


@pytest.mark.parametrize("whole_model", [False, True], ids=["encoder", "masked-lm"])
@pytest.mark.parametrize(("first", "last"), [(2, 2), (3, 1), (1, 4)])
def test_the_cut_keeps_the_first_and_the_last_layers(
    first: int, last: int, whole_model: bool, tmp_path: Path
) -> None:
    own = bert_folder(tmp_path)
    if whole_model:  # as BERT itself is published: the encoder under "bert.", and a head
        model = BertForMaskedLM(own.config)
        model.bert.load_state_dict(own.state_dict())
        model.save_pretrained(tmp_path)
    config, text, fusion = load_bert(str(tmp_path), first, last)
    assert config.num_hidden_layers == first
    state = own.state_dict()
    for layer, key in [(layer, key) for layer in range(5) for key in state]:
        rest = key.removeprefix(f"encoder.layer.{layer}.")
        if rest == key:
            continue
        assert (key in text) == (layer < first)
        if layer < first:
            assert torch.equal(text[key], state[key])
        if layer >= 5 - last:
            assert torch.equal(fusion[f"encoder.layer.{layer - (5 - last)}.{rest}"], state[key])
    assert not any(key.startswith(f"encoder.layer.{last}.") for key in fusion)
    assert all(torch.equal(text[k], v) for k, v in state.items() if k.startswith("embeddings."))


@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_a_model_from_a_bert_runs_that_berts_layers(fusion: str, tmp_path: Path) -> None:
    own = bert_folder(tmp_path)
    config = make_config(text_encoder=str(tmp_path), text_layers=3, fusion_layers=2, fusion=fusion)
    model = create_model(config, vocab_size=50).eval()
    ids, mask = captions()
    states = own(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(
        model.encode_text(ids, mask).tokens[mask], states[3][mask], rtol=1e-4, atol=1e-5
    )
    cut: Any = model.fusion.bert
    layers = cut.encoder.layer
    assert len(layers) == 2
    for mine, theirs in zip(layers, own.encoder.layer[3:], strict=True):
        expected = theirs.state_dict()
        state = mine.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        new = set(state) - set(expected)
        assert bool(new) == (fusion == "cross_attention")
        assert all(key.startswith("crossattention") for key in new)
    norm = "embeddings.LayerNorm.weight"
    assert torch.equal(cut.state_dict()[norm], own.state_dict()[norm])


def test_the_resolved_configuration_names_no_file(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    config = make_config(text_encoder=str(tmp_path), text_width=999, text_heads=3, max_tokens=24)
    resolved = create_model(config, vocab_size=10).config
    assert resolved.text_encoder == "" == resolved.image_weights
    assert (resolved.text_width, resolved.text_heads, resolved.vocab_size) == (32, 2, 50)
    assert resolved.max_tokens == 24


def test_too_few_layers_are_refused(tmp_path: Path) -> None:
    bert_folder(tmp_path, layers=3)
    with pytest.raises(UserError, match="has 3 layers, fewer than text_layers=2"):
        load_bert(str(tmp_path), 2, 2)
    load_bert(str(tmp_path), 2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DistilBertModel(
            DistilBertConfig(dim=32, n_heads=2, n_layers=4, hidden_dim=64, vocab_size=50)
        ),
        lambda: RobertaModel(RobertaConfig(num_hidden_layers=4, **SIZES)),
    ],
    ids=["distilbert", "roberta"],
)
def test_what_is_not_a_bert_is_refused(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    # transformers would fill a BERT with random weights, with no more than a warning.
    make().save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match="model and not a BERT"):
        load_bert(str(tmp_path), 2, 2)


def without_type(folder: Path) -> None:
    """As old BERTs are published, such as prajjwal1/bert-small."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["model_type"]
    config.pop("architectures", None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def test_a_bert_need_not_say_that_it_is_one(tmp_path: Path) -> None:
    own = bert_folder(tmp_path)
    without_type(tmp_path)
    _, text, _ = load_bert(str(tmp_path), 2, 2)
    key = "encoder.layer.1.output.dense.weight"
    assert torch.equal(text[key], own.state_dict()[key])


def test_what_a_bert_has_beside_its_encoder_is_left_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    logger = logging.getLogger("transformers")
    BertForMaskedLM(BertConfig(num_hidden_layers=4, **SIZES)).save_pretrained(tmp_path)
    logger.addHandler(handler)
    try:
        load_bert(str(tmp_path), 2, 2)
    finally:
        logger.removeHandler(handler)
    assert not said


def test_weights_are_never_left_at_random(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for 'encoder\.layer\.1\.output"):
        load_bert(str(tmp_path), 2, 2)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no BERT could be loaded from"):
        load_bert(str(tmp_path), 2, 2)


@pytest.mark.parametrize(
    "sizes", [{"intermediate_size": 64}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}]
)
def test_a_bert_that_a_checkpoint_could_not_rebuild_is_refused(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    bert_folder(tmp_path, **sizes)
    with pytest.raises(UserError, match="is not a plain BERT"):
        create_model(make_config(text_encoder=str(tmp_path)), vocab_size=50)
