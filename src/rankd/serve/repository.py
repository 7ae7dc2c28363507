"""The model repository: a folder of models and versions, loaded and unloaded while others serve.

    <root>/<model>/<version>/model.toml

Requests read one dict without a lock; whoever loads or unloads changes it under one. Events are kept in the feature
store, which all versions of a model share. A folder's names and those in its model.toml have to agree, so that a
version has one name in requests, answers and figures.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rankd.artifact import list_versions, read_manifest
from rankd.errors import ArtifactError, ConfigError, InvalidRequest, NotFound, Unavailable, nearest
from rankd.features.reading.shared_features import FeatureService
from rankd.features.requests import raw_events
from rankd.observe.feature_metrics import FeatureFigures
from rankd.observe.metrics import ServerMetrics
from rankd.observe.tracing import open_traces
from rankd.ranker import Ranker
from rankd.serve.elastic_models import ElasticModels
from rankd.serve.memory import keep_loaded, let_go
from rankd.serve.settings import ServeConfig
from rankd.types import Event

log = logging.getLogger("rankd")
SERVICE = "rankd"
"""In traces, unless it is named otherwise."""


class ModelState(Enum):
    """Where a version is in its life, in the words of the model repository extension."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class EventsStored:
    """What became of an append: how many events each version stores for the user now, the newest last; the item ids
    unknown to it; and whether the store has confirmed it (else it is in the outbox)."""

    stored: dict[str, int]
    unknown: tuple[str, ...]
    confirmed: bool


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One version as the index shows it; `reason` says why it is not ready."""

    name: str
    version: str
    state: ModelState
    reason: str = ""


class ModelRepository:
    """Models by name and version. `start()` loads the newest version of each; `close()` drains and unloads all.

    Of an elastic model the newest version is the newest that is no variant: that is the full one, and the variants are
    loaded with it.
    """

    def __init__(self, root: Path, config: ServeConfig, features: FeatureService | None = None) -> None:
        """Check the configuration.

        Raises:
            ConfigError: elastic models that cannot be as they are configured.
        """
        self.root, self.config, self.metrics = root, config, ServerMetrics()
        self.traces = open_traces(config.tracing, SERVICE)
        self._rankers: dict[str, dict[str, Ranker]] = {}
        self.elastic = ElasticModels(config)
        self._status: dict[tuple[str, str], ModelStatus] = {}
        self._features = features
        self._changes = threading.RLock()  # one load or unload at a time
        self._started = self._closing = self._features_started = False

    @property
    def ready(self) -> bool:
        """Whether everything that start-up was to load takes requests."""
        return self._started and not self._closing

    def start(self) -> None:
        """Load the newest version of every configured model.

        Raises:
            NotFound: no model there. ArtifactError: one of them is damaged. ConfigError: elastic models or variants
            that are not there.
        """
        names = self.config.models or self._model_names()
        if not names:
            raise NotFound(f"{self.root} holds no model; build one with `rankd build RUN --out {self.root}`")
        if len(names) > 1 and (self.config.histories or self.config.items):
            raise ConfigError(
                f"histories and items are of one model, {', '.join(names)} are to be loaded; name one in models"
            )
        self.elastic.check(names, self._known_versions)
        for name in names:
            if self._closing:
                return
            self.load(name)
        self._started = True

    @property
    def features(self) -> FeatureService:
        """The feature store of this server: the one that was given, or opened when the first model is.

        Raises:
            ConfigError: it cannot be used.
        """
        with self._changes:
            if self._features is None:
                self._features = FeatureService(self.config.features)
            if not self._features_started:
                self._features_started = True
                self._features.start()
            return self._features

    def feature_figures(self) -> dict[str, FeatureFigures]:
        """What stores and tables did, by namespace; without waiting for a load."""
        service = self._features
        return service.figures() if service is not None else {}

    def begin_draining(self) -> None:
        """Stop being ready, so that load balancers look elsewhere; requests are still answered."""
        self._closing = True

    def rankers(self) -> list[tuple[str, str, Ranker]]:
        """Everything that is ready: name, version, ranker."""
        return [(n, v, ranker) for n, versions in self._rankers.items() for v, ranker in versions.items()]

    def close(self) -> None:
        """Refuse new requests, finish the accepted ones, unload everything."""
        self.begin_draining()
        for name, version, _ in self.rankers():
            self.unload(name, version)
        with self._changes:
            if self._features is not None:
                self._features.close()
                self._features = None
        if self.traces is not None:
            self.traces.close()

    def get(self, name: str = "", version: str = "") -> Ranker:
        """The ranker of a model; without a name the only one there is, without a version the newest that is ready and
        no variant.

        Raises:
            NotFound: no such model or version. InvalidRequest: no name and several models. Unavailable: not loaded.
        """
        rankers = self._rankers
        if not name:
            if not rankers:
                raise Unavailable("no model is ready yet, or any more; see /v2/repository/index")
            if len(rankers) > 1:
                raise InvalidRequest(
                    f"this server has several models; give `model`, one of: {', '.join(sorted(rankers))}"
                )
            name = next(iter(rankers))
        versions = rankers.get(name)
        if versions:
            wanted = version or next(reversed(versions))
            if wanted in versions and (version or wanted not in self.elastic.variants_of(name)):
                return versions[wanted]
        known = self._known_versions(name)
        if not version:
            raise _none_ready(name)
        if version not in known:
            raise NotFound(
                f"model '{name}' has no version '{version}'; it has {', '.join(known)}.{nearest(version, known)}"
            )
        raise Unavailable(f"version '{version}' of model '{name}' is not loaded; load it or ask for another")

    def load(self, name: str, version: str = "") -> Ranker:
        """Load a version (the newest on disk if none is named), warm it, and let it take requests; then what variants
        there are of it. One that fails is left out, and says why in the log, the index and the metrics.

        Raises:
            NotFound: no such model or version. ArtifactError: it is damaged, or its folder has another name than it has
            itself; others are not touched.
        """
        with self._changes:
            ranker = self._load(name, self._version_on_disk(name, version))
            self._load_variants(name)
            return ranker

    def unload(self, name: str, version: str = "") -> None:
        """Take one version, or all versions of a model, out of service; accepted requests are finished first.

        Raises:
            NotFound: the model or version is not loaded.
        """
        with self._changes:
            versions = self._rankers.get(name, {})
            if not versions or (version and version not in versions):
                known = ", ".join(f"{n} {v}" for n, vs in self._rankers.items() for v in vs) or "nothing"
                raise NotFound(f"model '{name}' {version} is not loaded; loaded are: {known}")
            leaving = {v: ranker for v, ranker in versions.items() if not version or v == version}
            staying = {v: ranker for v, ranker in versions.items() if v not in leaving}
            others = {n: vs for n, vs in self._rankers.items() if n != name}
            for one in leaving:
                self._set(name, one, ModelState.UNLOADING)
            self._rankers = {**others, name: staying} if staying else others
            self._use_variants(name)
            del versions  # nothing here may hold them when they are let go
            while leaving:
                one, ranker = leaving.popitem()
                ranker.close()
                del ranker
                self._set(name, one, ModelState.UNAVAILABLE, "unloaded")
            let_go()

    def index(self) -> list[ModelStatus]:
        """Every version on disk or in memory."""
        found = {
            (n, v): ModelStatus(n, v, ModelState.UNAVAILABLE) for n in self._model_names() for v in self._on_disk(n)
        }
        return [{**found, **self._status}[key] for key in sorted({**found, **self._status})]

    def append_events(self, name: str, user_id: str, events: tuple[Event, ...]) -> EventsStored:
        """Append events to a user of a model: the next request sees them, whatever its version.

        The newest version decides whether they are taken at all, and the time of those that have none. An older one
        that does not know their event type or values goes without them, and is missing in the answer.

        Raises:
            InvalidRequest: the newest version refuses them; nothing is stored anywhere.
            StoreFailure: the store did not take them; nothing is stored anywhere.
            NotFound, Unavailable: as `get`.
        """
        name = self.get(name).manifest.name
        versions = self._rankers.get(name)
        if not versions:
            raise _none_ready(name)
        *older, newest = versions
        appended = versions[newest].features.append(user_id, events)
        stored = {}
        for version in older:
            with suppress(InvalidRequest):
                raw_events(events, versions[version].schema)
                stored[version] = len(versions[version].features.stored_history(user_id) or ())
        self.metrics.appended(name, len(events))
        return EventsStored({**stored, newest: appended.stored}, appended.unknown, appended.confirmed)

    def _load(self, name: str, version: str) -> Ranker:
        """A version that is on disk, ready; raises as `load`."""
        loaded = self._rankers.get(name, {}).get(version)
        if loaded is not None:
            return loaded
        self._set(name, version, ModelState.LOADING)
        try:
            ranker = self._open(name, version)
            self._publish(name, version, ranker)
        except BaseException as error:
            self._set(name, version, ModelState.UNAVAILABLE, str(error) or type(error).__name__)
            raise
        self._set(name, version, ModelState.READY)
        keep_loaded()
        backend = ranker.backend
        log.info("model %s version %s is ready on %s in %s", name, version, backend.target, backend.precision.value)
        return ranker

    def _load_variants(self, name: str) -> None:
        """Load the variants that the full version may have, and let them answer for it."""
        full = self.elastic.full_of(name, self._rankers[name])
        missing = [version for version in self.elastic.variants_of(name) if version not in self._rankers[name]]
        if full is not None:
            for version in missing:
                if trouble := self._trouble_with(full, version):
                    self._set(name, version, ModelState.UNAVAILABLE, trouble)
        self._use_variants(name)

    def _trouble_with(self, full: Ranker, version: str) -> str:
        """Load a variant; why it cannot be used, or ""."""
        name = full.manifest.name
        try:
            trouble = self.elastic.why_not(full, read_manifest(self.root / name / version))
            if not trouble:
                self._load(name, version)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a variant, the full version serves
            return str(error) or type(error).__name__
        return trouble

    def _use_variants(self, name: str) -> None:
        reasons = {status.version: status.reason for status in self._status.values() if status.name == name}
        self.elastic.use(name, self._rankers.get(name, {}), reasons)

    def _open(self, name: str, version: str) -> Ranker:
        """A warm ranker of a folder, which nobody else knows yet."""
        folder, config = self.root / name / version, self.config
        engine, cores = self.elastic.engine_of(name, config.engine)
        ranker = Ranker.load(
            folder,
            engine,
            config.histories,
            config.items,
            config.states,
            self.features,
            config.schedule,
            config.tables,
            cores,
        )
        own = (ranker.manifest.name, ranker.manifest.version)
        if own != (name, version):
            ranker.close()
            raise ArtifactError(
                f"{folder} holds model '{own[0]}' version '{own[1]}'; name its folder {own[0]}/{own[1]}, "
                "or build it under the name you want"
            )
        return ranker

    def _publish(self, name: str, version: str, ranker: Ranker) -> None:
        """Let a ranker take requests."""
        versions = {**self._rankers.get(name, {}), version: ranker}
        newest_last = [v for v in self._on_disk(name) if v in versions]
        gone = [v for v in versions if v not in newest_last]
        self._rankers = {**self._rankers, name: {v: versions[v] for v in (*gone, *newest_last)}}

    def _version_on_disk(self, name: str, version: str) -> str:
        known = self._known_versions(name)
        if version and version not in known:
            raise NotFound(
                f"model '{name}' has no version '{version}'; it has {', '.join(known)}.{nearest(version, known)}"
            )
        if not version and known[-1] in self.elastic.variants_of(name):
            raise NotFound(
                f"model '{name}' has no full version, only the variants {', '.join(known)}; build what they were made "
                f"from, or leave them out of elastic.{name}"
            )
        return version or known[-1]

    def _known_versions(self, name: str) -> list[str]:
        """Names are looked up among what the folder lists, so that none of them can lead out of it."""
        names = self._model_names()
        if name not in names:
            raise NotFound(f"no model '{name}' here; there is: {', '.join(names) or 'none'}.{nearest(name, names)}")
        return self._on_disk(name)

    def _model_names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if not p.name.startswith(".") and self._on_disk(p.name))

    def _on_disk(self, name: str) -> list[str]:
        """Variants, then full versions, the newest last."""
        variants = self.elastic.variants_of(name)
        return sorted(list_versions(self.root / name), key=lambda version: version not in variants)

    def _set(self, name: str, version: str, state: ModelState, reason: str = "") -> None:
        self._status = {**self._status, (name, version): ModelStatus(name, version, state, reason)}
        self.metrics.ready.labels(name, version).set(state is ModelState.READY)


def _none_ready(name: str) -> Unavailable:
    return Unavailable(f"model '{name}' has no version that is ready; see /v2/repository/index")
