"""The whole executor on CPU tensors against the torch reference: encode, extend, score, users, parts, and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rankd.artifact import Artifact
from rankd.demo import MODELS
from rankd.engine.backend import EngineConfig, Precision, StateType
from rankd.engine.cuda.climber_layers import climber_weights
from rankd.engine.cuda.cuda_backend import CudaBackend, model_of
from rankd.engine.cuda.cuda_executor import CudaExecutor, CudaModel
from rankd.engine.cuda.kernels import triton_feed_forward
from rankd.engine.cuda.paged_states import PageType
from rankd.engine.cuda.pinned_memory import PinnedMemory
from rankd.engine.cuda.ranker_steps import Block
from rankd.engine.cuda.ranker_weights import WeightReader
from rankd.engine.cuda.state_pool import StatePool
from rankd.engine.reference_backend import ReferenceBackend
from rankd.errors import EngineFailure
from rankd.features.schema import FeatureSchema, TensorSpec
from rankd.types import Array, Float32Array, UserState
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.test_native_climber import (
    candidates_of,
    floats,
    history_of,
    schema_of,
    tensors,
)
from tests.engine.test_native_climber import (
    model_of as climber_of,
)

OPTIONS: dict[str, Any] = {"width": 24, "heads": 1, "layers": 2, "ffn_ratio": 2, "hidden": 16}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest difference from float32 torch, over the largest number."""
SMALL = Block(tile=16, page=16)
USERS = 4
"""For so many users' longest states the pools of these tests have pages, unless they say otherwise."""


def specs_of(schema: FeatureSchema, width: int, layers: int) -> tuple[TensorSpec, ...]:
    blocks = schema.num_sub_sequences
    return (
        TensorSpec("keys_values", "float32", ("B", blocks, layers, 2, "T", width)),
        TensorSpec("times", "int32", ("B", blocks, "T")),
        TensorSpec("lengths", "int32", ("B", blocks)),
    )


def made(
    schema: FeatureSchema,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: InterpretedDevice | None = None,
    users: int = USERS,
    kind: PageType | None = None,
    memory: PinnedMemory | None = None,
) -> tuple[Any, CudaExecutor, InterpretedDevice]:
    """A random Climber, an executor over its weights, and that one's device. `memory` is of the same device."""
    climber, model = model_over(schema, options, dtype)
    device = device or InterpretedDevice()
    shape = model.state_shape(kind)
    pool = StatePool(device, shape, users * shape.pages_a_user)
    return climber, CudaExecutor(model, pool, device, memory), device


def model_over(schema: FeatureSchema, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, CudaModel]:
    """A random Climber, and its weights as executors have them."""
    climber = climber_of(schema, options)
    weights = {name: tensor.numpy() for name, tensor in climber.state_dict().items()}
    loaded = climber_weights(WeightReader(weights, dtype, lambda tensor: tensor), schema, options)
    specs = specs_of(schema, loaded.attention_width, loaded.layers.depth)
    return climber, CudaModel(loaded, schema, specs, dtype, SMALL)


def near(made: Array, expected: Array, bound: float) -> None:
    if made.dtype == np.uint16:
        made = floats(made)
    assert np.abs(made - expected).max(initial=0.0) <= bound * max(float(np.abs(expected).max(initial=0.0)), 1e-3)


def state_of(executor: CudaExecutor, history: dict[str, Array]) -> UserState:
    return UserState(executor.encode(history), tuple(history["history_length"][0].tolist()))


def check_as_torch(
    model: Any, executor: CudaExecutor, schema: FeatureSchema, lengths: list[int], count: int, bound: float
) -> None:
    """States and scores are those of the torch model, and there is nothing behind a state's tokens."""
    history, candidates = history_of(schema, 20, lengths), candidates_of(schema, count)
    state, expected = state_of(executor, history), model.encode(tensors(history))
    for block, length in enumerate(lengths):
        ours = state.arrays["keys_values"][0, block, :, :, :length]
        near(ours, expected["keys_values"][0, block, :, :, :length].numpy(), bound)
        assert not state.arrays["keys_values"][0, block, :, :, length:].any()
    near(executor.score([state], candidates), model.score(expected, tensors(candidates)).numpy(), bound)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("blocks", "features", "options", "lengths", "count"),
    [
        (2, True, OPTIONS, [19, 3], 17),
        (1, False, OPTIONS | {"heads": 2, "direct": False, "layers": 1}, [0], 3),
    ],
)
def test_computes_what_torch_computes(
    dtype: torch.dtype, blocks: int, features: bool, options: dict[str, Any], lengths: list[int], count: int
) -> None:
    schema = schema_of(blocks, features)
    climber, executor, _ = made(schema, options, dtype)
    check_as_torch(climber, executor, schema, lengths, count, BOUNDS[dtype])


@torch.inference_mode()
def test_extends_as_torch_does_and_scores_on_it_as_on_the_whole() -> None:
    schema = schema_of(1)
    climber, executor, _ = made(schema, OPTIONS, torch.float32)
    whole = history_of(schema, 20, [20])
    first, rest = (
        {name: array[:, :, part] if array.ndim > 2 else np.full_like(array, size) for name, array in whole.items()}
        for part, size in ((slice(0, 15), 15), (slice(15, 20), 5))
    )
    state = state_of(executor, first)
    added = executor.extend(state, rest)
    expected = climber.extend(climber.encode(tensors(first)), tensors(rest))
    near(added["keys_values"], expected["keys_values"].numpy(), 1e-5)
    assert added["lengths"].tolist() == [[20]]
    assert (added["times"] == rest["history_time"]).all()
    joined = {
        "keys_values": np.concatenate([state.arrays["keys_values"], added["keys_values"]], 4),
        "times": whole["history_time"],
        "lengths": added["lengths"],
    }
    (together, other) = executor.extend_all([state, state_of(executor, whole)], [rest, first])
    near(together["keys_values"], added["keys_values"], 1e-6)
    assert (together["lengths"].tolist(), other["lengths"].tolist()) == ([[20]], [[35]])
    candidates = candidates_of(schema, 5)
    expected_logits = climber.score(climber.encode(tensors(whole)), tensors(candidates)).numpy()
    near(executor.score([UserState(joined, (20,))], candidates), expected_logits, 1e-5)


def test_users_together_score_as_alone_and_parts_as_the_whole() -> None:
    schema = schema_of(1)
    _, executor, _ = made(schema, OPTIONS, torch.float32)
    histories = [history_of(schema, 18, lengths, seed) for seed, lengths in enumerate(([18], [3]))]
    states = [state_of(executor, history) for history in histories]
    together = executor.encode_all(histories, [None, None])
    for state, other in zip(states, together, strict=True):
        near(other["keys_values"], state.arrays["keys_values"], 1e-6)
    one = candidates_of(schema, 5)
    both = {name: np.concatenate([array, array]) for name, array in one.items()}
    logits = executor.score(states, both)
    for number, state in enumerate(states):
        near(logits[number : number + 1], executor.score([state], one), 1e-6)
    part = {name: array[:, 2:] if name.startswith("candidate") else array for name, array in one.items()}
    near(executor.score([states[0]], part), logits[:1, 2:], 1e-6)
    assert executor.score([states[0]], candidates_of(schema, 0)).shape == (1, 0, 3)


def test_a_bucket_that_was_measured_on_nobody_scores_the_same() -> None:
    schema, options = schema_of(1), OPTIONS | {"layers": 2}
    history, candidates = history_of(schema, 5, [5]), candidates_of(schema, 3)
    scored = []
    for measures in (False, True):
        _, executor, _ = made(schema, options, torch.float32, InterpretedDevice(measures=measures))
        scored.append(executor.score([state_of(executor, history)], candidates))
    assert (scored[0] == scored[1]).all()


def test_a_wide_feed_forward_goes_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankd.engine.cuda.climber_layers.WIDEST_BYTES", 64)
    assert triton_feed_forward.WIDEST_BYTES == 1024
    test_computes_what_torch_computes(torch.float32, 1, True, OPTIONS, [2], 3)


def test_nothing_is_taken_once_a_bucket_is_known_and_a_state_that_is_not_there_is_one_transfer_more() -> None:
    schema = schema_of(1)
    _, executor, device = made(schema, OPTIONS | {"layers": 1}, torch.float32)
    history, candidates = history_of(schema, 9, [9]), candidates_of(schema, 5)
    state = state_of(executor, history)
    executor.score([state], candidates)
    before = dict(device.counts)
    for lengths, count in (([1], 5), ([16], 16)):  # other sizes of the same buckets
        state = state_of(executor, history_of(schema, 16, lengths))
        executor.score([state], candidates_of(schema, count))
    grown = {name: device.counts[name] - before[name] for name in before}
    assert grown == {"taken": 0, "recorded": 0, "transfers": 10, "launched": 6, "waits": 6}


def test_a_room_that_was_warmed_takes_histories_of_every_length() -> None:
    """Warm-up encodes empty histories in rooms of the buckets; kernels are compiled and memory is taken there alone."""
    schema = schema_of(1)
    _, executor, device = made(schema, OPTIONS | {"layers": 1}, torch.float32)
    executor.encode(history_of(schema, 40, [0]))
    executor.extend(state_of(executor, history_of(schema, 8, [8])), history_of(schema, 8, [0]))
    before = device.counts["taken"], device.counts["recorded"]
    for length in (1, 17, 30, 40):
        executor.encode(history_of(schema, 40, [length]))
        executor.extend(state_of(executor, history_of(schema, 8, [8])), history_of(schema, 8, [min(length, 8)]))
    assert (device.counts["taken"], device.counts["recorded"]) == before


def test_a_gpu_without_memory_fails_that_call_alone() -> None:
    schema = schema_of(1)
    _, executor, device = made(schema, OPTIONS | {"layers": 1}, torch.float32)
    state = state_of(executor, history_of(schema, 5, [5]))
    logits = executor.score([state], candidates_of(schema, 5))
    device.memory_bytes = 1000
    with pytest.raises(EngineFailure, match=r"no memory left .* tried to take .*engine\.executors"):
        executor.score([state], candidates_of(schema, 17))
    assert (executor.score([state], candidates_of(schema, 5)) == logits).all()  # a bucket that has its memory
    device.memory_bytes = 1 << 30
    assert executor.score([state], candidates_of(schema, 17)).shape == (1, 17, 3)


def test_refuses_states_that_it_cannot_read() -> None:
    schema = schema_of(1)
    _, executor, _ = made(schema, OPTIONS | {"layers": 1}, torch.float32)
    arrays: dict[str, Array] = {
        "keys_values": np.zeros((1, 1, 1, 2, 8, 24), np.uint16),
        "times": np.zeros((1, 1, 8), np.int32),
    }
    state = UserState(arrays | {"lengths": np.array([[8]], np.int32)}, (8,))
    with pytest.raises(EngineFailure, match="a state of type uint16; this executor's are float32"):
        executor.score([state], candidates_of(schema, 4))
    with pytest.raises(EngineFailure, match="a history of 500 tokens a block; this model has room for"):
        executor.encode(history_of(schema, 500, [500]))


def test_the_packaged_model_scores_as_the_reference() -> None:
    artifact = Artifact.open(MODELS / "demo" / "1")
    reference = ReferenceBackend.load(artifact, EngineConfig(), Precision.FP32, StateType.FP32).executor()
    model = model_of(artifact, Precision.BF16, lambda tensor: tensor, tile=16, page=16)
    backend = CudaBackend(model, InterpretedDevice, EngineConfig(gpu_state_mib=1))
    assert (backend.precision, backend.num_executors) == (Precision.BF16, 2)
    assert backend.memory_bytes() > 0
    executor, schema = backend.executor(), artifact.schema
    history, candidates = history_of(schema, 16, [16, 3]), candidates_of(schema, 4)
    lengths = (16, 3)

    def logits(of: Any) -> Float32Array:
        scored: Float32Array = of.score([UserState(of.encode(history), lengths)], candidates)
        return scored

    near(logits(executor), logits(reference), BOUNDS[torch.bfloat16])
