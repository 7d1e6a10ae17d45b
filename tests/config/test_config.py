"""Presets hold the paper's numbers; every mistake is named, all at once, with the nearest valid key."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fipo_megatron.config import (
    ConfigError,
    as_dict,
    keys,
    load_config,
    notices,
)
from fipo_megatron.config.__main__ import main
from fipo_megatron.config.renamed_keys import RENAMED_KEYS

PRESETS = Path(__file__).parents[2] / "examples" / "configs"
LAYOUTS = PRESETS.parent / "layouts"
FIPO_32B = PRESETS / "fipo_qwen2.5_32b.yaml"


def value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config


def test_overrides_are_yaml_and_win():
    config = load_config(
        FIPO_32B,
        [
            "algorithm.half_life=.inf",
            "algorithm.weight_clip=[0.5,2]",
            "actor.optimizer.lr=3e-7",
            "seed=7",
            "model.path=a=b",
        ],
    )
    assert config.algorithm.half_life == math.inf
    assert config.algorithm.weight_clip == (0.5, 2.0)
    assert config.actor.optimizer.lr == 3e-7
    assert (config.seed, config.model.path) == (7, "a=b")
    assert load_config(FIPO_32B, ["algorithm.weight_clip=null"]).algorithm.weight_bounds == (0.0, 10.0)


def test_kind_sets_the_defaults_and_what_is_written_wins(tmp_path):
    bare = tmp_path / "bare.yaml"
    bare.write_text("seed: 1\n")
    grpo = load_config(bare, ["algorithm.kind=grpo"]).algorithm
    assert (grpo.aggregation, grpo.clip_high, grpo.kl_coef) == ("sequence_mean", 0.2, 0.04)
    assert (grpo.dual_clip, grpo.sequence_drop) == (math.inf, False)
    assert load_config(bare, ["algorithm.kind=grpo", "algorithm.kl_coef=0"]).algorithm.kl_coef == 0
    assert load_config(bare, ["algorithm.kind=dapo"]).algorithm.aggregation == "token_mean"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["algorithm.half_live=3"], ["algorithm.half_live = 3: unknown key; did you mean algorithm.half_life?"]),
        (["rollout.samples=3"], ["rollout.samples = 3: unknown key; did you mean rollout.samples_per_prompt?"]),
        (["zzz=1"], ["zzz = 1: unknown key; see the sections: run, model, algorithm, data,"]),
        (["rollout.top_p=2"], ["rollout.top_p = 2: must be less than or equal to 1"]),
        (
            ["rollout.top_p=0.9"],
            ["rollout.top_p = 0.9: must be 1 in training; tokens outside the nucleus are never dr"],
        ),
        (["rollout.samples_per_prompt=1.5"], ["rollout.samples_per_prompt = 1.5: must be a valid integer"]),
        (["algorithm.kind=gipo"], ["algorithm.kind = 'gipo': must be 'fipo', 'dapo', 'grpo' or 'sft'"]),
        (["algorithm.half_life=true"], ["algorithm.half_life = True: must be a valid number"]),
        (["rollout.samples_per_prompt='16'"], ["rollout.samples_per_prompt = '16': must be a valid integer"]),
        (["actor.optimizer.lr=inf"], ["actor.optimizer.lr = inf: must be a finite number"]),
        (["seed=-1"], ["seed = -1: must be greater than or equal to 0"]),
        (
            ["algorithm.half_life=0", "algorithm.clip_low=2"],
            ["algorithm.half_life: must be > 0 tokens", "algorithm.clip_low: must be in [0, 1], got 2"],
        ),
        (
            ["algorithm.dual_clip=1"],
            ["algorithm.dual_clip: must be > 1 + clip_high = 1.28 and at most 1e+09, or inf for no cap, got 1"],
        ),
        (["actor.optimizer=7"], ["actor.optimizer = 7: must be an object"]),
        (["algorithm.half_live=3", "seed=x"], ["algorithm.half_live = 3", "seed = 'x': must be a valid integer"]),
        (
            ["rollout.prompts_per_step=64"],
            ["actor.prompts_per_mini_batch = 64: one update per rollout step makes FIPO inert"],
        ),
        (
            ["rollout.prompts_per_step=32", "rollout.samples_per_prompt=1"],
            ["actor.prompts_per_mini_batch = 64: must be at most rollout.prompts_per_step = 32", "must be at least 2"],
        ),
        (
            ["rollout.max_response_tokens=40000"],
            ["actor.token_budget = 32768: must be at least", "multiple of 1: 42048"],
        ),
        (
            [
                "actor.token_budget=22529",
                "rollout.max_response_tokens=20481",
                "actor.parallel={context_parallel: 4, tensor_parallel: 2, sequence_parallel: true}",
            ],
            ["= 22529, padded for actor.parallel and actor.fp8 to a multiple of 8: 22536"],
        ),
        (["rollout.max_response_tokens=1000"], ["reward.overlong_buffer_tokens = 4096: must be at most"]),
        (
            ["rollout.servers={router: 'http://r', colocated: true}"],
            [
                "rollout.servers.router = http://r: needs rollout.servers.urls",
                "rollout.servers.sync = distributed: must be tensor or disk with rollout.servers.colocated",
            ],
        ),
        (
            ["rollout.overlap=true", "rollout.servers={colocated: true, sync: tensor}"],
            ["rollout.overlap = True: needs rollout.max_staleness", "must be false with rollout.servers.colocated"],
        ),
        (["rollout.sglang={api_key: secret}"], ["rollout.sglang.api_key: must be in the environment variable that"]),
        (
            ["rollout.sglang={dp_size: 2, pp_size: 4, nnodes: 2}"],
            [
                "rollout.sglang.dp_size = 2: must be 1 for servers that the run starts; rollout.servers.per_host",
                "rollout.sglang.pp_size = 4: must be 1",
                "rollout.sglang.nnodes = 2: must be 1",
            ],
        ),
        (["rollout.servers.urls=['host:3']"], ["rollout.servers.urls = host:3: must begin with http://"]),
        (["rollout.servers.urls=['http://h:70000']"], ["rollout.servers.urls = http://h:70000: must have a port from"]),
        (["rollout.servers.urls=['http://h:0']"], ["rollout.servers.urls = http://h:0: must have a port from"]),
        (["rollout.servers.urls=['http://h:port']"], ["rollout.servers.urls = http://h:port: must have a port from"]),
        (["rollout.servers.urls=['http://:80']"], ["rollout.servers.urls = http://:80: must name a host"]),
        (["rollout.servers.urls=['http://[::1']"], ["rollout.servers.urls = http://[::1: must have a port"]),
        (
            ["rollout.engine=embedded", "rollout.servers.colocated=true", "rollout.embedded_slots=20"],
            ["rollout.embedded_slots = 20: must be a multiple of 16"],
        ),
        (["run.replay=a", "run.rollout_only=true"], ["run.replay = a: cannot be combined with run.rollout_only"]),
        (["run.replay=a", "algorithm.kind=sft"], ["run.replay = a: must be null with algorithm.kind = sft"]),
        (
            ["health.action=roll_back", "run.replay=a", "observe.trajectory_mib=3"],
            ["health.action = roll_back: must be off, warn or stop", "observe.trajectory_mib = 3: must be at least"],
        ),
        (["run.steps=3", "run.profile=[2, 3]"], ["run.profile: step 3 must be below run.steps = 3"]),
        (["run.evaluate_every=3", "evaluation.files=[]"], ["run.evaluate_every = 3: needs evaluation.files"]),
        (["algorithm.half_life"], ["override 'algorithm.half_life': expected key=value"]),
        (["algorithm.weight_clip=[1"], ["override 'algorithm.weight_clip=[1': the value is not valid YAML"]),
    ],
)
def test_every_mistake_is_named(overrides, lines):
    with pytest.raises(ConfigError) as caught:
        load_config(FIPO_32B, overrides)
    for line in lines:
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("- 1\n", "expected a mapping of keys at the top level, got list"),
        ("seed: [1\n", "not valid YAML"),
        ("base: other.yaml\n", "name each other in a circle"),
    ],
)
def test_broken_files_are_explained(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("base: run.yaml\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"seed={2**70}", f"seed = {2**70}: must be less than"),
        ("reward.verifier_memory_mib=100000000000000", "must be less than or equal to 2147483647"),
        ("reward.verifier_memory_mib=1e14", "reward.verifier_memory_mib = 100000000000000.0: must be"),
        ("reward.verifier_memory_mib=1", "reward.verifier_memory_mib = 1: must be greater than or equal to 256"),
        ("run.steps=1e30", "run.steps = 1e+30: must be"),
        (f"run.steps={10**30}", f"run.steps = {10**30}: must be less than or equal to"),
        ("rollout.silence_seconds=1", "rollout.silence_seconds = 1: must be greater than or equal to 5"),
        ("rollout.silence_seconds=1e300", "rollout.silence_seconds = 1e+300: must be less than or equal to"),
        ("run.output='\"a\\0b\"'", r"run.output = 'a\x00b': holds a null byte"),
        ("model.path='\"a\\0b\"'", r"model.path = 'a\x00b': holds a null byte"),
        ("data.files=[a, '\"a\\0b\"']", r"data.files.1 = 'a\x00b': holds a null byte"),
        ("run.output='\"\\ud800\"'", r"run.output = '\ud800': holds a lone surrogate"),
        ("rollout.sglang={1: 2}", "rollout.sglang.1: the key 1 is not text"),
        ("rollout.sglang=&a [*a]", "nested too deeply, or in itself"),
        ("rollout.sglang=" + "[" * 5000, "nested too deeply"),
        ("seed=2024-13-45", "the value is not valid YAML: month must be in 1..12"),
        ("algorithm.weight_max=1e308", "algorithm.weight_max: must be > 0 and at most 1e+09, got 1e+308"),
        ("algorithm.shift_clamp=1e308", "algorithm.shift_clamp: must be > 0 and at most 1e+09, or inf"),
        ("algorithm.importance_cap=1e308", "algorithm.importance_cap: must be > 0 and at most 1e+09, or null"),
        ("algorithm.advantage_epsilon=1e308", "algorithm.advantage_epsilon = 1e+308: must be less than"),
    ],
)
def test_values_out_of_all_proportion_are_refused(override, message):
    key, _, value = override.partition("=")
    override = f"{key}={value.replace(chr(39), '') if chr(92) in value else value}"
    with pytest.raises(ConfigError) as caught:
        load_config(FIPO_32B, [override])
    assert message in str(caught.value)


def test_sft_has_no_importance_cap():
    sft = ["algorithm.kind=sft", "actor.prompts_per_mini_batch=64", "run.evaluate_every=0"]
    with pytest.raises(ConfigError, match=r"algorithm.importance_cap = 2: must be null with algorithm.kind = sft"):
        load_config(FIPO_32B, [*sft, "algorithm.importance_cap=2"])
    assert load_config(FIPO_32B, [*sft, "rollout.max_staleness=1"]).algorithm.importance_cap is None


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9\n")
    for path, message in ((tmp_path, "cannot be read"), (tmp_path / "none.yaml", "cannot be read: No such file")):
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "latin.yaml")


def test_empty_sections_anchors_and_numbers_as_people_write_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm:\nactor:\n  optimizer: &o {lr: 2e-6}\n  ddp: {<<: *o, bucket_size: 3}\n")
    config = load_config(file, ["algorithm.half_life=inf", "algorithm.dual_clip=1e1"])
    assert config.actor.optimizer.lr == 2e-6
    assert config.actor.ddp == {"lr": 2e-6, "bucket_size": 3}
    assert (config.algorithm.half_life, config.algorithm.dual_clip) == (math.inf, 10.0)


def test_importance_is_corrected_where_tokens_may_be_of_older_weights():
    assert load_config(FIPO_32B).algorithm.importance_cap is None
    stale = ["rollout.max_staleness=1"]
    assert load_config(FIPO_32B, stale).algorithm.importance_cap == 2.0
    assert load_config(FIPO_32B, [*stale, "algorithm.importance_cap=5"]).algorithm.importance_cap == 5.0
    for cap in ("2", "5"):
        found = notices(load_config(FIPO_32B, [*stale, f"algorithm.importance_cap={cap}"]))
        assert any(f"algorithm.importance_cap = {cap} is in effect; its default is 2 with" in one for one in found)
    assert not any("importance_cap" in one for one in notices(load_config(FIPO_32B)))
    off = load_config(FIPO_32B, [*stale, "algorithm.importance_cap=null"])
    assert off.algorithm.importance_cap is None
    assert any("max_staleness = 1 without algorithm.importance_cap" in notice for notice in notices(off))


def test_oversampling_that_drops_long_responses_is_told():
    drops = "rollout.over_sampling = 2 with rollout.max_staleness = {} learns from short responses more often"
    for overrides, least in (
        (["rollout.max_staleness=0"], 1),
        (["rollout.max_staleness=1", "rollout.overlap=true"], 2),
    ):
        found = " ".join(notices(load_config(FIPO_32B, ["rollout.over_sampling=2", *overrides])))
        assert drops.format(least - 1) in found
        assert f"rollout.max_staleness of at least {least} carries both over" in found
        enough = [*overrides, f"rollout.max_staleness={least}"]
        assert drops[:20] not in " ".join(notices(load_config(FIPO_32B, ["rollout.over_sampling=2", *enough])))
    assert "over_sampling" not in " ".join(notices(load_config(FIPO_32B, ["rollout.max_staleness=0"])))


MOVED = {
    "run.save_every = 20: moved; it is checkpoint.save_every now": "run.save_every=20",
    "run.async_save = False: moved; it is checkpoint.async_save now": "run.async_save=false",
    "run.keep_last = 2: moved; it is checkpoint.keep_last now": "run.keep_last=2",
    "run.keep_best = None: moved; it is checkpoint.keep_best now": "run.keep_best=null",
    "run.optimizer_sharding = 'x': moved; it is checkpoint.optimizer_sharding now": "run.optimizer_sharding=x",
    "run.export_every = 0: moved; it is checkpoint.export_every now": "run.export_every=0",
    "run.resume = 'never': moved; it is checkpoint.resume now": "run.resume=never",
}


def test_moved_keys_are_named_with_their_new_place_beside_all_other_problems():
    with pytest.raises(ConfigError) as caught:
        load_config(FIPO_32B, [*MOVED.values(), "seed=-1", "rollout.samples=1"])
    assert set(MOVED) < set(map(str.strip, str(caught.value).splitlines()))
    assert "9 problem(s)" in str(caught.value)
    assert {key.old for key in RENAMED_KEYS if key.kind is None} == {one.partition("=")[0] for one in MOVED.values()}


def test_renamed_keys_exist_under_their_new_name_and_not_under_the_old_one():
    assert {key.new for key in RENAMED_KEYS} <= set(keys())
    assert not {key.old for key in RENAMED_KEYS if key.kind is None} & set(keys())


def test_moved_keys_of_a_base_file_are_found(tmp_path):
    (tmp_path / "base.yaml").write_text("run: {save_every: 3}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nrun: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"run\.save_every = 3: moved; it is checkpoint\.save_every now"):
        load_config(tmp_path / "run.yaml")


def test_the_batch_of_sft_is_not_that_of_rollouts(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("algorithm: {kind: sft}\nrollout: {prompts_per_step: 192}\nsft: {examples_per_step: 64}\n")
    line = "rollout.prompts_per_step = 192: has no effect with algorithm.kind = sft; it is sft.examples_per_step now"
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert line in str(caught.value)
    assert load_config(file, ["algorithm.kind=dapo"]).groups_per_step == 192
    with pytest.raises(ConfigError, match=r"rollout\.prompts_per_step = 'x': has no effect"):
        load_config(FIPO_32B, ["algorithm.kind=sft", "rollout.prompts_per_step=x"])


def test_a_complete_configuration_of_sft_loads(tmp_path):
    config = load_config(FIPO_32B, ["algorithm.kind=sft", "sft.examples_per_step=64"])
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(as_dict(config)))
    assert load_config(tmp_path / "printed.yaml") == config
    assert config.groups_per_step == 64


def test_inert_fipo_can_be_allowed_and_dapo_needs_no_leave():
    one_update = ["rollout.prompts_per_step=64"]
    assert load_config(FIPO_32B, [*one_update, "algorithm.allow_inert=true"]).updates_per_step == 1
    assert load_config(FIPO_32B, [*one_update, "algorithm.kind=dapo"]).updates_per_step == 1


def test_nucleus_sampling_can_be_allowed_and_is_free_in_evaluation():
    assert load_config(FIPO_32B, ["evaluation.top_p=0.5"]).evaluation.top_p == 0.5
    allowed = load_config(FIPO_32B, ["rollout.top_p=0.9", "rollout.allow_top_p=true"])
    assert any("rollout.top_p = 0.9: tokens outside the nucleus" in notice for notice in notices(allowed))
    sft = load_config(FIPO_32B, ["algorithm.kind=sft", "rollout.top_p=0.9"])
    assert not any("top_p" in notice for notice in notices(sft))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["algorithm.dual_clip=5"], []),
        (["algorithm.safety_threshold=12"], ["algorithm.safety_threshold = 12 has no effect on the gradient"]),
        (["algorithm.safety_threshold=3"], []),
        (["algorithm.safety_threshold=3", "algorithm.weight_clip=[1.1,1.2]"], ["does not contain 1"]),
        (
            ["algorithm.kind=grpo"],
            ["clip_high = 0.28: grpo has 0.2", "dual_clip = 10.0: grpo has inf", "kl_coef = 0.0: grpo has 0.04"],
        ),
        (["rollout.prompts_per_step=100", "algorithm.safety_threshold=3"], ["the last update sees 36 prompts"]),
        (["algorithm.kind=dapo", "algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1"], ["zero expected gradient"]),
    ],
)
def test_start_up_notices(overrides, expected):
    found = notices(load_config(FIPO_32B, overrides))
    assert len(found) == len(expected)
    assert all(part in notice for part, notice in zip(expected, found, strict=True))


@pytest.mark.processes
def test_command_prints_a_configuration_that_loads_to_the_same(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "fipo_megatron.config", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(str(FIPO_32B), "algorithm.half_life=.inf", "rollout.prompts_per_step=100")
    assert done.returncode == 0
    assert "note: actor.prompts_per_mini_batch = 64 does not divide" in done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(
        FIPO_32B, ["algorithm.half_life=.inf", "rollout.prompts_per_step=100"]
    )

    failed = run(str(FIPO_32B), "algorithm.half_live=3")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "did you mean algorithm.half_life?" in failed.stderr
    assert run("missing.yaml").returncode == 2


def test_command_prints_one_value(capsys):
    assert main([str(FIPO_32B), "--value", "run.output", "run.output=a b"]) == 0
    assert main([str(FIPO_32B), "rollout.top_p=1", "--value", "rollout.top_p"]) == 0
    assert capsys.readouterr().out == "a b\n1.0\n"
    assert main([str(FIPO_32B), "--value", "run.outptu"]) == 2
    assert "--value run.outptu: no such key" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["off", "Off"])
def test_off_is_a_word(text, tmp_path):
    """In YAML 1.1 it would be false, and no choice of any field."""
    file = tmp_path / "config.yaml"
    file.write_text("actor: {fp8: off}\ncheckpoint: {keep_best: false}")
    config = load_config(file, ["health.action=off", "data.shuffle=true"])
    assert (config.actor.fp8, config.health.action, config.checkpoint.keep_best, config.data.shuffle) == (
        *("off", "off"),
        *(False, True),
    )
    with pytest.raises(ConfigError, match=r"data.shuffle = '(off|Off)': must be a valid boolean"):
        load_config(file, [f"data.shuffle={text}"])
