"""Every adaptation of Megatron-Core is needed, documented, and without effect on other modules."""

import json
import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from fipo_megatron.actor import cpu_backend

ROOT = Path(__file__).parents[2]
INSTALLED = metadata.version("megatron-core")
NAMES = [adaptation.name for adaptation in cpu_backend.ADAPTATIONS]
NEEDED = [adaptation.name for adaptation in cpu_backend.needed()]

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="Megatron-Core runs on CUDA as it is")


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    results = tmp_path_factory.mktemp("adaptations") / "results.json"
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.cpu_adaptations", str(results)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    return json.loads(results.read_text())


@without_cuda
@pytest.mark.distributed
@pytest.mark.parametrize("name", NEEDED)
def test_upstream_still_needs(name, trials):
    """A failure means that the installed version no longer needs the adaptation: remove its lines."""
    assert any(trials["without"][name])


@without_cuda
@pytest.mark.distributed
def test_operations_succeed_with_all_adaptations(trials):
    """All that the installed version needs: the others are not made."""
    assert not any(error for ranks in trials["with all"].values() for error in ranks)


@without_cuda
@pytest.mark.distributed
def test_every_adaptation_is_tried(trials):
    assert list(trials["without"]) == NAMES


@without_cuda
def test_others_see_torch_as_it_is():
    cpu_backend.install()
    cpu_backend.install()
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    for needs_cuda in (tensor.cuda, torch.cuda.current_device, lambda: torch.zeros(1, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA driver"):
            needs_cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_refuses_where_cuda_is():
    with pytest.raises(RuntimeError, match="CUDA is available"):
        cpu_backend.install()


@pytest.mark.skipif(INSTALLED not in cpu_backend.MEGATRON_VERSIONS, reason="test_cited_version_is_installed fails")
@pytest.mark.parametrize("adaptation", cpu_backend.needed(), ids=NEEDED)
def test_cited_lines_say_what_is_claimed(adaptation):
    core = Path(util.find_spec("megatron.core").submodule_search_locations[0])
    for cited in adaptation.needed_by[INSTALLED]:
        file, _, number = cited.partition(":")
        line = (core / file).read_text().splitlines()[int(number) - 1]
        words = ("cuda", "_lazy_call", "te_general_gemm", "maybe_move_tensor_to_cpu")
        assert any(word in line for word in words), f"{cited}: {line}"


def test_cited_version_is_installed():
    assert INSTALLED in cpu_backend.MEGATRON_VERSIONS


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.16.0", "0.16.1"),
        ("0.16.1", "0.16.1"),
        ("0.18.0rc1", "0.16.1"),
        ("0.19.2", "0.19.2"),
        ("0.20.0.dev1", "0.19.2"),
    ],
)
def test_a_version_needs_what_the_tested_one_below_it_needs(version, tested):
    assert [each.name for each in cpu_backend.needed(version)] == [
        each.name for each in cpu_backend.ADAPTATIONS if tested in each.needed_by
    ]


def test_versions_differ_in_what_they_need():
    assert set(NAMES) - {each.name for each in cpu_backend.needed("0.19.2")} == {
        "transformer.moe.moe_utils:te_general_gemm"
    }


def test_documentation_is_the_list():
    assert cpu_backend.table() in (ROOT / "docs" / "upstream.md").read_text()
