"""The ranges of pyproject.toml, the exact versions in constraints/ and what Megatron-Core asks for agree."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from fipo_megatron.actor.cpu_backend import MEGATRON_VERSIONS

ROOT = Path(__file__).parents[1]
TRANSFORMER_ENGINES = [f"{major}.{minor}.{patch}" for major in (1, 2, 3) for minor in range(40) for patch in range(3)]


def pinned(file):
    """Returns the exact versions of a file of constraints, by package."""
    lines = (ROOT / "constraints" / file).read_text().splitlines()
    pins = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pins}


def ranges(extra=None):
    """Returns the ranges of pyproject.toml, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = map(Requirement, project["optional-dependencies"][extra] if extra else project["dependencies"])
    return {canonicalize_name(each.name): each.specifier for each in found}


def test_transformer_engine_is_what_megatron_asks_for():
    """Every version that pyproject.toml allows is one that the installed megatron-core allows, in all of its extras."""
    asked = [Requirement(text) for text in metadata.requires("megatron-core")]
    asked = [each.specifier for each in asked if canonicalize_name(each.name) == "transformer-engine"]
    assert asked
    allowed = list(ranges("gpu")["transformer-engine"].filter(TRANSFORMER_ENGINES))
    assert allowed
    for specifier in asked:
        assert list(specifier.filter(allowed)) == allowed
        if specifier != SpecifierSet():  # 0.19.2 states no range
            assert list(specifier.filter(TRANSFORMER_ENGINES)) == allowed


def test_each_python_has_a_tested_megatron():
    pins = [pinned("python3.11.txt")["megatron-core"], pinned("python3.12.txt")["megatron-core"]]
    assert pins == list(MEGATRON_VERSIONS)
    assert metadata.version("megatron-core") == pins[sys.version_info >= (3, 12)]
    assert pinned("gpu-wheels.txt")["megatron-core"] in MEGATRON_VERSIONS


def test_only_tested_megatrons_are_allowed():
    minors = ["0.15.3", "0.16.0", "0.17.0", "0.17.1", "0.18.0", "0.18.2", "0.20.0"]
    assert list(ranges()["megatron-core"].filter([*minors, *MEGATRON_VERSIONS])) == list(MEGATRON_VERSIONS)


@pytest.mark.parametrize("python", ["python3.11.txt", "python3.12.txt"])
def test_exact_versions_are_in_the_ranges(python):
    common, own = pinned("cpu.txt"), pinned(python)
    assert not common.keys() & own.keys()
    exact = common | own
    for package, specifier in (ranges() | ranges("dev")).items():
        assert specifier.contains(exact[package]), package


def test_wheels_for_a_gpu_are_of_the_tested_versions():
    common = pinned("cpu.txt")
    wheels = {package: version for package, version in pinned("gpu-wheels.txt").items() if package != "megatron-core"}
    assert wheels == {package: common[package] for package in wheels}
