"""The rotation that is computed once per micro-batch has the bits of Megatron-Core's, computed in each layer."""

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils._python_dispatch import TorchDispatchMode

from fipo_megatron.actor import parallel
from fipo_megatron.actor.megatron_config import transformer_config
from fipo_megatron.actor.model import build_model
from fipo_megatron.actor.rotary import PackedRotaryEmbedding, RotationTable, inverse_frequencies
from fipo_megatron.config import ActorConfig, ParallelConfig
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.weights.architecture import Architecture
from tests.actor import hf_reference
from tests.actor.models import MODELS, logits, random_model
from tests.actor.rotary_cases import Case

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMPUTE = {
    "none": {},
    "full": {"recompute": "full"},
    "MLPs": {"recompute": "selective"},
    "core attention": {"recompute": "selective", "transformer": {"recompute_modules": ["core_attn"]}},
}


@pytest.fixture(scope="module")
def layout():
    yield parallel.initialize(ParallelConfig(), seed=1, environment={})
    parallel.destroy()


def build(name, layout, **changes):
    reference = random_model(name)
    architecture = Architecture.from_hf(reference.config.to_dict())
    [model] = build_model(architecture, ActorConfig(**({"dtype": "float32"} | changes)), layout)
    hf_reference.load(model, reference.state_dict(), architecture, layout)
    return model.train()


def as_megatron(model, name):
    """Lets Megatron apply the rotary embedding, from the boundaries of the sequences."""
    architecture = Architecture.from_hf(random_model(name).config.to_dict())
    model.rotations, model.position_embedding_type = None, "rope"
    model.rotary_pos_emb = PackedRotaryEmbedding(inverse_frequencies(architecture.rope, architecture.head_dim))
    return model


def sequences(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


FIRST, SECOND = sequences(3, 100, 7, 33, 1), sequences(4, 12, 12, 12)


def loss(model, micro_batch):
    return sum(found.float().square().sum() for found in logits(model, micro_batch, padding=5))


def outcome(model):
    """The loss of a micro-batch and its gradients."""
    found = loss(model, FIRST)
    found.backward()
    return [found.detach(), *(parameter.grad for parameter in model.parameters())]


def equal(left, right):
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("name", ["qwen2", "qwen3 yarn", "llama3", "llama linear"])
def test_rotated_heads_and_gradients_have_the_bits_of_megatron(name, cp, dtype):
    architecture = Architecture.from_hf(random_model(name).config.to_dict())
    config = transformer_config(architecture, ActorConfig(dtype=dtype))
    frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
    table = RotationTable(frequencies, DTYPES[dtype])
    for seed in range(8):
        for rank in range(cp):
            case = Case.random(seed, CpLayout(cp, rank), architecture.head_dim, DTYPES[dtype])
            mine, expected = case.by_table(table), case.by_megatron(frequencies, config)
            assert [each.dtype for each in mine] == [DTYPES[dtype]] * 3
            assert equal(mine, expected), (seed, rank, case.lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_bits_of_megatron(name, dtype, layout):
    own, megatron = (build(name, layout, dtype=dtype) for _ in range(2))
    assert equal(outcome(own), outcome(as_megatron(megatron, name)))


@pytest.mark.filterwarnings("ignore:If you are using transformer_engine")
@pytest.mark.parametrize("changes", RECOMPUTE.values(), ids=RECOMPUTE)
def test_micro_batches_in_flight_keep_their_rotations(changes, layout):
    """Pipelines run forward passes of later micro-batches before the backward pass of an earlier one."""
    gradients = []
    for interleaved in (False, True):
        model = build("qwen3", layout, **changes)
        losses = []
        for micro_batch in (FIRST, SECOND):
            losses.append(loss(model, micro_batch))
            if not interleaved:
                losses.pop().backward()
        for found in losses:
            found.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert equal(*gradients)


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_layers_read_no_boundaries_and_compute_no_angles(layout):
    """With CUDA, reading a boundary waits for the device. Tensors on the device ``meta`` cannot be read."""
    model = build("qwen3", layout, recompute="full")
    lengths = [len(ids) for ids in FIRST]
    positions = torch.cat([torch.arange(length) for length in lengths])
    unreadable = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    packed = PackedSeqParams("thd", unreadable, unreadable, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))
    packed.cu_seqlens_host = tuple(np.cumsum([0, *lengths]).tolist())

    def run():
        model(torch.cat(FIRST)[None], positions[None], None, packed_seq_params=packed).square().sum().backward()

    run()
    with Operators() as operators:
        run()
    assert not {"cos", "sin", "item", "_local_scalar_dense"} & set(operators.names)
    assert operators.names.count("index_select") == 2


def test_sequences_must_be_packed(layout):
    model = build("qwen2", layout)
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match="must be packed"):
        model(ids, ids, None)


def test_angles_for_transformer_engine_are_one_table():
    rotary = PackedRotaryEmbedding(torch.tensor([1.0, 0.5]))
    long = rotary(64, packed_seq=True)
    assert rotary(10, packed_seq=True).shape == (10, 1, 1, 4)
    assert rotary(10, packed_seq=True).data_ptr() == long.data_ptr()
    with pytest.raises(ValueError, match="must be packed"):
        rotary(10)
