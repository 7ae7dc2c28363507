"""What a handler of a general model server does with a batch of requests, as its users would write it.

In: requests as JSON. Out: scores as bytes (little-endian float32). It is rankd's own request path (features, OpenVINO's
graphs, buckets that were warmed; users' states where it is told to keep them) on one executor with one thread: a peer
differs from rankd in its server and in its batching, in nothing else. The lists of a batch are padded to the smallest
bucket that holds the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from rankd.artifact import Artifact
from rankd.bench.peers.peer_plan import PeerPlan
from rankd.engine.backend import EngineConfig
from rankd.engine.targets import load_backend
from rankd.engine.warming import Shapes, warm
from rankd.features import assembly
from rankd.features.catalogue import Catalogue
from rankd.features.feature_config import FeatureConfig
from rankd.features.reading.shared_features import FeatureService
from rankd.features.reading.version_features import Fetch, VersionFeatures
from rankd.observe.clocks import StageClock
from rankd.request_path import RankItem, RequestPath
from rankd.schedule.packing import SIZES, Packing
from rankd.schedule.served import Part
from rankd.states.lending import NoStates
from rankd.states.open_states import open_states
from rankd.states.state_config import StateConfig
from rankd.types import RankRequest


class Question(msgspec.Struct, frozen=True):
    """A request on the wire."""

    user_id: str
    candidates: tuple[str, ...]


_questions = msgspec.json.Decoder(Question)


class PeerWorker:
    """One executor; not thread-safe."""

    def __init__(self, plan: PeerPlan) -> None:
        artifact = Artifact.open(Path(plan.model))
        engine = EngineConfig(target="openvino", executors=1, threads=1, static_shapes=True)
        backend = load_backend(artifact, engine)
        catalogue = Catalogue.load(artifact.path / "tables", artifact.schema)
        service = FeatureService(FeatureConfig())
        self._features = VersionFeatures(artifact.schema, catalogue, service.of(artifact.manifest.name))
        states = open_states(artifact, backend, StateConfig()) if plan.states else NoStates()
        self._path = RequestPath(artifact.manifest, catalogue, self._features, states, self._begin)
        self._executor, self._buckets = backend.executor(), artifact.schema.candidate_buckets
        self._tasks = len(artifact.schema.tasks)
        packing = Packing(dict.fromkeys(self._buckets, plan.batch))
        self._path.use_packing(packing, [self._executor])
        assembly.warm(artifact.schema, self._features.items)
        sizes = [size for size in SIZES if size <= plan.batch]
        warm(self._executor, Shapes(artifact.manifest, backend.state_type), dict.fromkeys(self._buckets, sizes))

    def answer(self, bodies: Sequence[bytes]) -> list[bytes]:
        """The scores of a batch of encoded requests."""
        return self.rank([_questions.decode(body) for body in bodies])

    def rank(self, questions: Sequence[Question]) -> list[bytes]:
        """The scores of a batch."""
        items = [self._item(question) for question in questions]
        parts = [Part(item, 0, len(item.request.candidates)) for item in items]
        longest = max(part.count for part in parts)
        bucket = next(bucket for bucket in self._buckets if bucket >= longest)
        try:
            for item in items:
                self._path.prepare(item, self._executor, alone=False, wide=False)
            for place, part in enumerate(parts):
                self._path.assemble(part, bucket, place, self._executor)
            for part, logits in zip(parts, self._path.score(parts, bucket, self._executor), strict=True):
                self._path.take(part, logits)
            return [self._path.finish(item).scores.astype("<f4").tobytes() for item in items]
        finally:
            for item in items:
                self._path.drop(item)

    def _item(self, question: Question) -> RankItem:
        request = RankRequest(user_id=question.user_id, candidates=question.candidates)
        return RankItem(request, StageClock(), np.empty((len(question.candidates), self._tasks), np.float32))

    def _begin(self, item: RankItem) -> Fetch:
        return self._features.begin(item.request.user_id, item.request.candidates, True, None)
