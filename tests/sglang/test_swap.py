"""Tokens swapped between real servers of two models: the embedded engine's distribution, and the whole command."""

import asyncio
import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from fipo_megatron import cli
from fipo_megatron.rollout.sglang.client import SglangClient
from fipo_megatron.rollout.sglang.server import SglangServer
from fipo_megatron.rollout.sglang.swapping_engine import SwappingEngine
from tests.compare import delta_swap
from tests.runs import CONFIG
from tests.sglang import models
from tests.sglang.test_client import expected, request

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def second_path(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("sglang") / "second", seed=delta_swap.SEEDS[1])


@pytest.fixture(scope="module")
def second(spec, second_path):
    """A server of the second model; ``server`` has the primary one."""
    server = SglangServer(replace(spec, model_path=second_path, log=second_path.with_name("second.log")))
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture
def sampled(server, second):
    """Returns a function that answers requests, with tokens of the first model replaced by those of the second one."""

    def sample(requests, threshold, draft_tokens):
        async def run():
            clients = [
                SglangClient([one.url], context=models.CONTEXT, vocab=models.VOCAB, api_key="secret")
                for one in (server, second)
            ]
            engine = SwappingEngine(*(client.requests for client in clients), draft_tokens, threshold)
            try:
                return await asyncio.gather(*map(engine.generate, requests))
            finally:
                await asyncio.gather(*(client.close() for client in clients))

        return asyncio.run(run())

    return sample


def log_probs(request, found):
    """Returns the log-probs of a response under both models, by transformers in float64."""
    return [expected(models.model(seed=seed), request, found) for seed in delta_swap.SEEDS]


def test_tokens_have_the_closed_form_of_the_embedded_engine(sampled):
    """The same check as in ``tests/rollout/test_two_models.py``; stop tokens are among the replaced ones."""
    found = sampled(delta_swap.requests(1500), delta_swap.THRESHOLD, draft_tokens=2)
    delta_swap.check_distribution(found)


def test_delta_and_log_probs_are_those_of_transformers(sampled):
    """Drafts of 16 tokens are cut several times. A nucleus does not change the log-probs."""
    requests = [request(n, 40, top_p=0.9 if n >= 20 else 1.0) for n in range(24)]
    responses = sampled(requests, delta_swap.THRESHOLD, draft_tokens=16)
    delta_swap.check_selected(responses[:20], requests[:20])
    for one, found in zip(requests, responses, strict=True):
        primary, second = log_probs(one, found)
        chosen, delta = found.selected, found.quantities[:, 0]
        np.testing.assert_allclose(delta[~chosen], (second - primary)[~chosen], atol=1e-3, rtol=0)
        np.testing.assert_allclose(found.log_probs, np.where(chosen, second, primary), atol=1e-3, rtol=0)
        assert (chosen == (delta < delta_swap.THRESHOLD)).all()
        assert (found.changed <= found.selected).all()
        assert len(found.tokens) == 40
        assert chosen.sum() > 2  # of 18 expected
        assert np.abs(second - primary).max() > 1


@pytest.mark.parametrize("threshold", [None, -1e9])
def test_without_swaps_tokens_are_the_primary_models(sampled, threshold):
    requests = [request(n, 40) for n in range(6)]
    for one, found in zip(requests, sampled(requests, threshold, draft_tokens=16), strict=True):
        primary, second = log_probs(one, found)
        assert not found.selected.any()
        np.testing.assert_allclose(found.log_probs, primary, atol=1e-4, rtol=0)
        np.testing.assert_allclose(found.quantities[:, 0], second - primary, atol=1e-3, rtol=0)


def test_a_replaced_stop_token_does_not_end_the_response(sampled):
    """Half of the vocabulary ends a response, and every token of the primary model is replaced."""
    stops = tuple(range(models.VOCAB // 2))
    requests = [request(n, 30, stop_token_ids=stops) for n in range(100)]
    alone = sampled(requests, None, draft_tokens=8)
    swapped = sampled(requests, 1e9, draft_tokens=8)
    for found in (*alone, *swapped):
        ends = np.flatnonzero(np.isin(found.tokens, stops)).tolist()
        assert ends == ([len(found.tokens) - 1] if found.finish_reason == "stop" else [])
    assert all(found.selected.all() for found in swapped)
    going_on = sum(len(found.tokens) - 1 for found in swapped)
    assert going_on > 30, "100 are expected, half of them in the place of a stop token"


@pytest.mark.parametrize("start", [1, 20])
def test_log_probs_of_given_tokens(server, start):
    """SGLang 0.5.23 names the last token of the vocabulary 0 in its answer."""
    given = np.append(request(0, length=29).tokens, np.int32(models.VOCAB - 1))

    async def run():
        client = SglangClient([server.url], context=30, vocab=models.VOCAB, api_key="secret")
        try:
            return await client.requests.log_probs("a", "a", given, start)
        finally:
            await client.close()

    found = asyncio.run(run())
    with torch.no_grad():
        logits = models.model()(torch.from_numpy(given).long()[None]).logits[0].double()
    rows = torch.log_softmax(logits, -1)[np.arange(start - 1, 29), given[start:]]
    np.testing.assert_allclose(found, rows.numpy(), atol=1e-4, rtol=0)
    assert found.dtype == np.float32


@pytest.fixture
def swap(model_path, second_path, tmp_path, monkeypatch):
    """Returns a function that runs the command, and returns its exit code."""
    monkeypatch.setenv("FIPO_SGLANG_API_KEY", "secret")
    problems = [{"prompt": f"What is {n} plus five?", "answer": str(n + 5)} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    before = signal.getsignal(signal.SIGTERM)

    def swapped(*overrides):
        arguments = [
            *(f"compare.base={model_path}", f"compare.rl={second_path}", "compare.seeds=[1,2]"),
            *("data.chat_template=none", "run.evaluate_every=0", f"run.output={tmp_path}"),
            *(f"evaluation.files=[{tmp_path}/sums.jsonl]", "evaluation.samples_per_prompt=2"),
            *("rollout.max_response_tokens=24", "rollout.engine=sglang", "compare.select=[delta]"),
            *("reward.verifier=python:tests.train_verifiers.by_chance", "reward.truncated_is_wrong=false"),
            *("compare.share=[0.2]", "compare.draft_tokens=5"),
        ]
        return cli.main(["compare", "swap", str(CONFIG), *arguments, *overrides])

    yield swapped
    signal.signal(signal.SIGTERM, before)


def test_the_command_with_running_servers(server, second, swap, tmp_path, caplog):
    servers = [f"compare.base_urls=['{server.url}']", f"compare.rl_urls=['{second.url}']"]
    assert swap(*servers) == 0
    output = tmp_path / "swap-second"
    result = json.loads((output / "swap.json").read_text())
    assert result["engine"] == "sglang"
    assert [(curve["direction"], curve["selector"]) for curve in result["curves"]] == [
        ("base_to_rl", "delta"),
        ("rl_to_base", "delta"),
    ]
    for curve in result["curves"]:
        [point] = curve["points"]
        assert 0 < point["changed"] <= point["selected"] < 0.4  # a standard error of 0.03
        name = f"{curve['direction']}-delta-share0.2"
        rows = [
            json.loads(line)
            for seed in (1, 2)
            for line in (output / f"responses-{name}-seed{seed}.jsonl").read_text().splitlines()
        ]
        assert len(rows) == 24
        assert sum(len(row["selected"]) for row in rows) == round(point["selected"] * point["tokens"])
        assert all(value < point["threshold"] + 1e-3 for row in rows for value in row["quantity"])
    times = {file: file.stat().st_mtime_ns for file in (output / "points").iterdir()}
    assert swap(*servers, "compare.direction=base_to_rl", "compare.share=[0.2,0.4]") == 0
    assert {file: file.stat().st_mtime_ns for file in times} == times, "finished points were sampled again"
    assert len(list((output / "points").iterdir())) == len(times) + 4
    assert swap(f"compare.base_urls=['{second.url}']", f"compare.rl_urls=['{server.url}']", "compare.name=other") == 1
    assert f"compare.base_urls = {second.url}: serves " in caplog.text


def test_servers_that_cannot_be_started_are_one_error(swap, tmp_path, caplog):
    assert swap("rollout.servers.python=/nowhere/python") == 1
    assert "/nowhere/python: No such file or directory; `make sglang-env`" in caplog.text
