"""FP8 state between passes, on modules with the attributes of Transformer Engine's."""

from types import SimpleNamespace

import torch

from fipo_megatron.actor.fp8 import drop_weight_copies, frozen_scaling, scaling_state


class Scaled(torch.nn.Module):
    """A linear layer with the state of delayed scaling, created in the first pass like Transformer Engine's."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"recipe": "delayed"}
        self._fp8_workspaces = {"weight": torch.ones(3)}

    def forward(self, largest, update):
        for key in ("scaling_fwd", "scaling_bwd"):
            if key not in self.fp8_meta:
                self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))
            state = self.fp8_meta[key]
            state.amax_history[0].clamp_(min=largest)
            if update:
                state.scale.copy_(448 / state.amax_history.amax(0))
                state.amax_history.copy_(state.amax_history.roll(-1, 0))


def model():
    return torch.nn.Sequential(Scaled(), torch.nn.Linear(2, 2), torch.nn.Sequential(Scaled()))


def run(chunk, largest, update):
    for module in chunk.modules():
        if isinstance(module, Scaled):
            module(largest, update)


def test_a_frozen_pass_leaves_no_trace():
    chunk = model()
    run(chunk, 2.0, update=True)
    before = [tensor.clone() for tensor in scaling_state([chunk])]
    assert len(before) == 8
    with frozen_scaling([chunk]):
        run(chunk, 100.0, update=False)
        run(chunk, 200.0, update=True)
        assert not any(torch.equal(*pair) for pair in zip(before, scaling_state([chunk]), strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, scaling_state([chunk]), strict=True))


def test_state_made_in_a_frozen_pass_is_as_new():
    chunk = model()
    with frozen_scaling([chunk]):
        run(chunk, 100.0, update=True)
    scales, histories = scaling_state([chunk])[::2], scaling_state([chunk])[1::2]
    assert all(torch.equal(scale, torch.ones(3)) for scale in scales)
    assert not any(history.any() for history in histories)


def test_recipes_without_a_history_and_models_without_fp8_are_left_alone():
    chunk = model()
    chunk[0].fp8_meta["scaling_fwd"] = SimpleNamespace(recipe="blockwise")
    with frozen_scaling([chunk]):
        pass
    assert scaling_state([chunk, torch.nn.Linear(2, 2)]) == []


def test_weight_copies_are_dropped():
    chunk = model()
    drop_weight_copies([chunk])
    assert chunk[0]._fp8_workspaces == {}
