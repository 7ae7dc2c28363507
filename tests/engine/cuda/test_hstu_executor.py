"""HSTU through the executor on CPU tensors against the torch model: both forms, states that grow, users, fp8 pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.cuda.cuda_executor import CudaExecutor, CudaModel
from rankd.engine.cuda.hstu_layers import hstu_weights
from rankd.engine.cuda.paged_states import PageType
from rankd.engine.cuda.ranker_weights import WeightReader
from rankd.engine.cuda.state_pool import StatePool
from rankd.features.schema import FeatureSchema
from rankd.models.hstu import Hstu
from rankd.types import UserState
from tests.engine.cuda.interpreted_device import InterpretedDevice
from tests.engine.cuda.test_cuda_executor import BOUNDS, SMALL, USERS, check_as_torch, near, specs_of, state_of
from tests.engine.test_native_climber import candidates_of, history_of, schema_of, tensors

OPTIONS: dict[str, Any] = {"width": 24, "heads": 2, "layers": 2, "hidden": 16, "form": "paper"}
DLRM_V3 = OPTIONS | {"form": "dlrm-v3"}


def model_of_hstu(
    schema: FeatureSchema, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Hstu, CudaModel]:
    """An HSTU whose every parameter is random, and its weights as executors have them."""
    torch.manual_seed(0)
    hstu = Hstu(schema, **options).eval()
    with torch.no_grad():
        for name, parameter in hstu.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    weights = {name: tensor.numpy() for name, tensor in hstu.state_dict().items()}
    loaded = hstu_weights(WeightReader(weights, dtype, lambda tensor: tensor), schema, options)
    specs = specs_of(schema, loaded.attention_width, loaded.layers.depth)
    return hstu, CudaModel(loaded, schema, specs, dtype, SMALL)


def made(
    schema: FeatureSchema, options: dict[str, Any], dtype: torch.dtype, kind: PageType | None = None
) -> tuple[Hstu, CudaExecutor]:
    """A random HSTU, and an executor over its weights."""
    hstu, model = model_of_hstu(schema, options, dtype)
    shape, device = model.state_shape(kind), InterpretedDevice()
    return hstu, CudaExecutor(model, StatePool(device, shape, USERS * shape.pages_a_user), device)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("blocks", "features", "options", "lengths", "count"),
    [
        (1, True, DLRM_V3, [19], 17),
        (2, True, OPTIONS, [5, 17], 3),
        (1, False, OPTIONS | {"heads": 1, "direct": False, "layers": 1}, [0], 3),
    ],
)
def test_computes_what_torch_computes(
    dtype: torch.dtype, blocks: int, features: bool, options: dict[str, Any], lengths: list[int], count: int
) -> None:
    schema = schema_of(blocks, features)
    hstu, executor = made(schema, options, dtype)
    check_as_torch(hstu, executor, schema, lengths, count, BOUNDS[dtype])


@torch.inference_mode()
@pytest.mark.parametrize("options", [OPTIONS, DLRM_V3], ids=["paper", "dlrm-v3"])
def test_a_state_that_grew_scores_as_the_whole_and_users_together_as_alone(options: dict[str, Any]) -> None:
    schema = schema_of(1)
    hstu, executor = made(schema, options, torch.float32)
    whole = history_of(schema, 20, [20])
    first, rest = (
        {name: array[:, :, part] if array.ndim > 2 else np.full_like(array, size) for name, array in whole.items()}
        for part, size in ((slice(0, 15), 15), (slice(15, 20), 5))
    )
    added = executor.extend(state := state_of(executor, first), rest)
    near(added["keys_values"], hstu.extend(hstu.encode(tensors(first)), tensors(rest))["keys_values"].numpy(), 1e-5)
    joined = {
        "keys_values": np.concatenate([state.arrays["keys_values"], added["keys_values"]], 4),
        "times": whole["history_time"],
        "lengths": added["lengths"],
    }
    candidates = candidates_of(schema, 5)
    expected = hstu.score(hstu.encode(tensors(whole)), tensors(candidates)).numpy()
    grown = UserState(joined, (20,))
    near(executor.score([grown], candidates), expected, 1e-5)
    both = {name: np.concatenate([array, array]) for name, array in candidates.items()}
    together = executor.score([state, grown], both)
    near(together[1:], expected, 1e-5)
    near(together[:1], executor.score([state], candidates), 1e-6)


@torch.inference_mode()
def test_pages_in_e4m3_keep_the_scores() -> None:
    schema = schema_of(1)
    hstu, executor = made(schema, DLRM_V3, torch.bfloat16, PageType.FP8)
    history, candidates = history_of(schema, 20, [20]), candidates_of(schema, 9)
    expected = hstu.score(hstu.encode(tensors(history)), tensors(candidates)).numpy()
    near(executor.score([state_of(executor, history)], candidates), expected, 4e-2)
