"""The zigzag layout, all ranks at once; tests/distributed compares it with Megatron-Core's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipo_megatron.data.context_parallel import CpLayout
from tests.data.parts import unslice

sizes = st.sampled_from([1, 2, 3, 4, 8])
raw_lengths = st.lists(st.integers(1, 200), min_size=1, max_size=6)


def boundaries(size, lengths):
    return np.cumsum([0] + [CpLayout(size).padded_length(length) for length in lengths])


@given(size=sizes, lengths=raw_lengths)
def test_slices_are_a_partition_and_unslice_inverts(size, lengths):
    cu_seqlens = boundaries(size, lengths)
    packed = np.random.default_rng(0).random((cu_seqlens[-1], 2))
    layouts = [CpLayout(size, rank) for rank in range(size)]
    parts = [layout.slice(packed, cu_seqlens) for layout in layouts]
    assert {len(part) for part in parts} == {cu_seqlens[-1] // size}
    assert np.array_equal(unslice(parts, cu_seqlens), packed)
    indices = np.concatenate([layout.indices(cu_seqlens) for layout in layouts])
    assert np.array_equal(np.sort(indices), np.arange(cu_seqlens[-1]))


@given(size=sizes, lengths=raw_lengths, multiple_of=st.integers(1, 40))
def test_padding_is_the_least_that_fits(size, lengths, multiple_of):
    layout = CpLayout(size)
    padded = [layout.padded_length(length) for length in lengths]
    for length, longer in zip(lengths, padded, strict=True):
        assert longer % layout.num_chunks == 0
        assert length <= longer < length + layout.num_chunks
    total = layout.padded_total(sum(padded), multiple_of)
    assert total % (size * multiple_of) == 0
    assert total % layout.num_chunks == 0
    smaller = range(sum(padded), total, layout.num_chunks)
    assert not any(tokens % (size * multiple_of) == 0 for tokens in smaller)


@given(size=sizes, length=st.integers(1, 60))
def test_owners_and_chunks_agree(size, length):
    layout = CpLayout(size)
    padded = layout.padded_length(length)
    chunk_length = padded // layout.num_chunks
    assert len(layout.owners) == layout.num_chunks
    for chunk, (rank, slot) in enumerate(layout.owners):
        assert CpLayout(size, rank).chunks[slot] == chunk
    for rank in range(size):
        held = CpLayout(size, rank).indices([0, padded])
        assert {layout.owners[int(position) // chunk_length][0] for position in held} == {rank}


def test_zigzag_of_two_ranks_by_hand():
    cu_seqlens = [0, 8, 12]
    assert CpLayout(2, 0).indices(cu_seqlens).tolist() == [0, 1, 6, 7, 8, 11]
    assert CpLayout(2, 1).indices(cu_seqlens).tolist() == [2, 3, 4, 5, 9, 10]
    assert CpLayout(2).owners == ((0, 0), (1, 0), (1, 1), (0, 1))
    assert CpLayout(2).chunk_lengths(cu_seqlens) == [2, 1]


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match="got rank 2 of size 2"):
        CpLayout(2, 2)
    with pytest.raises(ValueError, match=r"sequence 1 has 6 tokens.*size 2 needs a positive multiple of 4"):
        CpLayout(2).indices([0, 4, 10])
    with pytest.raises(ValueError, match="sequence 0 has 0 tokens"):
        CpLayout(1).chunk_lengths([0, 0, 4])
