"""SCAN: a margin between pairs whose words and patches are compared by cross attention."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, ClassVar

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.model.late_interaction import LateInteraction
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.ranks import Noise, gather, gather_padded
from vicvlm_cli.objectives.retrieval import Losses
from vicvlm_cli.objectives.vsepp import VSEPP


class SCAN(VSEPP):
    """VSE++'s loss, warm start included, on stacked cross attention (SCAN, 1803.08024, eq. 8)."""

    MODEL = LateInteraction
    CACHES_CONTRAST = False  # what it compares is every word and patch, not features
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "stacked_attention"},
        "pretrain": {"losses": {"hinge": {}}},
        "finetune": {
            "objective": "scan",
            "losses": {"hinge": {}},
            "options": {"mean_steps": 0},
        },
    }

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """The hinge of the global batch, and its value where all similarities are equal."""
        model = self.model
        assert isinstance(model, LateInteraction)
        image = model.encode_image(batch.image, batch.begun)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        assert text.mask is not None
        # Each process compares its own pictures with the captions of all.
        everyone = text._replace(tokens=gather_padded(text.tokens), mask=gather_padded(text.mask))
        similarity = gather(model.match_all(image, everyone))  # [G, G]
        loss, trivial = self.hinge(similarity, gather(batch.image_id))
        return {"hinge": loss}, {"hinge": trivial}
