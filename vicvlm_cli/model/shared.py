"""One transformer block for both modalities, the top of a dual encoder (S-SMKE)."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SharedBlock(nn.Module):
    """Image tokens and text tokens, each alone, through the same pre-norm block.

    Each token gets its modality's embedding, scaled by a learned 1e-5 at the start; the residual
    branches are scaled by a learned 0.2 (LayerScale, arXiv 2103.17239).
    """

    def __init__(self, width: int, heads: int, image_width: int) -> None:
        super().__init__()
        self.image_input = nn.Linear(image_width, width)
        self.kind_embedding = nn.Parameter(torch.randn(2, width))
        self.kind_scale = nn.Parameter(torch.full((width,), 1e-5))
        self.block = Block(width, heads, qkv_bias=True, init_values=0.2)

    def forward(self, tokens: Tensor, mask: Tensor | None, image: bool) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, D] (pictures: [B, N, D_i]) and bool mask [B, N], True at real tokens.

        Returns:
            What the block has after its attention, and after its feed-forward part, [B, N, D] each.
        """
        x = self.image_input(tokens) if image else tokens
        x = x + self.kind_embedding[int(image)] * self.kind_scale
        hide = None
        if mask is not None:
            hide = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            hide = hide.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]
        block = self.block
        attended = x + block.ls1(block.attn(block.norm1(x), attn_mask=hide))
        return attended, attended + block.ls2(block.mlp(block.norm2(attended)))
