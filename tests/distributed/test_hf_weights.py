"""Hugging Face weights in every layout: loaded exactly, streamed exactly, saved under one and loaded under the next."""

import json

import pytest

from tests.distributed import layout_cases
from tests.distributed.launch import on_ranks


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "count"), [(2, 21), (4, 8)])
def test_there_and_back_is_exact_in_every_layout(ranks, count, references, tmp_path):
    root = tmp_path / "models"
    for name in layout_cases.ARCHITECTURES:
        layout_cases.build_transformers_model(name).save_pretrained(root / name / "0", max_shard_size=100_000)
    on_ranks(
        "tests.distributed.hf_weights_worker", ranks, str(tmp_path / "results.json"), str(root), references=references
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == count
    for result in results:
        assert result.get("log_probs", 0.0) <= 1e-5, result
        assert result["buckets"][0] > result["buckets"][2] > result["buckets"][4] == 1, result
    firsts = {result["architecture"]: result["checkpoints"] for result in reversed(results)}
    assert {*firsts.values()} == {1}
    assert sum(result["checkpoints"] for result in results) == 2 * count - len(firsts)
    assert sum("log_probs" in result for result in results) == count - (ranks == 4)
    assert sum("failure" in result for result in results) == (5 if ranks == 2 else 0)
