"""The recipe of a compression, a TOML file: steps that make a model smaller, fine-tuning, and the gate's bounds.

Steps are done in their order; quantization, if any, is the last thing. A new kind of step is a Struct here, a place in
`Step`, and its doing in `steps.py`.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from rankd.engine.backend import Precision
from rankd.errors import ConfigError, nearest
from rankd.train.ranking_metrics import GATED

Share = Annotated[float, Meta(gt=0.0, lt=1.0)]
Positive = Annotated[float, Meta(gt=0.0)]
Weight = Annotated[float, Meta(ge=0.0)]
Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0)]


BOUNDS = {"ndcg@10": 0.99, "gauc": 0.999, "ne": 0.99}
"""MLPerf's 99% and 99.9% of the original."""


class Structure(Enum):
    """What can be left out."""

    HEADS = "heads"
    FFN = "ffn"
    LAYERS = "layers"
    WIDTH = "width"


class Criterion(Enum):
    """How it is judged what matters least; the last two are controls for the first."""

    TAYLOR = "taylor"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Matrix(Enum):
    """A projection of a layer that can be a product of two."""

    QKV = "qkv"
    OUT = "out"
    UP = "up"
    DOWN = "down"


class Prune(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="prune"):
    """Leave structures out until the model costs `flops` times the original, or `predicted_ms`; one of the two.

    Neurons and channels leave in such numbers that the rest is a multiple of `ffn_multiple` and `width_multiple`.
    `uniform`: every layer keeps as many heads and neurons, and every block as many layers, as the native engine needs.
    """

    structures: Annotated[tuple[Structure, ...], Meta(min_length=1)] = tuple(Structure)
    criterion: Criterion = Criterion.TAYLOR
    flops: Share | None = None
    predicted_ms: Positive | None = None
    uniform: bool = False
    ffn_multiple: Count = 16
    width_multiple: Count = 16
    requests: Count = 512
    seed: Seed = 0


class Factorise(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="factorise"):
    """Projections become products of two, of `rank` times their full rank, rounded up to `multiple`."""

    rank: Share
    matrices: Annotated[tuple[Matrix, ...], Meta(min_length=1)] = (Matrix.UP, Matrix.DOWN)
    multiple: Count = 8


class ShareLayers(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="share"):
    """Each block keeps the weights of `layers` layers; each is used several times, so that the depth stays."""

    layers: Count = 1


class Student(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="student"):
    """A new model of the same kind with other `options`; what has the same name and shape starts from the original."""

    options: Annotated[dict[str, Any], Meta(min_length=1)]
    seed: Seed = 7


Step = Prune | Factorise | ShareLayers | Student


class FineTuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Training of what is left. The loss is `labels` times that of `rankd train`, plus distillation from the original.

    `logits` weighs the cross-entropy to its probabilities, `ranks` the divergence of its ranking of each request's
    candidates, at `temperature`. Epochs 0: none. The rest is as the run was trained.
    """

    epochs: Annotated[int, Meta(ge=0)] = 2
    learning_rate: Positive = 3e-4
    labels: Weight = 1.0
    logits: Weight = 1.0
    ranks: Weight = 1.0
    temperature: Positive = 1.0


class QuantizedTuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Training in fake int8, on the losses of `FineTuning`: weights and activations are rounded as the graphs will."""

    epochs: Count = 1
    learning_rate: Positive = 1e-4


class Quantize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Products with weights in int8, after all else. Scales are found on the newest `requests` requests before the
    gate's days, or on those of a file; fewer than `min_requests` different ones are refused.

    `max_error` is how much int8 may change a logit on these, as a share of the spread of a request's logits (both root
    mean squares): beyond it the layers that change them most stay in float. `finetune` trains the others to int8.
    """

    requests: Count = 256
    min_requests: Annotated[int, Meta(ge=8)] = 64
    max_error: Positive = 0.1
    seed: Seed = 0
    finetune: QuantizedTuning | None = None


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to be kept of each metric, as a share of the original's, on days that nobody trained on.

    `since` and `until` are dates (UTC, the second excluded); left out, the test time of the log's description.
    """

    bounds: Annotated[dict[str, Share], Meta(min_length=1)] = msgspec.field(default_factory=lambda: dict(BOUNDS))
    since: str = ""
    until: str = ""
    min_users: Annotated[int, Meta(ge=20)] = 200
    sampled: Count = 100
    seed: Seed = 0


class ReferenceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request of which the cost is counted: the longest history, `candidates` (0: the widest bucket), and which
    share of the requests has to encode its history because no state of it is kept. The rest is where it is measured."""

    candidates: Annotated[int, Meta(ge=0)] = 0
    encodes: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    target: str = "openvino"
    precision: Precision = Precision.FP32


class CompressionRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    steps: tuple[Step, ...] = ()
    request: ReferenceRequest = ReferenceRequest()
    finetune: FineTuning = FineTuning()
    quantize: Quantize | None = None
    gate: Gate = Gate()


def check_recipe(recipe: CompressionRecipe) -> None:
    """What types do not say.

    Raises:
        ConfigError: nothing to do, fewer requests for calibration than are needed, a pruning with no budget or with
            two, fine-tuning without a loss, an unknown metric, no precision.
    """
    plan = recipe.quantize
    if not recipe.steps and plan is None:
        raise ConfigError("the recipe does nothing; give it [[steps]], or [quantize], or both")
    if plan is not None and plan.requests < plan.min_requests:
        raise ConfigError(
            f"quantize: requests is {plan.requests}, and fewer than min_requests = {plan.min_requests} are refused"
        )
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Prune) and (step.flops is None) == (step.predicted_ms is None):
            raise ConfigError(f"steps[{number}]: a pruning needs one of flops = SHARE and predicted_ms = MILLISECONDS")
    losses = recipe.finetune.labels + recipe.finetune.logits + recipe.finetune.ranks
    if not losses and (recipe.finetune.epochs or (plan is not None and plan.finetune is not None)):
        raise ConfigError(
            "finetune: labels, logits and ranks are all 0; give one of them a weight, or tune nothing: epochs = 0 and "
            "no [quantize.finetune]"
        )
    if recipe.request.precision in (Precision.AUTO, Precision.INT8):
        raise ConfigError(
            f"request.precision is '{recipe.request.precision.value}'; say fp32 or bf16, so that the cost is of one "
            "engine that needs no calibration"
        )
    for name in recipe.gate.bounds:
        if name not in GATED:
            raise ConfigError(f"gate.bounds: no metric '{name}'; there is: {', '.join(GATED)}.{nearest(name, GATED)}")
