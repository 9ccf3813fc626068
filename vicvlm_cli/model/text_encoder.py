"""The text encoder and the layers of the fusion encoder: a transformers BERT, cut in two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from vicvlm_cli.errors import UserError
from vicvlm_cli.model.dropout import replace_dropout
from vicvlm_cli.model.lengths import by_length

POSITIONS = 512  # of BERT


def attention_kind() -> str:
    """``eager`` on the CPU, where the fused kernel's bf16 backward is the slower; else ``sdpa``."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def bert_config(
    *,
    vocab_size: int,
    width: int,
    heads: int,
    layers: int,
    dropout: float,
    pad_id: int = 0,
    max_tokens: int = POSITIONS,
) -> BertConfig:
    """A BERT of the given sizes, with positions for ``max_tokens`` or as many as BERT has."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad_id,
        max_position_embeddings=max(POSITIONS, max_tokens),
    )


def make_bert(config: BertConfig) -> BertModel:
    """A BertModel without pooler whose attention and dropout suit this machine."""
    config._attn_implementation = attention_kind()
    bert = BertModel(config, add_pooling_layer=False)
    replace_dropout(bert)
    return bert


class TextEncoder(nn.Module):
    """The first layers of a BERT."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = make_bert(config)
        self.width: int = config.hidden_size

    @property
    def word_embeddings(self) -> Tensor:
        """[vocab_size, width], also the output table of masked language modelling."""
        return self.bert.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``input_ids`` [B, L] and bool ``attention_mask`` [B, L] to tokens [B, L, width]."""

        def run(rows: Tensor, length: int) -> Tensor:
            mask = attention_mask[rows, :length]
            return self.bert(
                input_ids=input_ids[rows, :length], attention_mask=mask
            ).last_hidden_state

        return by_length(attention_mask, run)


def load_bert(
    name_or_path: str, text_layers: int, fusion_layers: int
) -> tuple[BertConfig, dict[str, Tensor], dict[str, Tensor]]:
    """A pretrained BERT cut into the first ``text_layers`` and the last ``fusion_layers``.

    Returns:
        Its configuration (with ``text_layers`` layers), the state of the text half, and the state
        of the fusion half with its layers renumbered from 0.

    Raises:
        UserError: it cannot be loaded, is not a BERT, lacks weights, or has too few layers.
    """
    try:
        # Old BERTs, prajjwal1/bert-small among them, do not say what they are.
        kind = BertConfig.get_config_dict(name_or_path)[0].get("model_type", "bert")
        if kind != "bert":  # transformers would make a BERT of random weights from it
            raise UserError(f"{name_or_path!r} is a {kind} model and not a BERT: name a BERT")
        with _errors_only():  # not a table of the pooler and the heads, which nobody wants
            whole, found = BertModel.from_pretrained(
                name_or_path, add_pooling_layer=False, output_loading_info=True
            )
        if missing := sorted(found["missing_keys"]):
            raise UserError(f"{name_or_path!r} has no weights for {missing[0]!r}: name a BERT")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"no BERT could be loaded from {name_or_path!r}: name one on the hub (with a network), "
            "or a local folder with config.json and model.safetensors"
        ) from error
    config: Any = whole.config
    if text_layers + fusion_layers > config.num_hidden_layers:
        raise UserError(
            f"{name_or_path!r} has {config.num_hidden_layers} layers, fewer than text_layers="
            f"{text_layers} and fusion_layers={fusion_layers} together"
        )
    first = config.num_hidden_layers - fusion_layers
    text: dict[str, Tensor] = {}
    fusion: dict[str, Tensor] = {}
    for key, value in whole.state_dict().items():
        if not key.startswith("encoder.layer."):
            text[key] = value
            if "word_embeddings" not in key:
                fusion[key] = value
            continue
        number, rest = key.removeprefix("encoder.layer.").split(".", 1)
        if int(number) < text_layers:
            text[key] = value
        if int(number) >= first:
            fusion[f"encoder.layer.{int(number) - first}.{rest}"] = value
    config.num_hidden_layers = text_layers
    return config, text, fusion


@contextmanager
def _errors_only() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_half(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load ``state`` into ``module``; what is new there (cross-attention) keeps its start."""
    own = module.state_dict()
    missing = [k for k in state if k not in own or own[k].shape != state[k].shape]
    if missing:
        raise UserError(f"the text weights do not fit the model at {missing[0]!r}")
    module.load_state_dict(state, strict=False)
