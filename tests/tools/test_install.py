"""The scripts in tools/install, and the Dockerfile that runs them. `make setup` and `make sglang-env` run two."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "tools" / "install"
SCRIPTS = sorted(path for path in INSTALL.glob("*.sh") if path.name != "common.sh")
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
    if line and not line.startswith("#")
]


def program(name):
    """Path of a linter in this environment or on this machine; skips the test without one."""
    here = Path(sys.prefix) / "bin" / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )


def arguments(name, instruction="RUN"):
    return [rest.split() for kind, rest in INSTRUCTIONS if kind == instruction and name in rest]


def pins(path):
    """Versions by normalised name of a file in constraints."""
    lines = [line for line in (ROOT / "constraints" / path).read_text().splitlines() if "==" in line]
    return {re.sub(r"[_.]", "-", name.lower()): version for name, version in (line.split("==") for line in lines)}


def test_shellcheck():
    done = run(program("shellcheck"), "-x", *INSTALL.glob("*.sh"), ROOT / ".ci" / "run")
    assert done.returncode == 0, done.stdout


def test_hadolint():
    done = run(program("hadolint"), "--config", ROOT / ".hadolint.yaml", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_describes_every_option(script):
    assert script.stat().st_mode & stat.S_IXUSR
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text()
    assert f"usage: {script.name}" in done.stdout
    (options,) = re.findall(r'^read_options "(.*?)"', text, re.M)
    described = re.findall(r"^  --([a-z-]+) ", done.stdout, re.M)
    assert described == options.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_unknown_and_missing_arguments_are_refused(script):
    done = run(script, "--no-such-option", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{script.name}: unknown argument --no-such-option; --help lists the options\n"
    option = re.findall(r'^read_options "([a-z-]+)', script.read_text(), re.M)[0]
    assert run(script, f"--{option}").stderr == f"{script.name}: --{option}: a value is missing\n"


@pytest.mark.parametrize("script", ["extensions.sh", "nccl.sh", "package.sh"])
def test_a_missing_environment_is_named(script, tmp_path):
    done = run(INSTALL / script, "--venv", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: --venv {tmp_path}: is no environment; make it with trainer.sh")


def test_the_compiler_must_be_that_of_torch(tmp_path):
    done = run(INSTALL / "extensions.sh", "--venv", sys.prefix, CUDA_HOME=tmp_path)
    assert done.returncode == 2
    assert "there is no CUDA compiler; CUDA_HOME must be the directory of CUDA" in done.stderr
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.1, V99.1.1'\n")
    compiler.chmod(0o755)
    done = run(INSTALL / "extensions.sh", "--venv", sys.prefix, CUDA_HOME=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"extensions.sh: {compiler}: is of CUDA 99.1; torch in {sys.prefix} was built with ")


def test_an_old_python_is_refused(tmp_path):
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 'Python >= 3.11 is needed' >&2\nexit 1\n")
    old.chmod(0o755)
    for script in ("trainer.sh", "sglang.sh"):
        done = run(INSTALL / script, "--venv", tmp_path / "venv", "--python", old)
        assert (done.returncode, done.stderr) == (1, "Python >= 3.11 is needed\n")
        assert not (tmp_path / "venv").exists()


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not Debian")
def test_installed_packages_of_the_system_are_left_alone():
    done = run(INSTALL / "system.sh", "--packages", "bash coreutils")
    assert (done.returncode, done.stdout) == (0, "system.sh: all packages are installed\n")


def test_later_constraints_replace_earlier_ones(tmp_path):
    for number, text in enumerate(["# first\nTorch==1\nsome_name==1\nb.c==3\n", "torch==2\nsome-name==2\n"]):
        (tmp_path / f"{number}.txt").write_text(text)
    program = f"source {INSTALL}/common.sh; merged_constraints {tmp_path}/0.txt {tmp_path}/1.txt"
    assert run("bash", "-c", program).stdout == "b.c==3\nsome-name==2\ntorch==2\n"


def test_versions_fit_each_other():
    cpu, gpu, compiled, servers = pins("cpu.txt"), pins("gpu.txt"), pins("gpu-compiled.txt"), pins("sglang-gpu.txt")
    assert {name for name in gpu if cpu.get(name) == gpu[name]} == set(), "in both files"
    assert gpu["transformer-engine"] == gpu["transformer-engine-cu13"] == compiled["transformer-engine-torch"]
    assert tuple(map(int, compiled["flash-attn"].split("."))) <= (2, 8, 3), (
        "the last one that this Transformer Engine uses"
    )
    assert pins("gpu-nccl.txt")["nvidia-nccl-cu13"] == servers["nvidia-nccl-cu13"]
    assert servers["sglang"] == pins("sglang-cpu.txt")["sglang"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["sglang"] == [f"sglang=={servers['sglang']}"]
    assert re.search(
        r"^apex @ git\+https://\S+@[0-9a-f]{40}$", (ROOT / "constraints/gpu-compiled.txt").read_text(), re.M
    )


def test_check_prints_the_versions():
    done = run(INSTALL / "check.sh", "--venv", sys.prefix)
    assert done.returncode == 0, done.stderr
    megatron = pins("python3.12.txt" if sys.version_info >= (3, 12) else "python3.11.txt")["megatron-core"]
    assert f"trainer: megatron-core {megatron}\n" in done.stdout
    done = run(INSTALL / "check.sh", "--venv", sys.prefix, "--device", "gpu")
    assert done.returncode == 2
    assert done.stderr == f"check.sh: {sys.prefix}: transformer-engine is not installed\n"


def test_every_step_of_the_image_is_a_script():
    steps = [rest.split()[0] for kind, rest in INSTRUCTIONS if kind == "RUN"]
    assert sorted(steps) == [f"tools/install/{script.name}" for script in SCRIPTS]
    manual = (ROOT / "docs" / "install.md").read_text()
    lines = re.findall(r"^(?:sudo )?(tools/install/\w+\.sh)", manual, re.M)
    assert lines == steps


def test_steps_have_the_options_of_the_scripts():
    for kind, rest in INSTRUCTIONS:
        if kind == "RUN":
            script, *given = rest.split()
            options = re.findall(r'^read_options "(.*?)"', (ROOT / script).read_text(), re.M)[0].split()
            assert {one.removeprefix("--") for one in given if one.startswith("--")} <= set(options)


def test_the_image_is_pinned_labelled_and_not_run_by_root():
    kinds = [kind for kind, _ in INSTRUCTIONS]
    assert "ADD" not in kinds
    image = dict(rest.split("=", 1) for kind, rest in INSTRUCTIONS if kind == "ARG" and "=" in rest)["CUDA_IMAGE"]
    assert re.search(r":13\.0\.\d+-cudnn-devel-ubuntu24\.04$", image)
    (user,) = [rest for kind, rest in INSTRUCTIONS if kind == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert "RUN" not in kinds[kinds.index("USER") :]
    (labels,) = [rest for kind, rest in INSTRUCTIONS if kind == "LABEL"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in labels
    for label in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


def test_the_image_copies_what_exists_and_what_is_sent_to_the_builder():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for kind, rest in INSTRUCTIONS if kind == "COPY" for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / source).exists() for source in copied)
