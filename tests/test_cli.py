"""The console command lists, dispatches and refuses, and imports no more than it needs."""

import subprocess
import sys
import tomllib
import types
from fnmatch import fnmatch
from importlib import import_module, metadata
from pathlib import Path

import pytest

from fipo_megatron import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_every_command_is_listed_on_a_line(arguments, code, capsys):
    assert cli.main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    for name, (_, _, summary) in cli.COMMANDS.items():
        (line,) = [line for line in lines if line.startswith(f"  fipo {name} ")]
        assert line.endswith(summary)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_gets_its_arguments_and_its_code_is_returned(name, monkeypatch):
    found = []
    module = types.ModuleType("stand_in")
    module.main = lambda arguments: found.append(arguments) or 3
    monkeypatch.setitem(sys.modules, cli.COMMANDS[name][0], module)
    assert cli.main([name, "a", "--b=1"]) == 3
    monkeypatch.setattr(sys, "argv", ["fipo", name])
    assert cli.main() == 3
    assert found == [["a", "--b=1"], []]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_modules_take_arguments_and_return_a_code(name, capsys):
    main = import_module(cli.COMMANDS[name][0]).main
    try:
        code = main(["--help"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "hint"),
    [("trian", "did you mean train?"), ("reports", "did you mean report?"), ("xyz", "the commands are train")],
)
def test_an_unknown_command_is_named(command, hint, capsys):
    assert cli.main([command, "a"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"fipo: unknown command '{command}'; {hint}")


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: {"fipo-megatron": "1.2.3"}[name])
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "fipo 1.2.3\n"


def test_version_of_a_source_tree(capsys, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_help_does_not_import_torch():
    program = "import sys; from fipo_megatron import cli; cli.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_console_command_is_declared():
    module, _, function = PROJECT["project"]["scripts"]["fipo"].partition(":")
    assert getattr(import_module(module), function) is cli.main


def test_files_that_are_not_python_are_in_the_wheel():
    package = ROOT / "fipo_megatron"
    declared = {
        Path(*name.split(".")) / pattern
        for name, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    }
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    data = [path.relative_to(ROOT) for path in files if path.suffix != ".py"]
    assert data
    assert not [path for path in data if not any(fnmatch(str(path), str(pattern)) for pattern in declared)]
