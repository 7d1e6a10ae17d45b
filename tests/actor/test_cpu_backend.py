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
NAMES = [adaptation.name for adaptation in cpu_backend.ADAPTATIONS]

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
@pytest.mark.parametrize("name", NAMES)
def test_upstream_still_needs(name, trials):
    """A failure means that upstream no longer needs the adaptation: remove it."""
    assert any(trials["without"][name])


@without_cuda
@pytest.mark.distributed
def test_operations_succeed_with_all_adaptations(trials):
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
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            needs_cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_refuses_where_cuda_is():
    with pytest.raises(RuntimeError, match="CUDA is available"):
        cpu_backend.install()


# test_cited_version_is_installed fails where these are skipped.
cited_version = pytest.mark.skipif(
    metadata.version("megatron-core") != cpu_backend.MEGATRON_VERSION, reason="lines of another version are cited"
)


@cited_version
@pytest.mark.parametrize("adaptation", cpu_backend.ADAPTATIONS, ids=NAMES)
def test_cited_lines_say_what_is_claimed(adaptation):
    core = Path(util.find_spec("megatron.core").submodule_search_locations[0])
    for cited in adaptation.needed_by:
        file, _, number = cited.partition(":")
        line = (core / file).read_text().splitlines()[int(number) - 1]
        words = ("cuda", "_lazy_call", "te_general_gemm", "maybe_move_tensor_to_cpu")
        assert any(word in line for word in words), f"{cited}: {line}"


def test_cited_version_is_installed():
    assert metadata.version("megatron-core") == cpu_backend.MEGATRON_VERSION


def test_documentation_is_the_list():
    assert cpu_backend.table() in (ROOT / "docs" / "upstream.md").read_text()
