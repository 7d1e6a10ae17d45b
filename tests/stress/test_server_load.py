"""The load of servers: a recorded answer, pace by position, and failures of single responses of a real HTTP server."""

import asyncio
import json
import os

import numpy as np
import pytest
import torch
from aiohttp import web

from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.server import free_port
from fipo_megatron.stress.forced_generation import force_responses
from fipo_megatron.stress.server_load import Interval, LoadMonitor, LoadSample, load_samples, seconds_by_position
from fipo_megatron.stress.stress_settings import StressOptions, read_settings
from tests.stress.tiny_run import write_run

# SGLang 0.5.23 with 8 requests; the fields that are read, and some that are not.
ANSWER = json.loads(
    '{"timestamp":"2026-11-26T10:49:13.691092+00:00","version":"0.5.23","num_accelerators":1,"loads":[{"timestamp":'
    '1795690152.1586697,"dp_rank":0,"num_running_reqs":8,"num_waiting_reqs":0,"num_used_tokens":78152,'
    '"num_total_tokens":78152,"max_total_num_tokens":140000,"max_running_requests":4096,"token_usage":0.5582}]}'
)


def test_the_recorded_answer():
    [sample] = load_samples("url", ANSWER)
    assert sample == LoadSample("url", 1795690152.1586697, running=8, waiting=0, used=78152, capacity=140000)


def test_pace_is_the_time_between_different_looks_of_the_server():
    monitor = LoadMonitor(None)
    looks = [(0.0, 4, 40), (0.0, 4, 40), (2.0, 4, 80), (2.0, 4, 80), (8.0, 4, 200), (9.0, 2, 110), (9.5, 2, 120)]
    for seconds, running, used in looks:
        monitor._add([LoadSample("url", 1000.0 + seconds, running, 0, used, 400)])
    assert len(monitor.samples) == 5
    # Prompts of 5 tokens. Between the third and the fourth look two responses ended: nothing can be said.
    assert monitor.intervals(5) == [Interval(5, 15, 2.0), Interval(15, 45, 6.0), Interval(50, 55, 0.5)]
    assert monitor.summary() == {
        "capacity_tokens": 400,
        "peak_tokens": 200,
        "peak_usage": 0.5,
        "peak_running": 4,
        "peak_waiting": 0,
    }


def test_intervals_count_for_the_part_in_which_their_middle_lies():
    found = seconds_by_position([Interval(0, 10, 1.0), Interval(10, 18, 2.0), Interval(18, 30, 3.0)], 40, parts=4)
    assert found == [
        {"from": 0, "to": 10, "seconds_per_token": 0.1},
        {"from": 10, "to": 18, "seconds_per_token": 0.25},
        {"from": 18, "to": 30, "seconds_per_token": 0.25},
    ]


def answered(body, tokens, reason="length", log_prob=-1.0, retractions=0):
    """Returns an answer to ``/generate`` in SGLang's form."""
    ids = list(range(tokens))
    meta = {
        "id": body["rid"],
        "finish_reason": {"type": reason},
        "output_token_logprobs": [[log_prob, token, None] for token in ids],
        "weight_versions": [{"start": 0, "version": "0"}],
        "num_retractions": retractions,
    }
    return web.json_response({"output_ids": ids, "meta_info": meta})


@pytest.fixture
def settings(tmp_path):
    options = StressOptions(str(write_run(tmp_path)), (), (32,), prompt_tokens=16, responses=5)
    return read_settings(options, os.environ)


def test_a_missing_gpu_of_the_engine_is_an_error_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    overrides = ("rollout.engine=embedded", "rollout.embedded_device=cuda")
    options = StressOptions(str(write_run(tmp_path)), overrides, (32,), prompt_tokens=16, responses=5)
    with pytest.raises(ValueError, match=r"^rollout\.embedded_device = cuda: torch finds no GPU .*; valid: cpu$"):
        read_settings(options, os.environ)


def test_a_failed_response_ends_no_other_and_is_counted_with_its_reason(settings):
    numbers = {tuple(settings.prompt(32, number).tokens.tolist()): number for number in range(5)}
    bodies = []

    async def generate(request):
        body = await request.json()
        bodies.append(body)
        match numbers[tuple(body["input_ids"])]:
            case 0:
                return answered(body, 16, retractions=2)
            case 1:
                return answered(body, 9, reason="stop")
            case 2:
                return answered(body, 4, reason="abort")
            case 3:
                return answered(body, 16, log_prob=0.5)
        return web.json_response({"error": {"message": "too long"}}, status=400)

    async def run():
        port = free_port("127.0.0.1")
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        client = SglangClient([f"http://127.0.0.1:{port}"], context=64, vocab=384)
        try:
            return await force_responses(client, settings, 32, lambda line: None)
        finally:
            await client.close()
            await runner.cleanup()

    found = asyncio.run(run())
    assert {one["reason"] for one in found.row["failures"]} == {
        "ended by stop after 9 of 16 tokens",
        "aborted after 4 tokens",
        "trajectory stress/32/3/0: behaviour_log_probs: must be <= 0, got 0.5 at token 0",
        next(one["reason"] for one in found.row["failures"] if "too long" in one["reason"]),
    }
    assert found.row["metrics"]["failures"] == 4
    assert found.row["metrics"]["retractions"] == 2
    assert found.row["tokens"] == 16 + 9 + 4 + 16
    assert found.row["kv_cache"] is None
    assert "/v1/loads" in found.row["kv_cache_problem"]
    [trajectory] = found.trajectories
    np.testing.assert_array_equal(trajectory.tokens, np.arange(16))
    assert {body["sampling_params"]["ignore_eos"] for body in bodies} == {True}
    assert {body["sampling_params"]["max_new_tokens"] for body in bodies} == {16}
