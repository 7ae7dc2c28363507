"""Scales and what stays in float: the least error, and the layer that hurts is found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankd.build.export import export
from rankd.build.pack import parity_requests
from rankd.compress.compression_recipe import Quantize
from rankd.compress.int8_search import best_limit, search_int8
from rankd.errors import BuildError, DataError
from rankd.models.protocol import create_model
from rankd.types import Features, Float32Array
from tests.train.small_log import small_dataset

DATASET = small_dataset()
SIZES = {"width": 32, "heads": 2, "layers": 2, "hidden": 16}


def model_of(seed: int = 0, kind: str = "climber") -> nn.Module:
    torch.manual_seed(seed)
    model = create_model(kind, DATASET.schema, SIZES if kind == "climber" else {"dim": 32})
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 if "tokens" not in name else 1.0)
    return model.eval()


def exported(model: nn.Module, folder: Path) -> Path:
    export(model, DATASET.schema, "openvino", folder)
    return folder


REQUESTS = parity_requests(DATASET, 24)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 3.0))
def test_a_limit_has_no_more_error_than_the_peak(seed: int, tail: float) -> None:
    magnitudes = np.abs(np.random.default_rng(seed).normal(size=5000)).astype(np.float32) ** tail

    def error(limit: float) -> float:
        step = limit / 127
        return float(np.mean((np.clip(np.rint(magnitudes / step), -128, 127) * step - magnitudes) ** 2))

    peak, limit = float(magnitudes.max()), best_limit(magnitudes)
    assert 0.3 * peak <= limit <= peak * 1.0001
    assert error(limit) <= error(peak) * 1.05


def test_all_layers_are_int8_where_that_is_allowed(tmp_path: Path) -> None:
    found = search_int8(exported(model_of(), tmp_path), REQUESTS, Quantize(max_error=1.0))
    assert found.kept == ()
    assert 0 < found.error < 0.3
    assert set(found.plan.limits) == {"encode", "score"}
    assert found.layers > 20


def test_the_layer_that_hurts_stays_in_float(tmp_path: Path) -> None:
    """A neuron that is large and goes nowhere takes all levels of its layer: nothing is left of the others."""
    model = model_of()
    with torch.no_grad():
        layer = model.get_submodule("blocks.0.stack.1")
        up, down = layer.get_submodule("ffn.1"), layer.get_submodule("ffn.3")
        assert isinstance(up, nn.Linear)
        assert isinstance(down, nn.Linear)
        up.bias[0], down.weight[:, 0] = 1e4, 0.0
    found = search_int8(exported(model, tmp_path), REQUESTS, Quantize(max_error=0.15))
    assert "score: blocks.0.stack.1.ffn.3" in found.kept
    assert len(found.kept) <= 2
    assert found.error <= 0.15


def test_a_bound_that_int8_cannot_keep_is_refused_with_the_figures(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"int8 changes the logits by .* of their spread, and by .* layers in float"):
        search_int8(exported(model_of(), tmp_path), REQUESTS, Quantize(max_error=1e-9))


def test_a_model_without_a_state_is_quantized_too(tmp_path: Path) -> None:
    found = search_int8(exported(model_of(kind="dlrm"), tmp_path), REQUESTS, Quantize(max_error=1.0))
    assert list(found.plan.limits) == ["score"]


def test_features_that_make_no_numbers_are_refused(tmp_path: Path) -> None:
    candidates = dict(REQUESTS[1].candidates)
    numeric: Float32Array = candidates["candidate_numeric"].copy()
    numeric[0, 0, 0] = np.nan
    bad = Features(REQUESTS[1].history, candidates | {"candidate_numeric": numeric}, REQUESTS[1].num_candidates)
    with pytest.raises(DataError, match="read values that are no numbers"):
        search_int8(exported(model_of(), tmp_path), [*REQUESTS, bad], Quantize())
