"""The input buffers of an executor: one aligned block a shape, and views that lie where they should."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rankd.features.schema import TensorSpec, candidate_specs, history_specs
from rankd.features.staging import ALIGNMENT, Block, InputBuffers, allocate
from rankd.types import Array
from tests.features.sample_schema import make_schema

SCHEMA = make_schema()
SPECS = st.lists(
    st.tuples(st.sampled_from(["int32", "float32"]), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=6
)


def address(array: Array) -> int:
    return int(array.ctypes.data)


def check_block(block: Block) -> None:
    """Arrays are aligned, contiguous, writable, one after the other, and all of them inside the block."""
    end = address(block.memory)
    assert end % ALIGNMENT == 0
    for array in block.arrays.values():
        assert address(array) % ALIGNMENT == 0
        assert address(array) >= end
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert np.shares_memory(array, block.memory)
        end = address(array) + array.nbytes
    assert end == address(block.memory) + block.memory.nbytes


@given(SPECS)
def test_any_specs_share_one_aligned_block(shapes: list[tuple[str, list[int]]]) -> None:
    specs = [TensorSpec(f"input {number}", kind, tuple(shape)) for number, (kind, shape) in enumerate(shapes)]
    block = allocate(specs, {})
    assert [(array.dtype.name, list(array.shape)) for array in block.arrays.values()] == shapes
    check_block(block)


def test_every_bucket_has_its_specs() -> None:
    buffers = InputBuffers(SCHEMA, {16: 3})
    for bucket, users in ((4, 1), (16, 3)):
        one = buffers.candidates(bucket)
        check_block(one.block)
        assert one.most_users == users
        sizes = {"B": users, "C": bucket}
        for spec in candidate_specs(SCHEMA):
            array = one.block.arrays[spec.name]
            assert array.dtype == spec.dtype
            assert array.shape == tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    for tokens in SCHEMA.history_buckets:
        block = buffers.history(tokens)
        check_block(block)
        assert block.arrays["history_item"].shape == (1, 2, tokens)
        assert list(block.arrays) == [spec.name for spec in history_specs(SCHEMA)]


def test_worked_example() -> None:
    block = InputBuffers(SCHEMA, {16: 2}).candidates(16).block
    names = ("candidate_item", "context_time", "candidate_categories")
    starts = [address(block.arrays[name]) - address(block.memory) for name in names]
    assert starts == [0, 128, 192]
    assert starts[2] + block.arrays["candidate_categories"].nbytes == 576


def test_rows_lie_side_by_side_in_a_call() -> None:
    one = InputBuffers(SCHEMA, {16: 4}).candidates(16)
    for user in range(4):
        for array in one.row(user).values():
            assert array.shape[0] == 1
            array[...] = user + 1
    for first, count in ((0, 4), (1, 2), (3, 1)):
        for name, array in one.call(first, count).items():
            assert array.flags.c_contiguous
            assert np.shares_memory(array, one.block.arrays[name])
            assert [array[user].min() for user in range(count)] == [first + user + 1 for user in range(count)]
            assert [array[user].max() for user in range(count)] == [first + user + 1 for user in range(count)]
