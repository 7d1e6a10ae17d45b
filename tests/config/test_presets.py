"""Presets hold the paper's numbers, layouts fit their ranks, and micro-batches the multiples of FP8."""

from pathlib import Path

import pytest
import yaml

from fipo_megatron.config import (
    ActorConfig,
    Config,
    ConfigError,
    ParallelConfig,
    keys,
    layout_conflicts,
    load_config,
    padding,
)

PRESETS = Path(__file__).parents[2] / "examples" / "configs"
LAYOUTS = PRESETS.parent / "layouts"
FIPO_32B = PRESETS / "fipo_qwen2.5_32b.yaml"

PAPER_32B = {
    "algorithm.kind": "fipo",
    "algorithm.half_life": 32,
    "algorithm.weight_clip": (1.0, 1.2),
    "algorithm.safety_threshold": 10,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.dual_clip": 10,
    "algorithm.aggregation": "token_mean",
    "algorithm.kl_coef": 0,
    "algorithm.entropy_coef": 0,
    "algorithm.dynamic_sampling": True,
    "algorithm.advantage_baseline": "group_normalised",
    "algorithm.advantage_epsilon": 1e-6,
    "rollout.prompts_per_step": 512,
    "rollout.samples_per_prompt": 16,
    "rollout.max_response_tokens": 20480,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.max_generation_batches": 10,
    "data.max_prompt_tokens": 2048,
    "actor.prompts_per_mini_batch": 64,
    "actor.optimizer.lr": 1e-6,
    "actor.optimizer.schedule": "constant",
    "actor.optimizer.warmup_steps": 10,
    "actor.optimizer.weight_decay": 0.1,
    "actor.optimizer.clip_grad": 1.0,
    "reward.overlong_buffer_tokens": 4096,
    "reward.overlong_penalty": 1.0,
    "evaluation.samples_per_prompt": 32,
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 0.7,
    "updates_per_step": 8,
}
PAPER_7B = PAPER_32B | {
    "algorithm.weight_clip": (0.8, 1.2),
    "algorithm.safety_threshold": 3,
    "rollout.samples_per_prompt": 32,
    "rollout.max_response_tokens": 10240,
    "reward.overlong_buffer_tokens": 2048,
}
AIME = {
    "evaluation.samples_per_prompt": 32,
    "evaluation.temperature": 1.0,
    "evaluation.top_p": 0.7,
    "evaluation.files": ("data/aime-2024.parquet", "data/aime-2025.parquet"),
    "rollout.max_response_tokens": 20480,
    "reward.verifier": "math",
}
DAPO_32B = PAPER_32B | {"algorithm.kind": "dapo", "actor.prompts_per_mini_batch": 32, "updates_per_step": 16}


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fipo_qwen2.5_32b", PAPER_32B),
        ("fipo_qwen2.5_7b_math", PAPER_7B),
        ("dapo_qwen2.5_32b", DAPO_32B),
        ("evaluate_aime", AIME),
    ],
)
def test_presets_hold_the_numbers_of_the_paper(preset, expected):
    config = load_config(PRESETS / f"{preset}.yaml")
    assert {key: value(config, key) for key in expected} == expected
    assert len(config.evaluation.files) == 2


@pytest.mark.parametrize(
    ("layout", "expected", "ranks", "servers_gpus"),
    [
        ("fipo_qwen2.5_32b_16_nodes", PAPER_32B, 64, 4),
        ("fipo_qwen2.5_32b_8_nodes", PAPER_32B, 64, 4),
        (
            "fipo_qwen2.5_32b_long_16_nodes",
            PAPER_32B | {"rollout.max_response_tokens": 40960, "reward.overlong_buffer_tokens": 8192},
            *(64, 4),
        ),
        ("fipo_qwen2.5_7b_math_1_node", PAPER_7B, 8, 2),
        ("fipo_qwen2.5_7b_math_2_nodes", PAPER_7B, 8, 1),
    ],
)
def test_layouts_fit_their_ranks_and_keep_the_numbers_of_the_paper(layout, expected, ranks, servers_gpus):
    config = load_config(LAYOUTS / f"{layout}.yaml")
    assert {key: value(config, key) for key in expected} == expected
    assert layout_conflicts(config.actor.parallel, ranks) == []
    assert config.rollout.sglang["tp_size"] == servers_gpus
    if config.rollout.servers.colocated:
        assert config.rollout.servers.per_host * servers_gpus == 8


def test_presets_name_only_keys_that_exist():
    def written(values, prefix=""):
        for key, entry in values.items():
            yield prefix + key
            if isinstance(entry, dict):
                yield from written(entry, f"{prefix}{key}.")

    for preset in PRESETS.glob("*.yaml"):
        assert set(written(yaml.safe_load(preset.read_text()))) - {"base"} <= set(keys(Config))


@pytest.mark.parametrize(
    ("fp8", "recipe", "tensor", "context", "per_rank", "in_all"),
    [
        ("off", "blockwise", 1, 1, 1, 1),
        ("off", "blockwise", 4, 1, 4, 4),
        ("off", "blockwise", 1, 2, 1, 4),
        ("e4m3", "blockwise", 1, 1, 128, 128),
        ("e4m3", "blockwise", 8, 2, 1024, 2048),
        ("hybrid", "tensorwise", 8, 1, 128, 128),
        ("hybrid", "delayed", 1, 4, 16, 64),
    ],
)
def test_tokens_of_a_micro_batch(fp8, recipe, tensor, context, per_rank, in_all):
    """FP8 needs its multiple in the part of every tensor-parallel rank, not only in all of them together."""
    layout = ParallelConfig(tensor_parallel=tensor, sequence_parallel=tensor > 1, context_parallel=context)
    actor = ActorConfig(fp8=fp8, fp8_recipe=recipe, parallel=layout)
    assert padding.token_multiple(actor) == per_rank
    assert padding.micro_batch_multiple(actor) == in_all


@pytest.mark.parametrize(("budget", "problem"), [(22_528, ""), (22_527, "multiple of 2048: 22528"), (20_480, "22528")])
def test_padding_for_fp8_is_part_of_the_token_budget(budget, problem):
    overrides = [
        *("data.max_prompt_tokens=2048", "rollout.max_response_tokens=20480", f"actor.token_budget={budget}"),
        *("actor.fp8=e4m3", "actor.parallel.tensor_parallel=8", "actor.parallel.sequence_parallel=true"),
        "actor.parallel.context_parallel=2",
    ]
    if not problem:
        assert load_config(FIPO_32B, overrides).actor.token_budget == budget
        return
    with pytest.raises(ConfigError, match=f"actor.token_budget = {budget}.*{problem}"):
        load_config(FIPO_32B, overrides)
