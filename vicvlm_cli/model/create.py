"""New models: what a configuration names becomes an architecture with its pretrained weights."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.model.fusion import FUSIONS
from vicvlm_cli.model.image_encoder import architecture, resolve_image_encoder
from vicvlm_cli.model.late_interaction import LateInteraction
from vicvlm_cli.model.single_stream import SingleStream
from vicvlm_cli.model.text_encoder import bert_config, load_bert, load_half
from vicvlm_cli.model.vlm import VLM, RetrievalModel
from vicvlm_cli.settings import ModelConfig

# The kinds of model by model.fusion; all other names are of one with two encoders.
KINDS: dict[str, type[VLM] | type[SingleStream]] = {
    "stacked_attention": LateInteraction,
    "single_stream": SingleStream,
}


def build_model(config: ModelConfig, image_weights: str = "") -> RetrievalModel:
    """The model of a *resolved* configuration, its weights random but for ``image_weights``.

    Raises:
        UsageError: the fusion is of one picture size alone, and pictures of another are to be
            embedded.
    """
    if config.fusion == "concat" and config.eval_image_scale != 1:
        raise UsageError(
            "model.fusion=concat numbers the patches of model.image_size and no others: set "
            "model.eval_image_scale (or --image-scale) to 1, or choose another fusion"
        )
    model = KINDS.get(config.fusion, VLM)(config, image_weights)
    # Whose weights they were is past: a timm that does not know these rebuilds the model too.
    model.config = replace(model.config, image_encoder=architecture(config.image_encoder))
    return model


def create_model(config: ModelConfig, vocab_size: int) -> RetrievalModel:
    """A new model with the pretrained weights that ``config`` names.

    The model's ``config`` is resolved: it names an architecture, never a tag, a file or a hub, and
    rebuilds the same shapes anywhere.

    Raises:
        UserError: an encoder is unknown, does not fit, or its weights cannot be loaded; and what
            :func:`build_model` raises.
    """
    if config.fusion not in FUSIONS:
        config = replace(config, fusion_layers=0)
    name, weights, statistics = resolve_image_encoder(config.image_encoder, config.image_weights)
    resolved = replace(
        config, image_encoder=name, image_weights="", text_encoder="", vocab_size=vocab_size
    )
    resolved = replace(resolved, **statistics)
    if config.text_width % config.text_heads:
        raise UserError(
            f"model.text_width={config.text_width} is not a multiple of "
            f"model.text_heads={config.text_heads}"
        )
    if not config.text_encoder or not issubclass(KINDS.get(config.fusion, VLM), VLM):
        return build_model(resolved, weights)
    bert, text, fusion = load_bert(config.text_encoder, config.text_layers, config.fusion_layers)
    plain = bert_config(vocab_size=1, width=bert.hidden_size, heads=1, layers=1, dropout=0.0)
    for key in ("intermediate_size", "hidden_act", "layer_norm_eps", "max_position_embeddings"):
        if getattr(bert, key) != getattr(plain, key):
            raise UserError(
                f"{config.text_encoder!r} is not a plain BERT: its {key} is {getattr(bert, key)}, "
                f"not {getattr(plain, key)}"
            )
    resolved = replace(
        resolved,
        vocab_size=bert.vocab_size,
        text_width=bert.hidden_size,
        text_heads=bert.num_attention_heads,
        max_tokens=min(config.max_tokens, bert.max_position_embeddings),
    )
    model = build_model(resolved, weights)
    assert isinstance(model, VLM)
    load_half(model.text_encoder.bert, text)
    if model.fusion is None:
        return model
    fusion_bert: nn.Module = model.fusion.get_submodule("bert")
    positions = "embeddings.position_embeddings.weight"
    own = fusion_bert.state_dict()[positions]
    if own.shape != fusion[positions].shape:  # more image tokens than BERT has positions
        own = own.clone()
        own[: len(fusion[positions])] = fusion[positions]
        fusion[positions] = own
    load_half(fusion_bert, fusion)
    return model
