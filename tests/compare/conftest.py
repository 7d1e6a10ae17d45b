import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.quickstart import task


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Builds six problems in ``few.jsonl``, a model in ``model`` and a perturbed copy of it in ``changed``."""
    directory = tmp_path_factory.mktemp("data")
    task.build(directory, seed=1)
    lines = (directory / "held_out.jsonl").read_text().splitlines()[:6]
    (directory / "few.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(directory / "model", directory / "changed")
    file = directory / "changed" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    changed = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in load_file(file).items()}
    save_file(changed, file, {"format": "pt"})
    return directory
