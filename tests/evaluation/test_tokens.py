from __future__ import annotations

import pytest
import torch

from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.errors import UserError
from vicvlm_cli.evaluation.tokens import TokenBank, encode_split
from vicvlm_cli.report.progress import Progress


def test_a_bank_gives_back_real_tokens_in_any_order():
    bank = TokenBank(4, torch.device("cpu"), torch.float32, most=11)
    tokens = torch.randn(4, 5, 2)
    mask = torch.arange(5) < torch.tensor([[2], [5], [3], [1]])
    for index in (torch.tensor([3, 1]), torch.tensor([0, 2])):
        bank.add(index, tokens[index], mask[index])
    assert bank.lengths.tolist() == [2, 5, 3, 1]
    for index in ([2, 0, 2], [3], [1, 3]):
        got, got_mask = bank.gather(torch.tensor(index))
        longest = max(bank.lengths[index]).item()
        assert torch.equal(got_mask, mask[index, :longest])
        assert torch.equal(got[got_mask], tokens[index][mask[index]])


def test_a_bank_of_unmasked_items_has_no_mask():
    bank = TokenBank(2, torch.device("cpu"), torch.bfloat16, most=0)
    tokens = torch.randn(2, 3, 4)
    bank.add(torch.tensor([1]), tokens[:1], None)
    bank.add(torch.tensor([0]), tokens[1:], None)
    got, mask = bank.gather(torch.tensor([0, 1, 1]))
    assert mask is None
    assert torch.equal(got, tokens[[1, 0, 0]].bfloat16())


def encode(model, split, **options):
    return encode_split(
        model.vlm,
        model.tokenizer,
        split,
        device=model.device,
        precision="no",
        progress=Progress(quiet=True),
        **options,
    )


def test_the_first_images_with_all_their_captions(tiny_model, tiny_data):
    split = PreparedDataset.open(tiny_data).split("test")
    whole, first = encode(tiny_model, split), encode(tiny_model, split, images=3, keep_tokens=False)
    assert first.image.shape[0] == 3
    assert torch.equal(first.text_image, whole.text_image[:15])
    assert torch.allclose(first.text, whole.text[:15], atol=1e-5)
    assert first.image_tokens is None
    assert torch.allclose(whole.image.norm(dim=1), torch.ones(12))


def test_a_live_model_stays_in_training_mode_with_its_frozen_parts(tiny_model, tiny_data):
    split = PreparedDataset.open(tiny_data).split("test")
    vlm = tiny_model.vlm.train()
    vlm.image_encoder.eval()
    try:
        before = encode(tiny_model, split).text
        assert vlm.training and vlm.fusion.training and not vlm.image_encoder.training
        # No dropout: twice the same.
        assert torch.equal(before, encode(tiny_model, split).text)
    finally:
        vlm.eval()


def test_a_damaged_image_stops_with_its_name(tiny_model, tiny_data, monkeypatch):
    split = PreparedDataset.open(tiny_data).split("test")

    def image(self, i, at_least=None):
        raise BadImage("truncated")

    monkeypatch.setattr(Split, "image", image)
    with pytest.raises(UserError, match=f"{split.image_ids[0]} of scenes test .* is truncated"):
        encode(tiny_model, split)
