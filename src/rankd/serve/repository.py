"""The model repository: a folder of models and versions, loaded and unloaded while others serve.

    <root>/<model>/<version>/model.toml

Requests read one dict without a lock; whoever loads or unloads changes it under one. Events are appended to every ready
version of a model and kept in a journal, from which a version that is loaded later catches up. A folder's names and
those in its model.toml have to agree, so that a version has one name in requests, answers and figures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from rankd.artifact import list_versions
from rankd.errors import ArtifactError, ConfigError, InvalidRequest, NotFound, Unavailable, nearest
from rankd.features.schema import DefaultTime
from rankd.observe.metrics import ServerMetrics
from rankd.ranker import Ranker
from rankd.serve.settings import ServeConfig
from rankd.types import Event

log = logging.getLogger("rankd")
JOURNAL_EVENTS = 100_000
Append = tuple[str, tuple[Event, ...]]  # a user id and that user's new events


class ModelState(Enum):
    """Where a version is in its life, in the words of the model repository extension."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One version as the index shows it; `reason` says why it is not ready."""

    name: str
    version: str
    state: ModelState
    reason: str = ""


class Journal:
    """The newest appends of one model, in the order they came: at most `max_events` events in all.

    `position` counts every append there ever was, so that a reader can ask for what came after it last looked.
    """

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._appends: deque[Append] = deque()
        self._num_events = 0
        self.position = 0

    def add(self, user_id: str, events: tuple[Event, ...]) -> int:
        """Keep an append; returns how many old events fell off for it."""
        self._appends.append((user_id, events))
        self.position += 1
        self._num_events += len(events)
        before = self._num_events
        while self._num_events > self._max_events:
            self._num_events -= len(self._appends.popleft()[1])
        return before - self._num_events

    def since(self, position: int) -> list[Append]:
        """The appends after `position` that are still kept, oldest first."""
        kept = list(self._appends)
        return kept[max(len(kept) - (self.position - position), 0) :]


class ModelRepository:
    """Models by name and version. `start()` loads the newest version of each; `close()` drains and unloads all."""

    def __init__(self, root: Path, config: ServeConfig) -> None:
        self.root, self.config, self.metrics = root, config, ServerMetrics()
        self._rankers: dict[str, dict[str, Ranker]] = {}
        self._status: dict[tuple[str, str], ModelStatus] = {}
        self._journals: dict[str, Journal] = {}
        self._changes = threading.RLock()  # one load or unload at a time
        self._events = threading.Lock()  # an append, or the hand-over of a journal to a new version
        self._started = self._closing = False

    @property
    def ready(self) -> bool:
        """Whether everything that start-up was to load takes requests."""
        return self._started and not self._closing

    def start(self) -> None:
        """Load the newest version of every configured model.

        Raises:
            NotFound: no model there. ArtifactError: one of them is damaged.
        """
        names = self.config.models or self._model_names()
        if not names:
            raise NotFound(f"{self.root} holds no model; build one with `rankd build RUN --out {self.root}`")
        if len(names) > 1 and (self.config.histories or self.config.items):
            raise ConfigError(
                f"histories and items are of one model, {', '.join(names)} are to be loaded; name one in models"
            )
        for name in names:
            if self._closing:
                return
            self.load(name)
        self._started = True

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

    def get(self, name: str = "", version: str = "") -> Ranker:
        """The ranker of a model; without a name the only one there is, without a version the newest that is ready.

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
            if not version:
                return versions[next(reversed(versions))]
            if version in versions:
                return versions[version]
        known = self._known_versions(name)
        if not version:
            raise _none_ready(name)
        if version not in known:
            raise NotFound(
                f"model '{name}' has no version '{version}'; it has {', '.join(known)}.{nearest(version, known)}"
            )
        raise Unavailable(f"version '{version}' of model '{name}' is not loaded; load it or ask for another")

    def load(self, name: str, version: str = "") -> Ranker:
        """Load a version (the newest on disk if none is named), warm it, let it catch up, and let it take requests.

        Raises:
            NotFound: no such model or version. ArtifactError: it is damaged, or its folder has another name than it has
            itself; others are not touched.
        """
        with self._changes:
            version = self._version_on_disk(name, version)
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
            backend = ranker.backend
            log.info("model %s version %s is ready on %s in %s", name, version, backend.target, backend.precision.value)
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
            for one, ranker in leaving.items():
                ranker.close()
                self._set(name, one, ModelState.UNAVAILABLE, "unloaded")

    def index(self) -> list[ModelStatus]:
        """Every version on disk or in memory."""
        found = {
            (n, v): ModelStatus(n, v, ModelState.UNAVAILABLE) for n in self._model_names() for v in self._on_disk(n)
        }
        return [{**found, **self._status}[key] for key in sorted({**found, **self._status})]

    def append_events(
        self, name: str, user_id: str, events: tuple[Event, ...]
    ) -> tuple[dict[str, int], tuple[str, ...]]:
        """Append events to a user in every ready version of a model: the next request sees them.

        The newest version decides whether they are taken at all. An older one that does not know their event type or
        values goes without them, and is missing in the answer.

        Returns:
            How many events each version stores for the user now, the newest last, and the item ids unknown to it.

        Raises:
            InvalidRequest: the newest version refuses them; nothing is stored anywhere.
            NotFound, Unavailable: as `get`.
        """
        name = self.get(name).manifest.name
        with self._events:
            versions = self._rankers.get(name)
            if not versions:
                raise _none_ready(name)
            *older, newest = versions
            if versions[newest].schema.default_time is DefaultTime.WALL:
                now = int(time.time())  # and not when a later version catches up
                events = tuple(replace(event, time=now) if event.time is None else event for event in events)
            count, unknown = versions[newest].append_events(user_id, events)
            stored: dict[str, int] = {}
            for version in older:
                with suppress(InvalidRequest):
                    stored[version] = versions[version].append_events(user_id, events)[0]
            stored[newest] = count
            dropped = self._journals.setdefault(name, Journal(JOURNAL_EVENTS)).add(user_id, events)
        self.metrics.appended(name, len(events), dropped)
        return stored, unknown

    def _open(self, name: str, version: str) -> Ranker:
        """A warm ranker of a folder, which nobody else knows yet."""
        folder, config = self.root / name / version, self.config
        ranker = Ranker.load(folder, config.engine, config.histories, config.items, config.max_waiting, config.states)
        own = (ranker.manifest.name, ranker.manifest.version)
        if own != (name, version):
            ranker.close()
            raise ArtifactError(
                f"{folder} holds model '{own[0]}' version '{own[1]}'; name its folder {own[0]}/{own[1]}, "
                "or build it under the name you want"
            )
        return ranker

    def _publish(self, name: str, version: str, ranker: Ranker) -> None:
        """Let a ranker catch up with the journal, then take requests.

        Most of it is replayed while appends go on (100,000 take 3 s); what came meanwhile is replayed under their lock,
        so that none is missed and none counts twice.
        """
        with self._events:
            journal = self._journals.setdefault(name, Journal(JOURNAL_EVENTS))
            backlog, position = journal.since(0), journal.position
        refused = _replay(ranker, backlog)
        with self._events:
            refused += _replay(ranker, journal.since(position))
            versions = {**self._rankers.get(name, {}), version: ranker}
            newest_last = [v for v in self._on_disk(name) if v in versions]
            gone = [v for v in versions if v not in newest_last]
            self._rankers = {**self._rankers, name: {v: versions[v] for v in (*gone, *newest_last)}}
        if refused:
            log.warning("model %s version %s does not take %d events of the journal", name, version, refused)

    def _version_on_disk(self, name: str, version: str) -> str:
        known = self._known_versions(name)
        if version and version not in known:
            raise NotFound(
                f"model '{name}' has no version '{version}'; it has {', '.join(known)}.{nearest(version, known)}"
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
        return list_versions(self.root / name)

    def _set(self, name: str, version: str, state: ModelState, reason: str = "") -> None:
        self._status = {**self._status, (name, version): ModelStatus(name, version, state, reason)}
        self.metrics.ready.labels(name, version).set(state is ModelState.READY)


def _none_ready(name: str) -> Unavailable:
    return Unavailable(f"model '{name}' has no version that is ready; see /v2/repository/index")


def _replay(ranker: Ranker, appends: Iterable[Append]) -> int:
    """Append to a version what another one took; returns how many events it refuses, having other event types."""
    refused = 0
    for user_id, events in appends:
        try:
            ranker.append_events(user_id, events)
        except InvalidRequest:
            refused += len(events)
    return refused
