"""Prices are found again from what they made, probes shrink what they are named for, and engines refuse by name."""

from __future__ import annotations

import numpy as np
import pytest

from rankd.build.pack import catalogue_of
from rankd.compress.compression_recipe import ReferenceRequest
from rankd.compress.layer_prices import Yardstick, fit_prices, measure_ms, measure_prices, probes, yardstick
from rankd.compress.model_work import Work
from rankd.compress.surgery import Subject
from rankd.engine.backend import Precision
from rankd.errors import BuildError, ConfigError
from rankd.models.protocol import create_model
from rankd.train.recipe import ModelChoice
from tests.compress.made_models import subject_of
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
STICK = Yardstick(12, 64, 1.0)
REFERENCE = ReferenceRequest(target="reference")


def subject() -> Subject:
    model = create_model("climber", DATASET.schema, RECIPE.model.options)
    return Subject(RECIPE.model, DATASET.schema, model.eval())


def test_prices_are_found_again() -> None:
    random = np.random.default_rng(1)
    prices = Work(0.05, 2e-9, 5e-9, 1e-9, 3e-9)
    works = [Work(*(random.integers(1, 9), *random.uniform(1e6, 9e6, 4))) for _ in range(9)]
    samples = [(work, 0.2 + sum(a * b for a, b in zip(prices, work, strict=True))) for work in works]
    made = fit_prices(samples)
    assert made.call_ms == pytest.approx(0.2, rel=1e-4)
    assert made.prices == pytest.approx(prices, rel=1e-4)
    assert made.worst_error < 1e-6
    assert made.predicted_ms(works[0]) == pytest.approx(samples[0][1])


def test_prices_are_never_negative_and_the_error_is_said() -> None:
    samples = [(Work(1, 10.0, 0, 0, 0), 5.0), (Work(1, 20.0, 0, 0, 0), 1.0)]
    made = fit_prices(samples)
    assert min(made.call_ms, *made.prices) >= 0
    assert made.worst_error > 0.3


def test_every_probe_has_less_work_than_the_model() -> None:
    whole, *smaller = [STICK.work(probe.anatomy()).flops for probe in probes(subject())]
    assert len(smaller) == 6
    assert all(work < whole for work in smaller)


def test_an_engine_is_measured() -> None:
    prices = measure_prices(subject(), catalogue_of(DATASET), REFERENCE, STICK)
    assert prices.predicted_ms(STICK.work(subject().anatomy())) > 0
    assert np.isfinite(prices.worst_error)


def test_a_target_that_cannot_is_refused_by_name() -> None:
    catalogue = catalogue_of(DATASET)
    with pytest.raises(ConfigError, match="Did you mean 'openvino'"):
        measure_ms(subject(), catalogue, ReferenceRequest(target="openvin"), STICK)
    with pytest.raises(BuildError, match="native in fp32: the native engine computes in bf16 alone"):
        measure_ms(subject(), catalogue, ReferenceRequest(target="native", precision=Precision.FP32), STICK)
    uneven = subject_of("sasrec", {"width": 8})
    with pytest.raises(BuildError, match="native"):
        measure_ms(uneven, catalogue, ReferenceRequest(target="native", precision=Precision.BF16), STICK)


def test_a_request_fills_a_bucket_of_the_model() -> None:
    schema = DATASET.schema
    assert yardstick(ReferenceRequest(), schema).candidates == schema.max_candidates
    assert yardstick(ReferenceRequest(candidates=5), schema).candidates == 8
    with pytest.raises(BuildError, match="at most 64"):
        yardstick(ReferenceRequest(candidates=65), schema)


def test_choices_of_models_are_kept() -> None:
    assert next(probes(subject())).choice == ModelChoice("climber", RECIPE.model.options)
