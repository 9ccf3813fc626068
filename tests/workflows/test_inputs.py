"""What becomes of a batch before the objective gets it, in whole trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import BARE, QUIET

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.objectives.clip import CLIP
from vicvlm_cli.workflows.train import pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize("more", [0, 2])
def test_a_share_of_the_words_is_hidden_from_training(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    shares: list[float] = []
    real = CLIP.forward

    def forward(self: CLIP, batch: Batch, *rest: Any) -> Any:
        ids, mask = batch.input_ids, batch.attention_mask
        if more:
            assert batch.more_ids is not None and batch.more_mask is not None
            ids, mask = batch.more_ids, batch.more_mask
        assert batch.words is not None and not bool((batch.words == 4).any())
        words = mask & (ids != 2) & (ids != 3)  # but [CLS] and [SEP]
        shares.append(float((ids[words] == 4).float().mean()))  # [MASK]
        return real(self, batch, *rest)

    monkeypatch.setattr(CLIP, "forward", forward)
    settings = ["pretrain.objective=clip", "data.word_dropout=0.3", f"data.more_captions={more}"]
    settings.append("pretrain.losses.words.weight=0.5")  # of the words that there were
    pretrain(scenes, overrides=[*BARE, *settings], output=tmp_path / "run", progress=QUIET)
    assert len(shares) == 12
    assert sum(shares) / 12 == pytest.approx(0.3, abs=0.06)
