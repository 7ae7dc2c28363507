"""The dense model under each of torch's attentions computes what the split model does: on the processor, uncompiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rankd.artifact import Artifact
from rankd.bench.engine_suite.contestant_messages import (
    CONTESTANTS,
    GPU,
    Family,
    Load,
    Work,
    pack_features,
    together,
    unpack_features,
)
from rankd.bench.engine_suite.contestants import load_calls
from rankd.bench.engine_suite.dense_attention import Attention
from rankd.bench.engine_suite.dense_model import DenseRanker, dense_form
from rankd.bench.engine_suite.engine_findings import best_peer, ratios
from rankd.bench.engine_suite.gpu_contestants import torch_calls
from rankd.bench.flops import Flops
from rankd.bench.parity import torch_logits
from rankd.demo import MODELS
from rankd.engine.backend import Precision
from rankd.errors import EngineFailure
from rankd.models.hstu import Hstu
from rankd.types import Features
from tests.engine.test_native_climber import candidates_of, history_of, model_of, schema_of, tensors

OPTIONS = {"width": 24, "heads": 2, "layers": 2, "ffn_ratio": 2, "hidden": 16}
UNFUSED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@torch.inference_mode()
@UNFUSED
@pytest.mark.parametrize("attention", Attention, ids=lambda one: one.value)
@pytest.mark.parametrize(("lengths", "count"), [([20, 3], 5), ([0, 20], 1), ([7, 0], 17)])
def test_every_attention_scores_as_the_split_model(attention: Attention, lengths: list[int], count: int) -> None:
    schema = schema_of(2)
    model = model_of(schema, OPTIONS)
    history, candidates = tensors(history_of(schema, 20, lengths)), tensors(candidates_of(schema, count))
    expected = model.score(model.encode(history), candidates)
    made = dense_form(model, attention)(history, candidates)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@UNFUSED
@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.FLEX], ids=lambda one: one.value)
def test_users_side_by_side_have_masks_of_their_own(attention: Attention) -> None:
    schema = schema_of(1)
    model = dense_form(model_of(schema, OPTIONS), attention)
    sides = [
        (tensors(history_of(schema, 20, [length], seed)), tensors(candidates_of(schema, 4)))
        for seed, length in enumerate((20, 6))
    ]
    together = [
        {name: torch.cat([side[name] for side in part]) for name in part[0]} for part in zip(*sides, strict=True)
    ]
    alone = torch.cat([model(*side) for side in sides])
    torch.testing.assert_close(model(*together), alone, rtol=1e-4, atol=1e-4)


def test_attention_without_softmax_has_no_fused_form() -> None:
    schema = schema_of(1)
    model = DenseRanker(Hstu(schema, width=16, heads=1, layers=1, hidden=8).eval(), Attention.SDPA)
    with pytest.raises(EngineFailure, match="HstuLayer is no softmax"):
        model(tensors(history_of(schema, 8, [8])), tensors(candidates_of(schema, 2)))


def load_of(family: Family, requests: list[Features], scratch: Path) -> Load:
    path = str(MODELS / "demo" / "1")
    return Load(family, Precision.FP32, GPU, 1, path, str(scratch), [pack_features(one) for one in requests])


def test_calls_of_a_family_give_the_logits_of_every_request(tmp_path: Path) -> None:
    artifact = Artifact.open(MODELS / "demo" / "1")
    schema = artifact.schema
    requests = [Features(history_of(schema, 16, [16, 3]), candidates_of(schema, count), count - 1) for count in (4, 6)]
    calls = torch_calls(load_of(Family.SDPA, requests, tmp_path), requests, "cpu")[Work.COLD]
    for number, expected in enumerate(torch_logits(artifact, requests)):
        np.testing.assert_allclose(calls.logits(number), expected[None], atol=1e-3)
        assert calls.logits(number).shape[1] == requests[number].num_candidates


def test_a_family_scores_several_users_in_a_call(tmp_path: Path) -> None:
    artifact = Artifact.open(MODELS / "demo" / "1")
    schema = artifact.schema
    alone = [
        Features(history_of(schema, 16, lengths, seed), candidates_of(schema, 4), 4)
        for seed, lengths in enumerate(([16, 3], [2, 9]))
    ]
    (both,) = [unpack_features(one) for one in together([pack_features(one) for one in alone], 2)]
    calls = torch_calls(load_of(Family.EAGER, [both], tmp_path), [both], "cpu")[Work.COLD]
    np.testing.assert_allclose(calls.logits(0), np.stack(torch_logits(artifact, alone)), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "reason"),
    [(Family.ORT, "has no CUDAExecutionProvider"), (Family.TENSORRT, "has no TensorrtExecutionProvider")],
)
def test_what_is_not_installed_is_left_out_with_a_reason(family: Family, reason: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match=reason):
        load_calls(load_of(family, [], tmp_path))


def test_our_engine_on_a_gpu_is_compared_with_others_there() -> None:
    p50 = {
        "eager-fp32": 600.0,
        "ort-fp32": 300.0,
        "eager-cuda-bf16": 8.0,
        "sdpa-cuda-bf16": 6.0,
        "flex-cuda-bf16": 5.0,
        "rankd-cuda-bf16-cold": 2.0,
        "rankd-cuda-bf16-warm": 1.0,
    }
    assert set(p50) <= set(CONTESTANTS)
    assert best_peer(p50, on_gpu=True) == "flex-cuda-bf16"
    assert best_peer(p50) == "ort-fp32"
    assert ratios(p50, Precision.BF16, Flops(4e9, 3e9, 2e9, 1e9), {("cuda", Precision.BF16): 4000.0}) == {
        "peak_share": 0.25,
        "speedup_cold": 4.0,
        "speedup_warm": 8.0,
        "over_best_peer_cold": 2.5,
    }
