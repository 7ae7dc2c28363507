"""What a model's sizes cost in milliseconds on this machine: an engine is measured on a few models, and a price found
for each kind of work.

In: a model, a catalogue, a recipe's reference request. Out: `PriceList`; `pruning_plan.py` prunes by it what
costs time.

The probes are the model itself and smaller ones of the same family. Prices are not below 0, and fitted so that relative
errors count (non-negative least squares); the largest relative error is kept beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from scipy.optimize import nnls

from rankd.artifact import Artifact, EngineRecord, Manifest
from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import BuildOptions, Contents, draft
from rankd.compress.anatomy import Anatomy
from rankd.compress.compression_recipe import ReferenceRequest
from rankd.compress.model_work import Work, encode_work, score_work
from rankd.compress.surgery import Indices, Kept, KeptLayer, Subject, pruned
from rankd.engine.backend import Backend, EngineConfig, Precision
from rankd.engine.targets import check_target, load_backend, why_not, why_not_model
from rankd.engine.warming import Shapes, encode_ms, score_ms
from rankd.errors import BuildError
from rankd.features.catalogue import Catalogue
from rankd.features.schema import FeatureSchema

INT8_TARGET = "openvino"
"""The target that computes in int8."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The request whose cost counts: `history` tokens a block, C candidates, and which share of requests encodes."""

    history: int
    candidates: int
    encodes: float

    def work(self, anatomy: Anatomy) -> Work:
        """The work of one request, on average."""
        encoding = Work(*(self.encodes * amount for amount in encode_work(anatomy, self.history)))
        return encoding.plus(score_work(anatomy, self.history, self.candidates))

    def flops(self, anatomy: Anatomy) -> float:
        """Its floating-point operations."""
        return self.work(anatomy).flops


@dataclass(frozen=True, slots=True)
class PriceList:
    """Milliseconds of a call as such and of each kind of `Work`; `worst_error` is the largest relative error."""

    call_ms: float
    prices: Work
    worst_error: float

    def predicted_ms(self, work: Work) -> float:
        """Milliseconds of a request's work."""
        return self.call_ms + sum(price * amount for price, amount in zip(self.prices, work, strict=True))


def yardstick(request: ReferenceRequest, schema: FeatureSchema) -> Yardstick:
    """The recipe's request on a schema: its candidates fill a bucket, as calls do."""
    wanted = request.candidates or schema.max_candidates
    buckets = [bucket for bucket in schema.candidate_buckets if bucket >= wanted]
    if not buckets:
        raise BuildError(f"request.candidates is {wanted}; a call of this model takes at most {schema.max_candidates}")
    return Yardstick(schema.history_length, min(buckets), request.encodes)


def measure_prices(subject: Subject, catalogue: Catalogue, request: ReferenceRequest, stick: Yardstick) -> PriceList:
    """Measure the model and those of its probes that the target takes; seconds to a minute.

    Raises:
        ConfigError: no such target. BuildError: it does not run here, or not such a model.
    """
    samples = [
        (stick.work(probe.anatomy()), measure_ms(probe, catalogue, request, stick))
        for probe in probes(subject)
        if probe is subject or not why_not_model(request.target, probe.choice.kind, probe.choice.options, probe.schema)
    ]
    return fit_prices(samples)


def measure_ms(subject: Subject, catalogue: Catalogue, request: ReferenceRequest, stick: Yardstick) -> float:
    """Milliseconds of the reference request on the target, one thread, the best of a few.

    Raises:
        ConfigError: no such target. BuildError: it does not run here, or not such a model.
    """
    return request_ms(*compiled(subject, catalogue, request, executors=1), stick)


def request_ms(backend: Backend, manifest: Manifest, stick: Yardstick) -> float:
    """Milliseconds of the reference request on one executor, the best of a few."""
    executor, shapes = backend.executor(), Shapes(manifest, backend.state_type)
    encoding_ms = encode_ms(executor, shapes, shapes.rooms[-1])
    return stick.encodes * encoding_ms + score_ms(executor, shapes, stick.candidates, 1)


def compiled(
    subject: Subject,
    catalogue: Catalogue,
    request: ReferenceRequest,
    executors: int,
    int8: Int8Plan | None = None,
) -> tuple[Backend, Manifest]:
    """A model on the target and in the precision of a request, without the checks of a build; with scales in int8, on
    the target that computes in it. 0 executors: the machine's number.

    Raises:
        ConfigError: no such target. BuildError: it does not run here, or not such a model.
    """
    target, precision = (request.target, request.precision) if int8 is None else (INT8_TARGET, Precision.INT8)
    check_target(target)
    choice = subject.choice
    reason = why_not(target, precision) or why_not_model(target, choice.kind, choice.options, subject.schema)
    if reason:
        raise BuildError(f"cannot measure {target} in {precision.value}: {reason}")
    contents = Contents(subject.model, choice.kind, subject.schema, catalogue, (), choice.options)
    options = BuildOptions("probe", "1", precision, (target,), int8=int8)
    with tempfile.TemporaryDirectory(prefix="rankd-probe-") as name:
        folder = Path(name)
        record = EngineRecord(precision.value, {precision.value: 0.0})
        manifest = msgspec.structs.replace(draft(folder, contents, options), engines={target: record})
        config = EngineConfig(target=target, precision=precision, executors=executors)
        return load_backend(Artifact(folder, manifest), config), manifest


def probes(subject: Subject) -> Iterator[Subject]:
    """The model, and what is left of it with half of the heads, neurons, layers or channels, and of all."""
    yield subject
    anatomy = subject.anatomy()
    cuts = [{"heads": 0.5}, {"ffn": 0.5}, {"ffn": 0.25}, {"layers": 0.5}]
    if anatomy.has_prunable_width():
        cuts += [{"width": 0.5}, {"heads": 0.5, "ffn": 0.5, "width": 0.5}]
    for cut in cuts:
        yield pruned(subject, _first(anatomy, cut))


def fit_prices(samples: list[tuple[Work, float]]) -> PriceList:
    """The prices that explain measured milliseconds best, relative errors counting alike."""
    measured = np.asarray([ms for _, ms in samples])
    amounts = np.asarray([(1.0, *work) for work, _ in samples]) / measured[:, None]
    scale = np.maximum(np.abs(amounts).max(axis=0), 1e-300)  # FLOPs beside a count of layers
    prices = nnls(amounts / scale, np.ones(len(samples)))[0] / scale
    made = PriceList(float(prices[0]), Work(*(float(price) for price in prices[1:])), 0.0)
    errors = [abs(made.predicted_ms(work) / ms - 1) for work, ms in samples]
    return replace(made, worst_error=float(max(errors)))


def _first(anatomy: Anatomy, shares: dict[str, float]) -> Kept:
    """The first heads, neurons, layers and channels, as many as the shares say, at least one of each."""

    def some(count: int, what: str) -> Indices:
        return np.arange(max(int(count * shares.get(what, 1.0)), 1))

    blocks = tuple(
        tuple(
            KeptLayer(int(number), some(stack[number].heads, "heads"), some(stack[number].ffn, "ffn"))
            for number in some(len(stack), "layers")
        )
        for stack in anatomy.blocks
    )
    return Kept(some(anatomy.width, "width"), blocks)
