"""The elastic models of a server: which of their versions are variants, and which of those may be used.

In: the configuration, and what the repository has loaded. Out: an `ElasticModel` for each, which says who answers.
Everything that a version has to be to stand in for the full one is in `variant_check.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from rankd.artifact import Manifest
from rankd.engine.backend import EngineConfig, Pinning
from rankd.errors import ConfigError, nearest
from rankd.observe.elastic_metrics import ElasticFigures
from rankd.ranker import Ranker
from rankd.schedule.core_sharing import Cores
from rankd.schedule.elastic_config import check_elastic
from rankd.serve.elastic_model import ElasticModel
from rankd.serve.settings import ServeConfig
from rankd.serve.variant_check import why_not_variant


class ElasticModels:
    """Of an elastic model the newest version that is no variant is the full one."""

    def __init__(self, config: ServeConfig) -> None:
        """Check what types do not say.

        Raises:
            ConfigError: as `check_elastic`.
        """
        for name, elastic in config.elastic.items():
            check_elastic(name, elastic, config.schedule.max_waiting_ms)
        self._models = {name: ElasticModel(name, elastic) for name, elastic in config.elastic.items()}

    def check(self, names: Sequence[str], versions_of: Callable[[str], Sequence[str]]) -> None:
        """Hold the configuration against what is on disk; `names` are the models that are to be loaded.

        Raises:
            ConfigError: a model or a variant that is not there.
        """
        for name in self._models:
            if name not in names:
                there = ", ".join(names)
                raise ConfigError(
                    f"elastic.{name}: no model '{name}' is to be loaded; there is: {there}.{nearest(name, names)}"
                )
            known = versions_of(name)
            for variant in self.variants_of(name):
                if variant not in known:
                    raise ConfigError(
                        f"elastic.{name}: variants names '{variant}', and the model has the versions "
                        f"{', '.join(known)}.{nearest(variant, known)}"
                    )

    def variants_of(self, name: str) -> tuple[str, ...]:
        """The versions that are variants, the one that is to come first first; none of a model that is not elastic."""
        return self._models[name].config.variants if name in self._models else ()

    def full_of(self, name: str, loaded: Mapping[str, Ranker]) -> Ranker | None:
        """Of the versions that are loaded, the newest last, the full one."""
        variants = self.variants_of(name)
        return next((loaded[version] for version in reversed(list(loaded)) if version not in variants), None)

    def why_not(self, full: Ranker, variant: Manifest) -> str:
        """Why a version cannot answer for the full one, or ""."""
        return why_not_variant(full.manifest, variant, self._models[full.manifest.name].config.bounds)

    def engine_of(self, name: str, config: EngineConfig) -> tuple[EngineConfig, Cores | None]:
        """How a model's versions are computed, and on which cores together. Those of an elastic one have more executors
        than there are cores, so that none can have a core to itself."""
        if name not in self._models:
            return config, None
        return replace(config, pinning=Pinning.OFF), self._models[name].cores

    def use(self, name: str, loaded: Mapping[str, Ranker], reasons: Mapping[str, str]) -> None:
        """From now on those variants may answer that are loaded and that the gate lets; `reasons` says why others are
        not loaded. A model that is not elastic is none of ours."""
        if name not in self._models:
            return
        full, usable, troubles = self.full_of(name, loaded), list[Ranker](), dict[str, str]()
        for version in self.variants_of(name):
            if full is None:
                trouble = "no full version is loaded"
            elif version not in loaded:
                trouble = reasons.get(version) or "it is not loaded"
            else:
                trouble = self.why_not(full, loaded[version].manifest)
            if trouble:
                troubles[version] = trouble
            else:
                usable.append(loaded[version])
        self._models[name].use(full, usable, troubles)

    def of(self, full: Ranker) -> ElasticModel | None:
        """Who chooses between a version and its variants; None if it is not the full one of an elastic model."""
        elastic = self._models.get(full.manifest.name)
        return elastic if elastic is not None and elastic.answers_for(full) else None

    def figures(self) -> dict[str, ElasticFigures]:
        """Snapshots by model."""
        return {name: elastic.figures() for name, elastic in self._models.items()}
