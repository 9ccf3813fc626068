"""What ALBEF remembers from step to step: its momentum model, its queues and its ramp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_albef import CPU, IDS, apart, fill, make, some
from torch import Tensor

from vicvlm_cli.objectives.albef import ALBEF
from vicvlm_cli.objectives.ranks import Noise


def test_queues_count_after_their_steps() -> None:
    waiting, at_once = make(queue_steps=2), make()
    for objective in (waiting, at_once):
        objective.train()
    for step in range(3):
        batch = some(IDS, step)
        first, second = (o(batch, Noise(0, step, CPU), {"itc"}) for o in (waiting, at_once))
        alike = step in (0, 2)  # nothing has been pushed yet, and both count
        for early, late in zip(first, second, strict=True):
            assert torch.allclose(early["itc"], late["itc"]) == alike
        for objective in (waiting, at_once):
            objective.after_step()
    assert int(waiting.image_queue.pushed) == int(at_once.image_queue.pushed) > 0


def test_the_ramp() -> None:
    objective = make(alpha=0.4, alpha_steps=4)
    seen = []
    for _ in range(6):
        seen.append(objective.alpha)
        objective.after_step()
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert make(alpha=0.4, alpha_steps=0).alpha == 0.4
    again = make(alpha=0.4, alpha_steps=4)
    objective.steps.fill_(3)
    again.load_state_dict(objective.state_dict())  # as a resumed run does
    assert again.alpha == pytest.approx(0.3)


@pytest.mark.parametrize(("alpha", "passes"), [(0.0, [1, 1, 0]), (0.4, [1, 2, 1])])
def test_the_momentum_model_is_asked_no_more_than_counts(alpha: float, passes: list[int]) -> None:
    objective = make(alpha=alpha)
    model = objective.target.module
    made = [0, 0, 0]
    for i, module in enumerate((model.image_encoder, model.text_encoder, model.fusion)):

        def count(*_: Any, i: int = i) -> None:
            made[i] += 1

        module.register_forward_hook(count)
    objective(some(IDS), Noise(0, 0, CPU), {"mlm"})
    assert made == passes


def test_the_queues_get_the_momentum_features_of_all_batches_of_a_step() -> None:
    objective = apart(make())
    model = objective.target.module
    expected: list[list[Tensor]] = [[], []]
    batches = [some([4, 5, 4], 1), some([6, 7, 8], 2)]
    with torch.no_grad():
        for batch in batches:
            expected[0].append(model.encode_image(batch.image).features)
            text = model.encode_text(batch.input_ids, batch.attention_mask)
            expected[1].append(text.features)
    for batch in batches:  # gradients accumulate: one step of two batches
        objective(batch, Noise(0, 0, CPU), set())
        assert len(objective.image_queue.filled()[1]) == 0  # nor do they meet each other
    objective.after_step()
    queues = (objective.image_queue, objective.text_queue)
    for queue, features in zip(queues, expected, strict=True):
        held, image_id = queue.filled()
        torch.testing.assert_close(held, torch.cat(features))
        assert image_id.tolist() == [4, 5, 4, 6, 7, 8]
    objective.after_step()
    assert int(objective.image_queue.pushed) == 6  # each batch once


def test_the_momentum_model_follows() -> None:
    objective = make(ema_decay=0.75)
    pairs = [(objective.target, objective.model), (objective.head_target, objective.mlm_head)]
    before = [[p.clone() for p in ema.parameters()] for ema, _ in pairs]
    for _, online in pairs:
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(1.0)
    objective.after_step()
    for (ema, online), old in zip(pairs, before, strict=True):
        names = [name for name, _ in online.named_parameters()]
        for name, a, b in zip(names, old, ema.parameters(), strict=True):
            if name != "logit_scale":  # the online one was bounded before
                torch.testing.assert_close(b, a + 0.25, rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_moves_in_evaluation() -> None:
    objective = fill(make()).eval()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(0.01)
    objective(some(IDS), Noise(0, 0, CPU), set(ALBEF.LOSSES))
    objective.after_step()
    for name, value in objective.state_dict().items():
        if not name.startswith("model."):
            assert torch.equal(value, before[name]), name
    objective.train().after_step()
    assert int(objective.image_queue.pushed) == 6  # and nothing was kept for later
