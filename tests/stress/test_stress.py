"""``fipo stress`` as a user runs it, with the embedded engine: results, files, the budget, and errors."""

import json
import re

import pytest

from fipo_megatron import cli
from fipo_megatron.plan.rank_memory import PassMemory, RankMemory
from fipo_megatron.stress.actor_passes import PassPeaks
from fipo_megatron.stress.stress_files import page
from fipo_megatron.stress.stress_picture import draw
from tests.processes import run_ranks
from tests.stress import drift_worker
from tests.stress.tiny_run import write_run

LENGTHS = (96, 256)
RESPONSES, PROMPT = 4, 16


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return str(write_run(tmp_path_factory.mktemp("stress")))


def stress(config, out, *options, ranks=None):
    """Runs the command on forked ranks; returns what it printed and the results."""
    arguments = (config, *options, "--prompt-tokens", str(PROMPT), "--output", str(out))
    done = run_ranks("tests.stress.stress_worker", *arguments, ranks=ranks)
    return done, json.loads((out / "stress.json").read_text())


@pytest.fixture(scope="module")
def one_rank(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    budget = out / "budget.yaml"
    budget.write_text("drift.p99: 1.0e-4\nengine.failures: 0\nactor.plan_error: {96: 0.05, 256: 0.05}\n")
    options = ("--lengths", ",".join(map(str, LENGTHS)), "--responses", str(RESPONSES), "--budget", str(budget))
    done, found = stress(config, out, *options)
    assert done.code == 0, done.output
    return done.output, found, out


@pytest.mark.processes
def test_the_engine_samples_every_response_to_its_length(one_rank):
    _, found, _ = one_rank
    assert [row["length"] for row in found["engine"]] == list(LENGTHS)
    for row in found["engine"]:
        assert row["response_tokens"] == [row["length"] - PROMPT] * RESPONSES
        assert row["tokens"] == RESPONSES * (row["length"] - PROMPT)
        assert row["metrics"]["tokens_per_second"] == pytest.approx(row["tokens"] / row["metrics"]["seconds"])
        assert (row["failures"], row["metrics"]["failures"], row["kv_cache"]) == ([], 0, None)
        [part] = row["seconds_by_position"]  # all responses end together: one mean over all positions
        assert (part["from"], part["to"]) == (0, row["length"] - PROMPT)
        assert part["seconds_per_token"] == pytest.approx(row["metrics"]["seconds"] / part["to"], rel=0.01)


@pytest.mark.processes
def test_the_engine_and_the_actor_agree_at_every_position(one_rank):
    _, found, _ = one_rank
    for row in found["drift"]:
        ends = [(part["from"], part["to"]) for part in row["positions"]]
        assert (ends[0][0], ends[-1][1], len(ends)) == (0, row["length"] - PROMPT, 8)
        assert [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]]
        assert 0 < row["metrics"]["mean"] < row["metrics"]["p99"] <= row["metrics"]["max"] < 1e-4
        assert row["metrics"]["max"] == max(part["max"] for part in row["positions"])
        assert 0 < row["metrics"]["future_kl_max"] < 1e-3


@pytest.mark.processes
def test_files_tables_and_the_kept_budget(one_rank):
    output, found, out = one_rank
    assert found["violations"] == []
    assert len(found["limits"]) == 4
    assert (out / "stress.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "stress.html").read_text()
    assert "<script" not in page
    assert page.count("<table>") == output.count("\n--") == 5
    for title in ("Engine (embedded)", "Actor on 1 rank(s): seconds", "Drift: engine against actor"):
        assert title in output
        assert title in page


@pytest.mark.distributed
def test_the_peak_follows_the_plan_and_falls_with_context_parallelism(one_rank, config, tmp_path):
    options = ("actor.parallel.context_parallel=2", "--parts", "actor,drift", "--lengths", "96,256", "--sequences", "2")
    done, found = stress(config, tmp_path, *options, ranks=2)
    assert done.code == 0, done.output
    for alone, shared in zip(one_rank[1]["actor"], found["actor"], strict=True):
        assert (alone["sequences"], shared["sequences"], shared["micro_batches"]) == (1, 2, 2)
        [single] = alone["ranks"]
        assert single["plan_error"] < 0.05
        assert [rank["rank"] for rank in shared["ranks"]] == [0, 1]
        for rank in shared["ranks"]:
            for name in ("log_probs", "update"):
                # gloo sends a copy of the gathered keys and values.
                assert 0.95 < rank["measured"][name] / rank["planned"][name] < 1.2
                assert rank["measured"][name] < single["measured"][name]
        assert min(shared["seconds"].values()) > 0
    assert "engine" not in found
    for row in found["drift"]:  # the first rank sampled, and the others were given its responses
        assert (row["responses"], row["metrics"]["future_kl_max"] < 1e-3) == (8, True)
        assert 0 < row["metrics"]["max"] < 1e-4


@pytest.mark.distributed
def test_drift_is_measured_at_its_position_under_every_layout(config, tmp_path):
    done = run_ranks("tests.stress.drift_worker", config, str(tmp_path / "out.json"), ranks=2)
    assert done.code == 0, done.output
    size = drift_worker.LENGTH - PROMPT
    for layout, row in json.loads((tmp_path / "out.json").read_text()).items():
        for part in row["positions"]:
            expected = 0.0 if part["to"] <= size // 2 else drift_worker.OFFSET
            for name in ("mean", "p99", "max"):
                assert part[name] == pytest.approx(expected, abs=2e-5), (layout, part)
        gamma = 2.0 ** (-1 / row["half_life"])
        # The first shifted token of the longest response sums all the shifts behind it; the one before sums less.
        largest = drift_worker.OFFSET * (1 - gamma ** (size // 2)) / (1 - gamma)
        assert row["metrics"]["future_kl_max"] == pytest.approx(largest, rel=1e-3), layout
        assert row["positions"][3]["future_kl_max"] == pytest.approx(largest * gamma, rel=1e-3), layout


@pytest.mark.processes
def test_a_violated_budget_ends_with_code_1_and_names_each_limit(config, tmp_path):
    budget = tmp_path / "budget.yaml"
    budget.write_text("engine.tokens_per_second: {96: 1.0e+9}\nengine.seconds: 1.0e+9\nengine.kv_usage: 0.5\n")
    options = ("--parts", "engine", "--lengths", "96", "--median", "40", "--budget", str(budget))
    done, found = stress(config, tmp_path, *options, "--responses", "16")
    assert done.code == 1
    speed, usage = found["violations"]
    assert speed.startswith("engine.tokens_per_second at 96 tokens: ")
    assert speed.endswith(", must be at least 1e+09")
    assert usage == "engine.kv_usage at 96 tokens: has no value; must be at most 0.5"
    assert done.output.splitlines()[-2:] == [f"budget: {speed}", f"budget: {usage}"]
    [row] = found["engine"]
    lengths = sorted(row["response_tokens"])
    assert lengths[7] <= 40 <= lengths[8]
    assert lengths[-1] == 80 > lengths[-3]  # cut at the length
    # Lengths differ: the times between the ends tell the pace by position.
    parts = row["seconds_by_position"]
    assert len(parts) > 3
    assert [part["from"] for part in parts[1:]] == [part["to"] for part in parts[:-1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--lengths", "96,4096"),
            "--lengths 4096: must be at most the model's context, max_position_embeddings = 2048",
        ),
        (("--lengths", "64,x"), "--lengths 64,x: expected different positive integers such as 16384,32768"),
        (("--lengths", "64,64"), "--lengths 64,64: expected different positive integers"),
        (("--lengths", "64"), "--lengths 64: must be above --prompt-tokens 64; the rest of a sequence is its response"),
        (
            ("--lengths", "96", "--median", "33"),
            "--median 33: must be at most 32, the longest response at --lengths 96",
        ),
        (("--lengths", "96", "--spread", "1"), "--spread 1: needs --median"),
        (("--lengths", "96", "--responses", "0"), "--responses 0: must be at least 1"),
        (("--parts", "engine,actors"), "--parts engine,actors: there is no part 'actors'; valid: engine, actor, drift"),
        (("model.path=missing", "--lengths", "96"), "model.path = 'missing': has no config.json"),
        (("model.path=missing", "--lengths", "96", "--parts", "actor"), "model.path = missing: has no config.json"),
        (("actor.parallel.context_parallel=2", "--lengths", "96"), "needs a multiple of 2 ranks, there are 1"),
        (("actor.parallel.tensor_parallels=2", "--lengths", "96"), "did you mean actor.parallel.tensor_parallel?"),
        (("actor.transformer={num_layer: 3}", "--lengths", "96"), "actor.transformer.num_layer"),
        (("--budget", "missing.yaml"), "--budget missing.yaml: cannot be read: "),
    ],
)
def test_mistakes_are_told_in_one_sentence_before_anything_starts(config, options, message, capsys, tmp_path):
    assert cli.main(["stress", config, *options, "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_supervised_fine_tuning_is_refused(tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text("algorithm: {kind: sft}\n")
    assert cli.main(["stress", str(path), "--lengths", "96"]) == 2
    assert capsys.readouterr().err.startswith("algorithm.kind = sft: must be fipo, dapo or grpo; ")


def test_a_server_that_cannot_be_reached_ends_the_command_without_a_traceback(config, capsys, tmp_path):
    overrides = ("rollout.engine=sglang", "rollout.servers.urls=['http://127.0.0.1:9']")
    options = ("--lengths", "96", "--parts", "engine", "--output", str(tmp_path))
    assert cli.main(["stress", config, *overrides, *options]) == 1
    shown = capsys.readouterr().err
    assert "fipo stress: EngineError: http://127.0.0.1:9" in shown
    assert "cannot be reached" in shown
    assert "Traceback" not in shown


def test_an_output_that_is_a_file_is_told_before_anything_starts(config, capsys, tmp_path):
    (tmp_path / "out").touch()
    assert cli.main(["stress", config, "--lengths", "96", "--output", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("fipo stress: FileExistsError")
    assert shown.count("\n") == 1


@pytest.mark.distributed
def test_an_engine_that_does_not_open_ends_every_rank(config, tmp_path):
    overrides = ("rollout.engine=sglang", "rollout.servers.urls=['http://127.0.0.1:9']")
    arguments = (config, *overrides, "actor.parallel.context_parallel=2", "--lengths", "96", "--output", str(tmp_path))
    done = run_ranks("tests.stress.stress_worker", *arguments, ranks=2)
    assert done.code == 1
    assert done.output.count("fipo stress: EngineError: http://127.0.0.1:9") == 1
    assert "Traceback" not in done.output


@pytest.mark.processes
def test_results_without_a_plan_are_shown(one_rank):
    data = json.loads(json.dumps(one_rank[1]))
    for row in data["actor"]:
        row["metrics"]["plan_error"] = row["ranks"][0]["planned"] = row["ranks"][0]["plan_error"] = None
    data["drift"][0] = {"length": 96, "failure": "no response of the engine", "metrics": {}}
    assert draw(data).startswith(b"\x89PNG")
    shown = page(data, None)
    assert re.search(r"<td>[\d.]+ / -</td>", shown)
    assert "<td>no response of the engine</td>" in shown


def test_the_peak_of_an_update_includes_the_optimizer_step():
    memory = RankMemory(1, 2, 3, 4, PassMemory(0, 5), PassMemory(0, 6), PassMemory(0, 7))
    assert PassPeaks.of(memory) == PassPeaks(kept=10, log_probs=15, update=17)
