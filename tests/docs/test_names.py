"""Names in the documentation exist: keys, tags, files, modules, make targets, classes, functions and members."""

import importlib.util
import re
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fipo_megatron.config import Config, keys
from fipo_megatron.observe import metrics
from fipo_megatron.stress import limits
from tests.docs.package_names import Names
from tests.docs.pages import PAGES, ROOT, blocks, spans

KEYS = frozenset(keys())
SECTIONS = tuple(entry.name for entry in fields(Config) if is_dataclass(entry.default_factory))
PASSED_ON = ("actor.transformer", "actor.ddp", "actor.megatron_optimizer", "rollout.sglang")
"""Keys below these are passed to other packages by name."""
TAGS = tuple(re.sub(r"\{\w+\}", "*", metric.tag) for metric in (*metrics.METRICS, *metrics.HISTOGRAMS, *metrics.TEXTS))

LIMITS = frozenset(limits.METRICS)
"""Metrics of ``fipo stress`` that a budget can limit."""

ALLOWED = {
    "actor.log_probs(plan)": "a method of MegatronActor",
    "actor.offloaded()": "a method of MegatronActor",
    "actor.skipped_steps": "an attribute of MegatronActor",
    "amplify.json": "a file of fipo evaluate",
}
"""Names that look like a key and are none, with the reason. An entry that nothing needs fails a test."""

FILES = frozenset(path.name for top in ("fipo_megatron", "tests") for path in (ROOT / top).rglob("*.py"))
"""Files that a page may name without their directory."""

OF_USERS = {
    *("build/", "checkpoints/", "rollouts/", "rollout/", "hf/", "tensorboard/", "trajectories/", "evaluations/"),
    *("data/aime-2024.parquet", "data/aime-2025.parquet", "evaluation/DATA_SET/"),
}
"""Files that a run writes or that a user has."""

WITHOUT_PATHS = {"upstream.md": "files of Megatron-Core", "decisions.md": "files that a design had"}
"""Pages with paths of other repositories."""

NAMES = Names.read(ROOT / "fipo_megatron")

OF_OTHERS = {
    "log_softmax(logits / temperature)": "torch",
    "function(response, ground_truth)": "the verifier of a user",
    "DistributedDataParallelConfig": "Megatron-Core",
    "TransformerConfig": "Megatron-Core",
    "ServerArgs": "SGLang",
    "RssAnon": "Linux",
    "NodeAddr": "Slurm",
    "KillWait": "Slurm",
}
"""Names of other packages that look like ours. An entry that nothing needs fails a test."""

_KEY = re.compile(rf"(?:{'|'.join(SECTIONS)})\.[a-z_][\w.]*(?:\(\w*\))?")
_TAG = re.compile(rf"(?:{'|'.join(metrics.GROUPS)})/[\w*{{}}/]+(?<!/)")
_PATH = re.compile(r"(?:[\w.-]+/)+(?:[\w.-]+)?|[\w-]+\.py")
_MODULE = re.compile(r"python3? -m ([\w.]+)")
_TARGET = re.compile(r"(?<![\w-])make ([a-z][a-z-]+)")


def names_of(page):
    """Returns the code spans, and the overrides and commands of fenced blocks."""
    found = spans(page)
    for block in blocks(page):
        found += re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[\w.]+(?==)", block.text)
    return found


def is_key(name):
    return name in KEYS | LIMITS or any(name.startswith(f"{section}.") for section in PASSED_ON)


def unknown_keys(names):
    """Returns the names that are neither keys nor allowed; reads `key=value` and `key = value` as well."""
    found = [re.split(r" ?[=≥≤<>] ?", word)[0] for name in names for word in name.split(" key=")[0].split()]
    candidates = [name for name in found if _KEY.fullmatch(name) and not name.endswith((".py", ".md", ".jsonl"))]
    return [name for name in candidates if not is_key(name) and name not in ALLOWED]


def unknown_tags(names):
    candidates = [name for name in names if _TAG.fullmatch(name)]
    patterns = [re.sub(r"\{\w+\}", "*", name) for name in candidates]
    return [
        name
        for name, pattern in zip(candidates, patterns, strict=True)
        if not any(fnmatchcase(tag, pattern) or fnmatchcase(pattern, tag) for tag in TAGS)
    ]


def unknown_paths(names):
    """Returns paths that are neither files of the repository nor, as `actor/fp8.py`, of the package."""
    roots = (ROOT, ROOT / "fipo_megatron", ROOT / "docs")
    tops = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    candidates = [name for name in names if _PATH.fullmatch(name) and not _TAG.fullmatch(name)]
    ours = [name for name in candidates if name.split("/")[0] in tops or name.endswith(".py")]
    return [name for name in ours if name not in FILES and not any((root / name).exists() for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_tags_exist(page):
    names = names_of(page)
    assert not unknown_keys(names)
    assert not unknown_tags(names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WITHOUT_PATHS], ids=lambda page: page.name)
def test_files_exist(page):
    written = {block.title for block in blocks(page)} | OF_USERS
    assert not [name for name in unknown_paths(spans(page)) if name not in written and not name.startswith("build/")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_classes_functions_and_members_exist(page):
    assert not NAMES.unknown(spans(page), elsewhere={*OF_OTHERS, *LIMITS}, sections=SECTIONS)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_modules_and_make_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*spans(page), *(block.text for block in blocks(page))])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not set(_TARGET.findall(code)) - targets
    modules = {name.rstrip(".") for name in _MODULE.findall(text)} - {"pytest"}
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


def test_every_exception_is_needed():
    names = [name for page in PAGES for name in names_of(page)]
    words = {re.split(r" ?= ?", word)[0] for name in names for word in [name, *name.split()]}
    assert not [name for name in ALLOWED if name not in words], "remove it"
    assert not [name for name in ALLOWED if is_key(name)], "it exists now"
    ours = set(NAMES.unknown(words | {name for page in PAGES for name in spans(page)}, sections=SECTIONS))
    assert not OF_OTHERS.keys() - ours, "remove it, or it exists now"


def test_what_does_not_exist_is_noticed():
    assert unknown_keys(
        ["rollout.top_q", "actor.optimizer.lr", "checkpoint.resume=never", "rollout.sglang.tp_size"]
    ) == ["rollout.top_q"]
    assert unknown_keys(["run.resumes=auto", "algorithm.kind = fipo"]) == ["run.resumes"]
    assert unknown_tags(["policy/loss", "policy/los", "evaluation/{data_set}/avg", "policy/ratio_*"]) == ["policy/los"]
    assert unknown_paths(["actor/fp8.py", "actor/fp9.py", "tests/gpu/", "time/step", "and/or"]) == ["actor/fp9.py"]
    assert Path(ROOT / "mkdocs.yml").exists()


def test_a_wrong_class_function_or_member_is_noticed(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "sampler.py").write_text(
        "from torch import nn\n\n"
        "LIMIT: int = 3\n\n\n"
        "def open_sampler():\n    pass\n\n\n"
        "class Base:\n    def close(self):\n        self.closed = True\n\n\n"
        "class GroupSampler(Base):\n    size: int\n\n    def step(self, count):\n        pass\n\n\n"
        "class Model(nn.Module):\n    pass\n"
    )
    right = ["GroupSampler.step(next_prompts)", "GroupSampler.closed", "GroupSampler.size", "open_sampler()", "step()"]
    right += [
        "sampler.GroupSampler(3).close()",
        "package.sampler.LIMIT",
        "Model.forward",
        "sampler.py",
        "TransformerConfig",
    ]
    wrong = ["GroupSampler.steps", "open_sampler_of()", "sampler.open", "GroupSamplers", "package.sampler.Base.size"]
    words = ["a word", "word", "key=value", "torch.nn.Module"]
    names = Names.read(package)
    assert names.unknown([*right, *wrong, *words], elsewhere=["TransformerConfig"]) == wrong
