"""Maps the parameters of a model of transformers to their names on disk."""

from __future__ import annotations

import re

import transformers
from torch import Tensor

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def parameters_by_hf_name(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Returns views of all parameters by name. transformers 5 fuses the experts of a layer; files have each expert."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        match = _FUSED.fullmatch(name)
        if match is None:
            found[name] = parameter.data
            continue
        for expert, matrix in enumerate(parameter.data):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "down_proj":
                found[f"{prefix}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"] = gate, up
    return found
