"""What a torch module must offer to be trained, built and served by rankd, and how one is found by its name.

Two shapes are accepted. A `RankingModel` computes the user's history apart from the candidates:

    state  = model.encode(history)              once for a user
    logits = model.score(state, candidates)     for any number of candidates
    added  = model.extend(state, new)           optional: what new events add to a state, where the model is causal

A `JointModel` is a plain `forward(history, candidates) -> logits`; it is served too, without a reusable state.

Both are constructed as `cls(schema, **options)`. Inputs are dicts of tensors, named and shaped as
`features.schema.history_specs` and `candidate_specs` say; logits are (B, C, K) float32. No candidate may see another
one, so that scores do not depend on how candidates are cut into calls: `rankd build` checks that.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rankd.errors import ArtifactError, ConfigError, nearest
from rankd.features.schema import EmbeddedFeature, FeatureSchema

Tensors = Mapping[str, Tensor]


@runtime_checkable
class RankingModel(Protocol):
    """A ranker whose user state is computed apart from the candidates."""

    def encode(self, history: Tensors) -> dict[str, Tensor]:
        """Named state tensors of a history; the first dimension of each is B."""
        ...

    def score(self, state: Tensors, candidates: Tensors) -> Tensor:
        """Logits (B, C, K) of the candidates given a state."""
        ...


@runtime_checkable
class ExtendableModel(RankingModel, Protocol):
    """A ranker whose state grows with the history instead of being computed anew."""

    def extend(self, state: Tensors, new: Tensors) -> dict[str, Tensor]:
        """What A new events a block add to a state, named as the state is.

        `new` has the inputs of `encode` with A tokens in place of T. A state tensor with a T dimension (it is laid out
        (B, N, ..., T, ...)) is answered with the A new tokens alone, any other one whole.
        """
        ...


@runtime_checkable
class EmbeddedModel(Protocol):
    """A ranker whose embedding tables can live outside of its graph: its inputs then have what was looked up and pooled
    (`history_embedded`, `candidate_embedded`, `context_embedded`) beside ids, which it does not read."""

    def embedded(self) -> tuple[EmbeddedFeature, ...]:
        """What is pooled; those that go into one input, in the order of its columns."""
        ...

    def tables(self) -> dict[str, Tensor]:
        """The tables (rows, D) by name; row 0 is nobody's."""
        ...


@runtime_checkable
class PooledModel(EmbeddedModel, Protocol):
    """One that reads of a history nothing but sums, which are looked up with the rest: then it has no state."""

    def score_embedded(self, candidates: Tensors) -> Tensor:
        """Logits (B, C, K) of `candidate_embedded` and `context_embedded` with the numbers of candidates and user."""
        ...


def is_extendable(model: nn.Module) -> bool:
    """Whether new events can be appended to the model's state."""
    return isinstance(model, ExtendableModel)


def is_split(model: nn.Module) -> bool:
    """Whether the model has a state of its own; if not it is a plain forward(history, candidates)."""
    return isinstance(model, RankingModel)


def is_pooled(model: nn.Module, schema: FeatureSchema) -> bool:
    """Whether the model's tables are outside, and its history is one more sum of theirs."""
    return bool(schema.embedded) and isinstance(model, PooledModel)


def logits_of(model: nn.Module, history: Tensors, candidates: Tensors) -> Tensor:
    """Logits (B, C, K), whichever of the shapes the model has. Training and parity checks call this."""
    if "candidate_embedded" in candidates and isinstance(model, PooledModel):
        return model.score_embedded(candidates)
    if isinstance(model, RankingModel):
        return model.score(model.encode(history), candidates)
    result: Tensor = model(history, candidates)
    return result


BUILT_IN = {
    "climber": "rankd.models.climber:Climber",
    "sasrec": "rankd.models.sasrec:SASRec",
    "hstu": "rankd.models.hstu:Hstu",
    "dlrm": "rankd.models.dlrm:Dlrm",
}


def create_model(kind: str, schema: FeatureSchema, options: Mapping[str, Any]) -> nn.Module:
    """A new model: `kind` is a built-in name, "package.module:Class" or "path/to/file.py:Class".

    Raises:
        ConfigError: no such model, or its constructor does not take these options.
    """
    cls = _model_class(kind)
    try:
        model = cls(schema, **options)
    except TypeError as error:
        raise ConfigError(f"model '{kind}' does not take the options {dict(options)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model '{kind}' is a {type(model).__name__}; it has to be a torch.nn.Module")
    return model


def load_model(kind: str, schema: FeatureSchema, options: Mapping[str, Any], weights: Path) -> nn.Module:
    """A trained model: made by its name, its weights read from a safetensors file; ready to score.

    Raises:
        ConfigError: as `create_model`. ArtifactError: the weights are not those of this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = create_model(kind, schema, options)
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{weights} is not of model '{kind}': {error}") from error
    return model.eval()


def _model_class(kind: str) -> Any:
    target = BUILT_IN.get(kind, kind)
    location, colon, name = target.rpartition(":")
    if not colon:
        raise ConfigError(
            f"unknown model '{kind}'; built in are {', '.join(BUILT_IN)}; "
            f"one of your own is named 'package.module:Class' or 'file.py:Class'.{nearest(kind, BUILT_IN)}"
        )
    try:
        module = _load_file(Path(location)) if location.endswith(".py") else importlib.import_module(location)
    except (ImportError, OSError) as error:
        raise ConfigError(f"model '{kind}': cannot import '{location}': {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"model '{kind}': '{location}' has no class '{name}'.{nearest(name, dir(module))}")
    return getattr(module, name)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rankd_model_{path.stem}", path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no Python file at {path.resolve()}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
