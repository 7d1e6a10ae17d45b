"""The sampling parameters of a request to SGLang."""

from fipo_megatron.rollout.engine import SamplingParameters
from fipo_megatron.rollout.sglang.generation import sampling_fields


def test_a_server_cannot_add_a_filter():
    """SGLang fills in its ``preferred_sampling_params`` where a request has none (``tokenizer_manager.py``)."""
    preferred = {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05, "presence_penalty": 0.5}
    preferred |= {"frequency_penalty": 0.5, "logit_bias": {"5": 1.0}, "min_new_tokens": 3, "temperature": 0.6}
    merged = preferred | sampling_fields(SamplingParameters(1.0, 8))
    assert merged == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
        "min_new_tokens": 0,
        "max_new_tokens": 8,
        "stop_token_ids": [],
        "ignore_eos": True,
    }
