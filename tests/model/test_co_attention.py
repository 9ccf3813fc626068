"""The co-attention fusion: two streams, each equal to a BERT's layers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_config
from torch import Tensor
from transformers import BertConfig, BertModel

from vicvlm_cli.model import text_encoder
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.fusion import CoAttentionFusion, Fused
from vicvlm_cli.model.text_encoder import bert_config

WIDTH, HEADS, IMAGE_WIDTH, PATCHES, LENGTH = 32, 2, 24, 6, 5
CONFIG: BertConfig = bert_config(
    vocab_size=50, width=WIDTH, heads=HEADS, layers=1, dropout=0.1, pad_id=0
)


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    kind: str = request.param
    monkeypatch.setattr(text_encoder, "attention_kind", lambda: kind)
    return kind


def make(layers: int = 1) -> CoAttentionFusion:
    torch.manual_seed(0)
    fusion = CoAttentionFusion(CONFIG, layers, IMAGE_WIDTH, 1 + PATCHES)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(std=0.2)
    return fusion.eval()


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens [3, 1 + PATCHES, D_i], text tokens [3, LENGTH, D] and the text's mask."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 1 + PATCHES, IMAGE_WIDTH, generator=generator)
    text = torch.randn(3, LENGTH, WIDTH, generator=generator)
    return image, text, torch.arange(LENGTH)[None] < torch.tensor([LENGTH, 2, 1])[:, None]


def attend(part: Any, x: Tensor, seen: Tensor) -> Tensor:
    """One row: x [N, D] attends to ``seen`` [M, D]; heads one by one, then add and norm."""
    q, k, v = part.self.query(x), part.self.key(seen), part.self.value(seen)
    size = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        cut = slice(h * size, (h + 1) * size)
        weights = (q[:, cut] @ k[:, cut].T / math.sqrt(size)).softmax(dim=1)
        heads.append(weights @ v[:, cut])
    return part.output.LayerNorm(part.output.dense(torch.cat(heads, dim=1)) + x)


def by_hand(layers: Any, x: Tensor, other: Tensor) -> Tensor:
    """One row through layers that attend to themselves, then to ``other``, then think."""
    for layer in layers:
        x = attend(layer.attention, x, x)
        x = attend(layer.crossattention, x, other)
        thought = layer.output.dense(F.gelu(layer.intermediate.dense(x)))
        x = layer.output.LayerNorm(thought + x)
    return x


def test_both_streams_by_hand(attention: str) -> None:
    fusion: Any = make(layers=2)
    image, text, mask = tokens()
    fused: Fused = fusion(image, None, text, mask)
    assert fused.image is not None
    assert fused.image.shape == (3, 1 + PATCHES, WIDTH) and fused.text.shape == text.shape
    table = fusion.bert.embeddings
    for row in range(3):
        real = text[row][mask[row]]
        patches = fusion.image_projection(image[row])
        words = real + table.position_embeddings.weight[: len(real)]
        words = table.LayerNorm(words + table.token_type_embeddings.weight[0])
        words = by_hand(fusion.bert.encoder.layer, words, patches)
        seen = fusion.image_stream.norm(patches)
        seen = by_hand(fusion.image_stream.encoder.layer, seen, real)
        torch.testing.assert_close(fused.text[row][mask[row]], words, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fused.image[row], seen, rtol=1e-3, atol=1e-4)
        # A linear map of both class tokens side by side.
        pooled = fusion.pool(torch.cat([seen[0], words[0]]))
        torch.testing.assert_close(fused.pooled[row], pooled, rtol=1e-3, atol=1e-4)


def test_each_stream_sees_the_other_and_all_of_itself(attention: str) -> None:
    fusion = make(layers=1)
    image, text, mask = tokens()
    before: Fused = fusion(image, None, text, mask)
    assert before.image is not None
    for i in range(LENGTH):
        changed = text.clone()
        changed[:, i] += torch.randn(WIDTH)
        after: Fused = fusion(image, None, changed, mask)
        assert after.image is not None
        moved = (after.image - before.image).abs().amax(2) > 1e-5  # [3, 1 + PATCHES]
        assert torch.equal(moved, mask[:, i : i + 1].expand_as(moved))
        words = (after.text - before.text).abs().amax(2) > 1e-5
        assert bool(words[mask[:, i]][mask[mask[:, i]]].all())
    for i in range(1 + PATCHES):  # the last, too: no causal mask hides it from those before
        changed = image.clone()
        changed[:, i] += 1
        after = fusion(changed, None, text, mask)
        assert after.image is not None
        assert bool(((after.image - before.image).abs().amax(2) > 1e-5).all())
        assert bool(((after.text - before.text).abs().amax(2) > 1e-5)[mask].all())


def test_padding_of_either_side_changes_neither_stream(attention: str) -> None:
    fusion = make(layers=2)
    image, text, mask = tokens()
    real = torch.arange(1 + PATCHES)[None] < torch.tensor([7, 3, 1])[:, None]
    before: Fused = fusion(image, real, text, mask)
    after: Fused = fusion(
        image.masked_fill(~real.unsqueeze(-1), 50.0),
        real,
        text.masked_fill(~mask.unsqueeze(-1), 50.0),
        mask,
    )
    assert before.image is not None and after.image is not None
    torch.testing.assert_close(after.image[real], before.image[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.text[mask], before.text[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.pooled, before.pooled, rtol=1e-4, atol=1e-5)


def test_the_text_stream_alone_is_that_of_both() -> None:
    fusion = make(layers=2)
    image, text, mask = tokens()
    both: Fused = fusion(image, None, text, mask)
    assert torch.equal(fusion.fuse_text(image, None, text, mask), both.text)


def test_patches_keep_their_outputs_in_any_order() -> None:
    fusion = make(layers=2)
    image, text, mask = tokens()
    before: Fused = fusion(image, None, text, mask)
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])  # the class token stays first
    after: Fused = fusion(image[:, order], None, text, mask)
    assert before.image is not None and after.image is not None
    torch.testing.assert_close(after.image, before.image[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.text, before.text, rtol=1e-4, atol=1e-5)


def test_a_pretrained_bert_becomes_the_text_stream(tmp_path: Path) -> None:
    config = BertConfig(
        num_hidden_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        vocab_size=50,
    )
    own = BertModel(config, add_pooling_layer=False)
    own.save_pretrained(tmp_path)
    settings = {"text_layers": 2, "fusion_layers": 2, "fusion": "co_attention"}
    model = create_model(make_config(text_encoder=str(tmp_path), **settings), vocab_size=50)
    fusion: Any = model.fusion
    for mine, theirs in zip(fusion.bert.encoder.layer, own.encoder.layer[2:], strict=True):
        state, expected = mine.state_dict(), theirs.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        assert all(key.startswith("crossattention") for key in state.keys() - expected.keys())
    positions = "embeddings.position_embeddings.weight"
    assert torch.equal(fusion.bert.state_dict()[positions], own.state_dict()[positions])
    assert len(fusion.image_stream.encoder.layer) == 2
