"""Heads that only training needs: they live in an objective, never in a checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vicvlm_cli.model.attention import take
from vicvlm_cli.model.fusion import CrossAttentionLayers
from vicvlm_cli.model.image_encoder import sincos_2d
from vicvlm_cli.model.text_encoder import bert_config


class PatchPredictor(nn.Module):
    """Predicts hidden patches from the encoded ones, and from the caption where it is given.

    The encoded patches' features go back to their places in the grid, a mask token with its
    position stands at the others (without positions, only a constant could be learned), and a few
    3x3 convolutions spread what is seen (data2vec 2.0, arXiv 2212.07525, sec. 3.2: cheaper than
    attention, and near neighbours are what counts). For joint masked image modelling, one attention
    block over the grid and the caption's multimodal tokens follows.
    """

    positions: Tensor

    def __init__(
        self,
        image_width: int,
        grid: tuple[int, int],
        out_width: int,
        *,
        width: int,
        depth: int,
        context_width: int = 0,
        dropped: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.visible = nn.Linear(image_width, width)
        # Where the encoder drops no patch, each place has its own features.
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if dropped else None
        self.register_buffer("positions", sincos_2d(grid, width), persistent=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.context = nn.Linear(context_width, width) if context_width else None
        self.block = Block(width, max(width // 32, 1), qkv_bias=True) if context_width else None
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_width))

    def forward(
        self,
        encoded: Tensor,
        at: Tensor,
        masked: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the hidden patches.

        Args:
            encoded: [B, K, image_width], features of the patches numbered ``at`` [B, K]; of all
                of them in order, unless the encoder drops some.
            masked: long [B, M], the patches to predict.
            context: [B, L, context_width] multimodal tokens, with bool ``context_mask`` [B, L].

        Returns:
            [B, M, out_width].
        """
        x = self.visible(encoded).float()  # [B, K, D]
        b, _, width = x.shape
        if self.mask_token is not None:
            everywhere = self.mask_token.expand(b, len(self.positions), -1)
            x = everywhere.scatter(1, at.unsqueeze(-1).expand_as(x), x)
        x = x + self.positions  # [B, N, D]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            image = x.transpose(1, 2).reshape(b, width, *self.grid)  # [B, D, H, W]
            x = x + F.gelu(norm(convolution(image).flatten(2).transpose(1, 2)))  # [B, N, D]
        if context is not None and context_mask is not None:
            assert self.context is not None and self.block is not None
            real = F.pad(context_mask, (x.shape[1], 0), value=True)  # [B, N + L]
            hide = torch.zeros(real.shape, device=real.device)
            hide = hide.masked_fill(~real, torch.finfo(torch.float32).min)[:, None, None, :]
            tokens = torch.cat([x.float(), self.context(context).float()], dim=1)
            x = self.block(tokens, attn_mask=hide)[:, : x.shape[1]]
        return self.out(x.gather(1, masked.unsqueeze(-1).expand(-1, -1, width)))


class JointPatchHead(nn.Module):
    """Puts mask tokens among encoded patches for a fusion that has image outputs, and reads them.

    The prediction is a two-layer perceptron on the fusion's output at each hidden patch (BYOL's
    predictor, arXiv 2006.07733, sec. 3.1).
    """

    positions: Tensor

    def __init__(
        self,
        image_width: int,
        grid: tuple[int, int],
        fused_width: int,
        out_width: int,
        *,
        dropped: bool = True,
    ) -> None:
        super().__init__()
        # Where the encoder drops no patch, its tokens are at all places as they come.
        self.mask_token = nn.Parameter(torch.randn(1, 1, image_width) * 0.02) if dropped else None
        self.register_buffer("positions", sincos_2d(grid, image_width), persistent=False)
        self.predictor = nn.Sequential(
            nn.Linear(fused_width, 2 * fused_width),
            nn.GELU(),
            nn.Linear(2 * fused_width, out_width),
        )

    def places(
        self, tokens: Tensor, prefix: int, encoded: Tensor, masked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of all patches for the fusion, and where among them the hidden ones are.

        Args:
            tokens: [B, prefix + K, D], of the patches numbered ``encoded`` [B, K].
            masked: long [B, M], the hidden patches.

        Returns:
            [B, prefix + N, D], patches in order, and long [B, M].
        """
        if self.mask_token is None:
            return tokens, masked + prefix
        hidden = (self.mask_token + self.positions[masked]).to(tokens.dtype)  # [B, M, D]
        visible = tokens[:, prefix:] + self.positions[encoded].to(tokens.dtype)
        # The fusion numbers its tokens: a patch is to have the number of its place in each pass.
        order = torch.cat([encoded, masked], dim=1).argsort(1)
        patches = take(torch.cat([visible, hidden], dim=1), order)  # [B, N, D]
        return torch.cat([tokens[:, :prefix], patches], dim=1), masked + prefix

    def forward(self, fused_image: Tensor) -> Tensor:
        """Fused tokens of the hidden patches, [B, M, fused_width], to [B, M, out_width]."""
        return self.predictor(fused_image)


class MLMHead(nn.Module):
    """BERT's masked-word head, on chosen positions only; its table is the text encoder's own."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """[M, width] tokens and the [vocab_size, width] table to logits [M, vocab_size]."""
        return F.linear(self.transform(tokens), table, self.bias)


class CrossAttentionPatchHead(nn.Module):
    """Predicts hidden patches by layers that attend to all patches, then to the caption.

    The image decoder of MaskVLM (arXiv 2208.02131, fig. 2).
    """

    def __init__(self, width: int, heads: int, depth: int, out_width: int, dropout: float) -> None:
        super().__init__()
        config = bert_config(vocab_size=1, width=width, heads=heads, layers=depth, dropout=dropout)
        self.layers = CrossAttentionLayers(config, depth)
        self.out = nn.Linear(width, out_width)

    def forward(self, image: Tensor, at: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Predict from multimodal tokens.

        Args:
            image: [B, N, width], those of hidden patches among them.
            at: long [B, M], the tokens to predict at.
            text: [B, L, width], with bool ``text_mask`` [B, L].

        Returns:
            [B, M, out_width].
        """
        predicted: Tensor = self.out(self.layers(image, None, text, text_mask, at))
        return predicted
