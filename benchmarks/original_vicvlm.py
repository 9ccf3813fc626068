"""The training step of the first public VicVLM code, written from its description, to compare with.

What it does is told in docs/method.md ("Where this departs from the first public code"); nothing
here is wanted anywhere else. Two full passes of the picture (masked patches keep their places), one
of the EMA target in float32, two of the caption, and five of the fusion encoder over [CLS] + 196
patches + 35 words, padding in and visible, attention eager, MLM on all positions, and AdamW as
PyTorch makes it where nothing else is asked for.

Where the description leaves open how something is computed, the cheaper way is taken: crops on the
device in the place of RandAugment, and no loading of data. It counts 118.6 GFLOP a pair (116.7 with
30 words); by hand, a multiply-add as two, it is 119:

    picture, clean and masked   55.2    fusion, five passes   48.4    MLM head   3.4
    EMA of the picture           9.2    caption, twice         2.6
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.transforms import CROP_MARGIN, random_crop

WORDS, BLOCK, IMAGE_MASK, TEXT_MASK = 35, 2, 0.75, 0.25


def make_bert(layers: int) -> Any:
    """BERT-small's first or last layers."""
    config: Any = BertConfig(
        vocab_size=30522,
        hidden_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        intermediate_size=2048,
    )
    config._attn_implementation = "eager"
    return BertModel(config, add_pooling_layer=False)


class OriginalVicVLM(nn.Module):
    """Seven losses of weight 1 but for the invariance's 25: byol targets."""

    def __init__(self) -> None:
        super().__init__()
        timm.layers.set_fused_attn(False)
        self.vit: Any = timm.create_model("vit_small_patch16_224", num_classes=0)
        self.ema: Any = copy.deepcopy(self.vit).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(384))
        self.text = make_bert(2)
        self.fusion = make_bert(2).encoder
        self.fusion_cls = nn.Parameter(torch.randn(1, 1, 512) * 0.02)
        self.to_fusion = nn.Linear(384, 512, bias=False)
        self.image_projection = nn.Linear(384, 256)
        self.text_projection = nn.Linear(512, 256)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(512, 2)
        self.joint_head = nn.Linear(512, 384)
        self.mlm_transform = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.LayerNorm(512))
        self.mlm_bias = nn.Parameter(torch.zeros(30522))

    def forward(self, batch: Batch, autocast: torch.autocast) -> Tensor:
        """The sum of the losses, on pictures normalised [B, 3, 224, 224] and words [B, 35]."""
        hidden = self._hide_patches(batch.image)
        with torch.no_grad():  # in float32: outside of autocast
            target = F.normalize(self.ema.forward_features(batch.image)[:, 1:], dim=-1)
        with autocast:
            return self._losses(batch, hidden, target)

    def _losses(self, batch: Batch, hidden: Tensor, target: Tensor) -> Tensor:
        mask = batch.attention_mask
        image = self.vit.forward_features(batch.image)
        masked_image = self._encode_masked(batch.image, hidden)
        words = self._encode_text(batch.input_ids, mask)
        hidden_words = (torch.rand(mask.shape, device=mask.device) < TEXT_MASK) & mask
        masked_words = self._encode_text(batch.input_ids.masked_fill(hidden_words, 103), mask)

        # ITC: means over all tokens, padding among them, and no unit length.
        v, t = self.image_projection(image.mean(1)), self.text_projection(words.mean(1))
        similarity = v @ t.T / self.temperature.clamp(0.001, 0.5)
        own = torch.arange(len(v), device=v.device)
        itc = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

        fused = self._fuse(image, words, mask)
        fused_masked_image = self._fuse(masked_image, words, mask)
        fused_masked_words = self._fuse(image, masked_words, mask)
        # ITM: one softmax for both directions.
        chance = similarity.detach().float().softmax(1).fill_diagonal_(0) + 1e-9
        wrong_text = chance.multinomial(1).squeeze(1)
        wrong_image = chance.T.multinomial(1).squeeze(1)
        of_texts = self._fuse(image, words[wrong_text], mask[wrong_text])
        of_images = self._fuse(image[wrong_image], words, mask)
        pairs = torch.cat([x.mean(1) for x in (fused, of_texts, of_images)])
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own).repeat(2)])
        itm = F.cross_entropy(self.itm_head(pairs), labels)

        joint = self.joint_head(fused_masked_image[:, 1:197])
        mim = self._l1(image[:, 1:], target, hidden) + self._l1(joint, target, hidden)
        table = self.text.embeddings.word_embeddings.weight
        logits = F.linear(self.mlm_transform(masked_words), table, self.mlm_bias)  # [B, 35, V]
        labels = batch.input_ids.masked_fill(~hidden_words, -100)
        mlm = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

        views = (fused, fused_masked_image, fused_masked_words)
        spread = torch.stack([self._spread(z.mean(1).float()) for z in views]).mean()
        invariance = (F.mse_loss(fused, views[1]) + F.mse_loss(fused, views[2])) / 2
        return itc + itm + mim + mlm + spread + 25 * invariance

    def follow(self, decay: float = 0.995) -> None:
        """Move the EMA target, key by key."""
        online, target = self.vit.state_dict(), self.ema.state_dict()
        for key, value in online.items():
            target[key] = decay * target[key] + (1 - decay) * value
        self.ema.load_state_dict(target)

    def _hide_patches(self, image: Tensor) -> Tensor:
        side = 14 // BLOCK
        blocks = torch.rand(len(image), side * side, device=image.device)
        hidden = blocks.argsort(1).argsort(1) < round(IMAGE_MASK * side * side)
        grid = hidden.view(-1, side, side)
        return grid.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2).flatten(1)  # [B, 196]

    def _encode_masked(self, image: Tensor, hidden: Tensor) -> Tensor:
        x = self.vit.patch_embed(image)
        x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self.vit.norm(self.vit.blocks(self.vit._pos_embed(x)))

    def _encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text(input_ids=ids, attention_mask=mask).last_hidden_state

    def _fuse(self, image: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """[B, 1 + 196 + 35, 512]; the mask of ones and zeros is added to the logits."""
        cls = self.fusion_cls.expand(len(image), -1, -1)
        tokens = torch.cat([cls, self.to_fusion(image[:, 1:]), words], dim=1)
        seen = F.pad(mask.float(), (197, 0), value=1.0)[:, None, None, :]
        return self.fusion(tokens, attention_mask=seen.to(tokens.dtype)).last_hidden_state

    def _l1(self, x: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
        error = (F.normalize(x.float(), dim=-1) - target).abs().sum(-1)
        return (error * hidden).sum() / hidden.sum()

    def _spread(self, z: Tensor) -> Tensor:
        """VICReg's variance and covariance of [B, D]."""
        std = (z.var(0) + 1e-4).sqrt()
        c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        off = c.square().sum() - c.diagonal().square().sum()
        return F.relu(1 - std).mean() + off / z.shape[1]


class OriginalStep:
    """One optimiser step on ``batch``, uint8 pictures [B, 3, S, S] and words, as it is given."""

    def __init__(self, batch: Batch, bf16: bool) -> None:
        device = batch.image.device
        self.model = OriginalVicVLM().to(device).train()
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2.5e-4, weight_decay=0.01)
        missing = WORDS - batch.input_ids.shape[1]  # captions are cut or padded to 35
        self.batch = Batch(
            **{
                **batch.__dict__,
                "input_ids": F.pad(batch.input_ids, (0, missing)),
                "attention_mask": F.pad(batch.attention_mask, (0, missing)),
            }
        )

    def __call__(self) -> None:
        """Crop, forward, backward, clip, step, follow."""
        image, rows = self.batch.image, len(self.batch.image)
        noise = torch.rand(rows, 4, device=image.device)
        flip = torch.rand(rows, device=image.device) < 0.5
        cropped = random_crop(image, round(image.shape[-1] / CROP_MARGIN), 0.6, noise, flip)
        batch = self.batch.rows(slice(None))
        batch.image = (cropped - 127.5) / 127.5
        self.model(batch, self.autocast).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.follow()
