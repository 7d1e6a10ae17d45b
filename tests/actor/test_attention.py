"""Attention of packed sequences: values compared with the definition, and memory."""

import itertools
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import scaled_dot_product_attention

from fipo_megatron.actor.attention import KeyValueExchange, PackedCoreAttention, packed_causal_attention
from fipo_megatron.actor.attention_kernels import Blocked, CpuFlash, choose_kernel
from fipo_megatron.data.context_parallel import CpLayout
from tests.actor.plain_attention import (
    attend,
    in_simulated_ranks,
    largest_error,
    plain_attention,
    random_case,
    whole,
)

KERNELS = [CpuFlash(), Blocked(), Blocked(queries=16, keys=32)]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}

packings = st.lists(st.integers(1, 200), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.slow
@given(
    lengths=packings,
    cp=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([1, 2]),
    ratio=st.sampled_from([1, 2, 4, 7]),
    dim=st.sampled_from([16, 64]),
    seed=seeds,
)
def test_output_and_gradients_equal_the_definition(kernel, dtype, lengths, cp, groups, ratio, dim, seed):
    case = random_case(seed, lengths, cp, groups, ratio, dim, dtype)
    got = whole(in_simulated_ranks(case, cp, kernel=kernel), case.cu_seqlens)
    assert all(tensor.dtype == dtype for tensor in got)
    assert largest_error(got, plain_attention(case)) <= BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cp", [1, 2])
def test_sequences_longer_than_the_blocks_of_a_kernel(kernel, dtype, cp):
    """Blocks have 512 queries and 1,024 keys, those of the flash kernel 512 keys."""
    case = random_case(5, [2200, 1030], cp, ratio=2, dtype=dtype)
    got = whole(in_simulated_ranks(case, cp, kernel=kernel), case.cu_seqlens)
    assert largest_error(got, plain_attention(case)) <= BOUNDS[dtype]


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_of_equal_length_share_a_call(kernel, cp, dtype, monkeypatch):
    """Within the bounds of the definition, and on one rank with the bits of one call per sequence."""
    case = random_case(3, [40] * 4 + [12] * 9 + [40, 7], cp, groups=2, ratio=2, dtype=dtype)
    sequences = []
    forward = type(kernel).forward
    with monkeypatch.context() as patch:
        patch.setattr(type(kernel), "forward", lambda self, it: (sequences.append(len(it.query)), forward(self, it))[1])
        together = whole(in_simulated_ranks(case, cp, kernel=kernel), case.cu_seqlens)
    assert max(sequences) == (9 if kernel.rows > 108 else max(1, kernel.rows // (12 // (2 * cp) if cp > 1 else 12)))
    assert largest_error(together, plain_attention(case)) <= BOUNDS[dtype]
    if cp == 1:
        monkeypatch.setattr(type(kernel), "rows", 1)
        alone = whole(in_simulated_ranks(case, cp, kernel=kernel), case.cu_seqlens)
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_views_of_one_projection_are_taken_as_they_are(kernel):
    """Megatron passes slices of the mixed projection; gradients may be expanded or transposed."""
    case = random_case(0, [40, 9], groups=2, ratio=2)
    mixed = torch.cat([case.query, case.key, case.value], dim=1)
    case.query, case.key, case.value = mixed.split([4, 2, 2], dim=1)
    case.grad = torch.ones(1, 1, 1, dtype=torch.float64).expand_as(case.query)
    assert largest_error(attend(case, kernel=kernel), plain_attention(case)) <= 1e-10
    case.query = case.query.mT.contiguous().mT
    case.grad = case.grad.mT.contiguous().mT
    assert case.query.stride(-1) != 1
    assert largest_error(attend(case, kernel=kernel), plain_attention(case)) <= 1e-10


@given(lengths=packings, seed=seeds, cp=st.sampled_from([1, 2, 4]))
@settings(max_examples=20)
def test_no_token_depends_on_a_later_one_or_another_sequence(lengths, seed, cp):
    """Padding, whatever it holds, changes no bit of any other token."""
    case = random_case(seed, lengths, cp, dtype=torch.float32)
    before = whole(in_simulated_ranks(case, cp), case.cu_seqlens)[0]
    real = torch.cat([torch.arange(start, start + n) for start, n in zip(case.cu_seqlens[:-1], lengths, strict=True)])
    padding = torch.ones(case.cu_seqlens[-1], dtype=torch.bool).index_fill(0, real, False)
    cut = seed % lengths[0]
    padding[cut + 1 : lengths[0]] = True
    for tensor in (case.query, case.key, case.value):
        tensor[padding] = 1e4
    after = whole(in_simulated_ranks(case, cp), case.cu_seqlens)[0]
    assert torch.equal(before[~padding], after[~padding])


def test_the_scale_is_applied():
    case = random_case(1, [50, 3], cp=2)
    got = whole(in_simulated_ranks(case, 2, scale=0.7), case.cu_seqlens)
    assert largest_error(got, plain_attention(case, scale=0.7)) <= 1e-10


def test_the_same_bits_with_and_without_gradients():
    """The log-prob pass and the training pass must agree bit for bit."""
    case = random_case(2, [130, 77], groups=2, ratio=2, dtype=torch.float32)
    inputs = (case.query, case.key, case.value, case.cu_seqlens)
    with torch.no_grad():
        first = packed_causal_attention(*inputs)
    assert torch.equal(first, attend(case)[0])


class Peak:
    """Peak and remaining memory allocated on the CPU in bytes, including buffers inside operators."""

    def __enter__(self):
        self._profile = torch.autograd.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        events = [event for event in self._profile.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        allocated = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
        self.bytes, self.left = max(allocated), allocated[-1]


def assert_linear(peaks):
    """Checks proportional growth with a slack of a quarter; ``peaks`` is bytes by length, which grows fourfold."""
    for shorter, longer in itertools.pairwise(sorted(peaks)):
        assert longer == 4 * shorter
        assert peaks[longer] <= 1.25 * 4 * peaks[shorter], f"not linear in the length: {peaks}"


def with_dense_mask(case, **_):
    """Computes attention with torch's mask for keys before the queries, which has the size of the scores."""
    leaves = [tensor.transpose(0, 1)[None].requires_grad_() for tensor in (case.query, case.key, case.value)]
    mask = torch.ones(len(case.query), len(case.key), dtype=torch.bool).tril()
    out = scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True)
    torch.autograd.grad(out, leaves, case.grad.transpose(0, 1)[None])


def peaks(run, tokens_of_rank, cp=1, **arguments):
    """Returns peak bytes by length for one sequence, with exchanges that allocate like real ones."""
    exchange = KeyValueExchange(
        lambda message: message[None].repeat(cp, 1, 1, 1, 1), lambda message: message[0].clone()
    )
    measured = {}
    for length in tokens_of_rank:
        part = random_case(0, [length], ratio=2, dtype=torch.float32)
        part.cu_seqlens = [0, length * cp]
        with Peak() as peak:
            run(part, layout=CpLayout(cp, cp - 1), exchange=exchange, **arguments)
        measured[length] = peak.bytes
    return measured


@pytest.mark.parametrize(
    ("kernel", "lengths"), [(CpuFlash(), (2048, 8192, 32768)), (Blocked(queries=128, keys=256), (2048, 8192))], ids=repr
)
def test_peak_memory_is_linear(kernel, lengths):
    assert_linear(peaks(attend, lengths, kernel=kernel))


@pytest.mark.parametrize("kernel", [CpuFlash(), Blocked(queries=128, keys=256)], ids=repr)
def test_peak_memory_is_linear_under_context_parallelism(kernel):
    assert_linear(peaks(attend, (512, 2048), cp=4, kernel=kernel))


def test_the_check_of_linearity_sees_a_dense_mask():
    with pytest.raises(AssertionError, match="not linear"):
        assert_linear(peaks(with_dense_mask, (1024, 4096)))


@pytest.mark.parametrize("cp", [1, 4])
def test_a_rank_keeps_its_own_share_only(cp):
    """Forward keeps this rank's inputs, output and one float per query and head; no gathered keys, no scores."""
    part = random_case(0, [512], ratio=2, dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (part.query, part.key, part.value)]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    exchange = KeyValueExchange(lambda message: message[None].repeat(cp, 1, 1, 1, 1), lambda message: message[0])
    arguments = (*leaves, [0, 512 * cp], CpLayout(cp, cp - 1))
    with Peak() as memory, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = packed_causal_attention(*arguments, exchange=exchange)
    assert memory.left == out.nbytes + 512 * 2 * 4
    assert sum(kept.values()) == sum(tensor.nbytes for tensor in leaves) + memory.left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 10, 21]}, "query: cu_seqlens has 21 tokens for 1 ranks, got 20"),
        ({"layout": CpLayout(2), "cu_seqlens": [0, 40]}, "exchange: keys are spread over 2 ranks"),
        (
            {"layout": CpLayout(2), "cu_seqlens": [0, 6, 40], "exchange": KeyValueExchange(None, None)},
            "sequence 0 has 6",
        ),
        ({"value": torch.zeros(20, 2, 8)}, "query, key, value: expected"),
        ({"query": torch.zeros(20, 3, 16)}, "query, key, value: expected"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(change, message):
    inputs = {"query": torch.zeros(20, 4, 16), "key": torch.zeros(20, 2, 16), "value": torch.zeros(20, 2, 16)}
    with pytest.raises(ValueError, match=message):
        packed_causal_attention(**(inputs | {"cu_seqlens": [0, 10, 20]} | change))


def test_blocks_that_would_hide_all_keys_of_a_query_are_refused():
    with pytest.raises(ValueError, match="keys: must be a multiple of queries, 32, got 16"):
        Blocked(queries=32, keys=16)


def test_the_cpu_gets_the_flash_kernel_and_other_devices_the_blocked_one():
    for dtype in BOUNDS:
        assert choose_kernel(torch.zeros(1, 1, 16, dtype=dtype)) == CpuFlash()
        assert choose_kernel(torch.zeros(1, 1, 16, dtype=dtype, device="meta")) == Blocked()


@pytest.fixture(scope="module")
def groups():
    """A context-parallel group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ProcessGroupCollection(cp=dist.group.WORLD)
    dist.destroy_process_group()


def config(**changes):
    sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
    names = {field.name for field in fields(TransformerConfig)}  # of the installed megatron-core
    graphs = {"cuda_graph_modules" if "cuda_graph_modules" in names else "cuda_graph_scope": []}
    neutral = {"attention_dropout": 0.0, "masked_softmax_fusion": False} | graphs
    return TransformerConfig(**(sizes | neutral | changes))


def build(groups, changes=None, **arguments):
    defaults = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return PackedCoreAttention(config(**(changes or {})), pg_collection=groups, **(defaults | arguments))


def packed_params(cu_seqlens, **others):
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, **others)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_entry_of_a_dense_batch_is_a_sequence(groups, scale):
    case = random_case(4, [12, 12, 12], groups=2, ratio=2, dtype=torch.float32)
    out, *grads = plain_attention(case, scale)
    dense = [tensor.view(3, 12, -1, 16).transpose(0, 1) for tensor in (*case.tensors, *grads)]
    leaves = [tensor.detach().requires_grad_() for tensor in dense[:3]]
    got = build(groups, softmax_scale=scale)(*leaves, None)
    assert got.is_contiguous()
    assert largest_error([got.detach()], [out.view(3, 12, -1).transpose(0, 1)]) <= 1e-5
    assert largest_error(torch.autograd.grad(got, leaves, dense[3].flatten(2)), dense[4:]) <= 1e-5


@pytest.mark.parametrize("where", ["cu_seqlens_q", "cu_seqlens_q_padded", "cu_seqlens_host"])
def test_boundaries_are_the_padded_ones_wherever_they_are(groups, where):
    case = random_case(3, [7, 13], groups=2, ratio=2, dtype=torch.float32)
    wrong = [0, 5, 20]
    params = packed_params(case.cu_seqlens if where == "cu_seqlens_q" else wrong)
    if where == "cu_seqlens_q_padded":
        params.cu_seqlens_q_padded = torch.tensor(case.cu_seqlens)
    if where == "cu_seqlens_host":
        params.cu_seqlens_host = tuple(case.cu_seqlens)
    got = build(groups)(case.query, case.key, case.value, None, packed_seq_params=params)
    assert torch.equal(got, attend(case)[0].flatten(1))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"attention_dropout": 0.1}, {}, r"attention_dropout: .* got 0\.1"),
        ({}, {"attention_dropout": 0.2}, r"attention_dropout: .* got 0\.2"),
        ({"window_size": (8, 0)}, {}, "window_size: .* got"),
        ({"softmax_type": "off-by-one"}, {}, "softmax_type: .* got 'off-by-one'"),
        (
            {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True},
            {},
            "apply_query_key_layer_scaling",
        ),
        ({}, {"attn_mask_type": AttnMaskType.no_mask}, "attn_mask_type: .*no_mask"),
        ({}, {"attention_type": "cross"}, "attention_type: must be 'self', got 'cross'"),
    ],
)
def test_what_it_does_not_compute_is_refused_at_construction(groups, changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(groups, changes=changes, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask_type": AttnMaskType.arbitrary}, "attn_mask_type: .*arbitrary"),
        ({"attention_bias": torch.zeros(1)}, "attention_bias: must be None"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask: must be None"),
        ({"packed_seq_params": PackedSeqParams(qkv_format="sbhd")}, "qkv_format must be 'thd'"),
        ({"packed_seq_params": packed_params([0, 8], local_cp_size=2)}, "local_cp_size unset"),
    ],
)
def test_what_it_does_not_compute_is_refused_in_the_forward_pass(groups, arguments, message):
    query, key, value = (torch.zeros(8, n, 16) for n in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        build(groups)(query, key, value, **({"attention_mask": None} | arguments))
