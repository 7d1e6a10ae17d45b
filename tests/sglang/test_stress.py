"""``fipo stress`` with a real server that runs already: forced lengths, its load, and the drift from the actor."""

import json

import pytest
import yaml

from tests.processes import run_ranks
from tests.sglang.test_client import with_client
from tests.stress.tiny_run import SETTINGS

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
LENGTH, PROMPT, RESPONSES = 640, 32, 4


def test_responses_of_forced_length_and_their_drift(server, model_path, tmp_path):
    weights = {"model_path": str(model_path), "weight_version": "0"}  # other tests have sent theirs
    with_client(server, lambda client: client.control("/update_weights_from_disk", weights))
    rollout = SETTINGS["rollout"] | {"engine": "sglang", "servers": {"urls": [server.url]}}
    settings = SETTINGS | {"model": {"path": str(model_path)}, "rollout": rollout}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    options = ("--parts", "engine,drift", "--lengths", str(LENGTH), "--output", str(tmp_path))
    sizes = ("--prompt-tokens", str(PROMPT), "--responses", str(RESPONSES))
    environment = {"FIPO_SGLANG_API_KEY": "secret"}
    arguments = (str(tmp_path / "run.yaml"), *options, *sizes)
    done = run_ranks("tests.stress.stress_worker", *arguments, ranks=None, environment=environment)
    assert done.code == 0, done.output
    found = json.loads((tmp_path / "stress.json").read_text())
    [engine], [drift] = found["engine"], found["drift"]
    assert engine["failures"] == []
    assert engine["response_tokens"] == [LENGTH - PROMPT] * RESPONSES
    assert engine["tokens"] == RESPONSES * (LENGTH - PROMPT)
    assert engine["metrics"]["retractions"] == engine["lost_servers"] == 0
    cache = engine["kv_cache"]
    assert cache["capacity_tokens"] == 32768
    assert RESPONSES * PROMPT < cache["peak_tokens"] <= RESPONSES * LENGTH
    assert cache["peak_running"] == RESPONSES
    for part in engine["seconds_by_position"]:
        assert 0 <= part["from"] < part["to"] <= LENGTH - PROMPT
        assert part["seconds_per_token"] > 0
    assert drift["responses"] == RESPONSES
    assert 0 < drift["metrics"]["mean"] < drift["metrics"]["max"] < 1e-4
    assert drift["metrics"]["future_kl_max"] < 1e-3
