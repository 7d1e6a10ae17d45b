"""Leaders share the prompts of a step. The groups are those of one leader; tokens go to ranks that train on them."""

import asyncio
import json

import pytest
from torch.distributed import HashStore

from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.sampler import Sampler
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from tests.actor.models import random_model
from tests.distributed.launch import on_ranks
from tests.distributed.rollout_worker import SETTINGS, Prompts, describe, score

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_model("qwen3", 0, max_position_embeddings=256).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def results(path, tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    on_ranks("tests.distributed.rollout_worker", 2, str(path), str(directory))
    return {
        name: [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("DP2", "TP2")
    }


@pytest.fixture(scope="module")
def alone(path):
    """Two steps of one leader, which several leaders must reproduce."""

    async def run():
        sampler, prompts = Sampler(EmbeddedEngine(path), SETTINGS, score, StoreCoordinator(HashStore(), 0)), Prompts()
        return [await sampler.step(prompts, 0) for _ in range(2)]

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_the_same_groups_as_one_leader(name, results, alone):
    for step, expected in enumerate(alone):
        ranks = [result["steps"][step] for result in results[name]]
        assert ranks[0]["names"] == ranks[1]["names"]
        assert ranks[0]["rewards"] == ranks[1]["rewards"]
        assert ranks[0]["statistics"] == ranks[1]["statistics"] == dict(expected.statistics)
        whole = {t.name: describe(t) for group in expected.groups for t in group.trajectories}
        assert sorted(ranks[0]["names"]) == sorted(whole)
        for rank in ranks:
            for trajectory, found in rank["mine"].items():
                assert found == whole[trajectory]


def test_tokens_reach_only_the_ranks_that_train_on_them(results):
    for step in range(2):
        first, second = (result["steps"][step] for result in results["DP2"])
        assert not {*first["mine"]} & {*second["mine"]}
        assert sorted([*first["mine"], *second["mine"]]) == sorted(first["names"])
        assert first["sampled"] + second["sampled"] == 6
        assert min(first["sampled"], second["sampled"]) > 0
        first, second = (result["steps"][step] for result in results["TP2"])
        assert first["mine"] == second["mine"]
        assert sorted(first["mine"]) == sorted(first["names"])
        assert (first["sampled"], second["sampled"]) == (6, 0)


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_the_tail_is_aborted_on_all_leaders(name, results):
    first, second = (result["over"] for result in results[name])
    assert first == second
    groups = [prompt for records in first["records"] for prompt in records]
    assert len(groups) == len({*groups}) == 18
    assert sum(one.get("responses_aborted", 0) for one in first["statistics"]) > 0
    assert sum(one.get("responses_continued", 0) for one in first["statistics"]) > 0


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_a_rank_that_hears_late_misses_nothing(name, results):
    assert [result["ahead"] for result in results[name]] == [[[number] for number in range(8)]] * 2


@pytest.mark.parametrize("name", ["DP2", "TP2"])
def test_a_failure_anywhere_ends_the_step_everywhere(name, results):
    first, second = (result["failures"] for result in results[name])
    (broken, refused, exhausted, silent), (broken_too, refused_too, exhausted_too, silent_too) = first, second
    at = 1 if name == "DP2" else 0
    own, other = (broken_too, broken) if at else (broken, broken_too)
    assert own.startswith("EngineError: the weights were released")
    assert other.startswith(f"EngineError: rank {at}: EngineError: the weights were released")
    own, other = (refused_too, refused) if at else (refused, refused_too)
    assert own.startswith("PermanentEngineError: RequestError: request ")
    assert "do not fit into the model's context of 10" in own
    assert other.startswith(f"PermanentEngineError: rank {at}: RequestError: request ")
    assert exhausted == exhausted_too
    assert exhausted.startswith("SamplingExhaustedError: 0 of 6 groups after 3 batches")
    assert silent == "LostRankError: rank 1 has sent no heartbeat for 0.5 s; see its log"
    assert silent_too == "LostRankError: rank 0: LostRankError: rank 1 has sent no heartbeat for 0.5 s; see its log"
