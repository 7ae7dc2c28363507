"""Who is compared by `rankd bench schedule`, all around the same model, and how each of them is asked.

rankd               the schedule as it is, its executors on threads or in processes
rankd, deadlines    the same, and each request says how long it waits, as rankd's clients do: who cannot be answered in
                    time is refused at once, which counts as a miss
one queue           first come, first served, a request one call, padded to the smallest bucket that holds it
one queue, padded   the same with one bucket, the largest: implicit shapes
peers               mosec, litserve, ray, pytriton: a worker for each executor, and batches in their own way
peers + states      the same with users' states, which no general server brings: then the schedule and the server
                    are all that differs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rankd.bench.load import Answer
from rankd.bench.peers.peer_process import Peer, PeerServer, decode_answer, encode_question
from rankd.bench.served_model import ServedModel
from rankd.bench.server_process import ServerProcess
from rankd.bench.wire_forms import Form, decode_scores, encode_request
from rankd.engine.backend import Isolation
from rankd.types import Float32Array, RankRequest

RANKD, DEADLINES, QUEUE, PADDED = "rankd", "rankd, deadlines", "one queue", "one queue, padded"
OURS = (RANKD, DEADLINES, QUEUE, PADDED)
Launch = Callable[[int], ServerProcess]
STATIC_SHAPES = {"RANKD_ENGINE__STATIC_SHAPES": "true"}
"""Of everybody, peers too: what calls of changing shapes take is no difference between schedules."""
IN_ORDER = {"RANKD_SCHEDULE__STRETCH": "0", "RANKD_SCHEDULE__QUANTUM_MS": "1e9", "RANKD_SCHEDULE__SPREAD": "false"}
ISOLATION = "RANKD_ENGINE__ISOLATION"
BATCHES = ((1, 0), (4, 10))
"""Of peers: (requests, ms to wait for the last of them). What makes a peer answer more of them a second is used."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server to be started, and its form of requests and answers. `variants` are settings of it, of which the one
    with the highest capacity is measured; `launch` makes a server of one."""

    name: str
    launch: Launch
    encode: Callable[[RankRequest], bytes]
    decode: Callable[[Answer, RankRequest], Float32Array]
    variants: tuple[str, ...] = ("",)
    says_deadlines: bool = False


def served(name: str, root: Path, variables: Mapping[str, str]) -> Contestant:
    """`rankd serve` with settings."""
    return Contestant(
        name,
        lambda variant: ServedModel(root, ("rankd", "serve", "--store", "memory:"), variables),
        partial(encode_request, Form.BINARY),
        lambda answer, request: decode_scores(Form.BINARY, answer),
    )


def peer_contestant(peer: Peer, model: Path, workers: int, probe: RankRequest) -> Contestant:
    """A peer, with a worker for each of rankd's executors."""
    question = encode_question(peer.kind, probe)

    def launch(variant: int) -> ServerProcess:
        batch, wait_ms = BATCHES[variant]
        return PeerServer(peer, str(model), workers, batch, wait_ms, question)

    return Contestant(
        peer.name,
        launch,
        partial(encode_question, peer.kind),
        lambda answer, request: decode_answer(peer.kind, answer, len(request.candidates)),
        tuple(f"batches of {batch}" + (f", {wait_ms} ms" if wait_ms else "") for batch, wait_ms in BATCHES),
    )


def ours(fine: Path, single: Path) -> tuple[Contestant, ...]:
    """rankd, with its executors on threads and in processes, of which the quicker is measured, and with deadlines; and
    first come, first served over it. `fine` and `single` are repositories of the same model, built for many buckets and
    for one."""
    places = tuple(one.value for one in Isolation)
    either = [served(RANKD, fine, {**STATIC_SHAPES, ISOLATION: place}) for place in places]
    rankd = replace(either[0], launch=lambda variant: either[variant].launch(0), variants=places)
    return (
        rankd,
        replace(rankd, name=DEADLINES, says_deadlines=True),
        served(QUEUE, fine, {**STATIC_SHAPES, **IN_ORDER}),
        served(PADDED, single, {**STATIC_SHAPES, **IN_ORDER}),
    )
