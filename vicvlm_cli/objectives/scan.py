"""SCAN: a margin between pairs whose words and patches are compared by cross attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.model.late_interaction import LateInteraction
from vicvlm_cli.objectives.ranks import gather, gather_padded
from vicvlm_cli.objectives.vsepp import VSEPP


class SCAN(VSEPP):
    """VSE++'s loss, warm start included, on stacked cross attention (SCAN, 1803.08024, eq. 8)."""

    MODEL = LateInteraction
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "stacked_attention"},
        "pretrain": {"losses": {"hinge": {}}},
        "finetune": {
            "objective": "scan",
            "losses": {"hinge": {}},
            "options": {"mean_steps": 0},
        },
    }

    def similarity(self, batch: Batch) -> Tensor:
        """Of all pictures of the global batch with all captions, [G, G], pictures in rows."""
        model = self.model
        assert isinstance(model, LateInteraction)
        image = model.encode_image(batch.image)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        assert text.mask is not None
        # Each process compares its own pictures with the captions of all.
        everyone = text._replace(tokens=gather_padded(text.tokens), mask=gather_padded(text.mask))
        return gather(model.match_all(image, everyone))
