"""Measures the drift of made-up responses in layouts of two ranks: ``main RUN.yaml OUT.json``."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.hf_weights import load_hf
from fipo_megatron.data.trajectory import Trajectory
from fipo_megatron.stress.engine_drift import measure_drift
from fipo_megatron.stress.stress_settings import StressOptions, StressSettings, read_settings
from tests.sglang import models

LENGTH, PROMPT = 96, 16
OFFSET = 0.25
LAYOUTS = {"CP2": "context_parallel", "PP2": "pipeline_parallel", "TP2": "tensor_parallel", "DP2": ""}


def responses(settings: StressSettings) -> list[Trajectory]:
    """Returns responses whose log-probs are those of transformers; from the middle on, ``OFFSET`` is taken off."""
    model, found = models.model(), []
    for number in range(3):
        prompt = settings.prompt(LENGTH, number)
        size = LENGTH - PROMPT - 8 * number
        tokens = np.random.default_rng(number).integers(0, models.VOCAB, size).astype(np.int32)
        ids = torch.from_numpy(np.concatenate([prompt.tokens, tokens]).astype(np.int64))
        with torch.no_grad():
            every = torch.log_softmax(model(ids[None]).logits[0].double(), -1)[PROMPT - 1 : -1]
        log_probs = every.gather(1, ids[PROMPT:, None])[:, 0].numpy()
        log_probs[(LENGTH - PROMPT) // 2 :] -= OFFSET
        mask = np.ones(size, np.bool_)
        found.append(Trajectory(prompt, 0, tokens, log_probs.astype(np.float32), mask, advantage=1.0))
    return found


def main(config: str, out: str) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for name, size in LAYOUTS.items():
        overrides = (f"actor.parallel.{size}=2",) if size else ()
        options = StressOptions(config, overrides, (LENGTH,), prompt_tokens=PROMPT)
        settings = read_settings(options, os.environ)
        layout = parallel.initialize(settings.longest.actor.parallel, 1)
        architecture, path = settings.architecture, settings.longest.model.path
        actor = MegatronActor(
            settings.longest,
            architecture,
            layout,
            lambda chunks: load_hf(chunks, architecture, layout, path),  # noqa: B023 - called at once
        )
        found[name] = measure_drift(actor, settings, LENGTH, responses(settings))
        parallel.destroy()
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(found))
