"""Whole requests of `gpu.py`: ours beside torch's, on the same inputs, checked before they are timed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_place import Call, Place, backend_of, inputs_of, whole_ms
from rankd.artifact import Artifact
from rankd.bench.workload import Workload
from rankd.engine.state_arrays import empty_state
from rankd.errors import EngineFailure
from rankd.types import Allocate, Array, UserState

BOUND, OWN_BOUND = 0.5, 1e-2
"""Of a logit, as `bench.parity.BOUNDS` has it for bf16; and of ours, over the largest logit."""
MARKS = itertools.count(1)
EAGER = "eager bf16, dense mask"
TORCH = {EAGER: ("plain", False), "sdpa bf16, dense mask": ("sdpa", False)}
COMPILED_TORCH = {
    EAGER: ("plain", False),
    "torch.compile bf16, dense mask": ("plain", True),
    "flex attention bf16, compiled": ("flex", True),
}
"""How torch's contestants attend, and whether they are compiled."""


def of_users(
    place: Place,
    artifact: Artifact,
    workload: Workload,
    users: int,
    others: Mapping[str, tuple[str, bool]],
    peak: float | None,
) -> dict[str, Any]:
    """Ours beside others with so many users in a call."""
    calls, left_out, parity = contestants(place, artifact, workload, users, others)
    took = whole_ms(place, calls)
    peers = [name for name in took if not name.startswith("rankd") and name != EAGER]

    def over(name: str, other: str = EAGER) -> float | None:
        return took[other] / took[name] if other in took else None

    return {
        "ms": took,
        "left_out": left_out,
        "parity": parity,
        "speedup_cold": over("rankd cold"),
        "speedup_warm": over("rankd warm"),
        "speedup_warm_sent": over("rankd warm, states sent"),
        "gpu_hit_gain": over("rankd warm", "rankd warm, states sent"),
        "pinned_gain": over("rankd warm, states sent", "rankd warm, states staged"),
        "pinned_gain_cold": over("rankd cold", "rankd cold, staged"),
        "over_best_peer_cold": over("rankd cold", min(peers, key=took.__getitem__)) if peers else None,
        "peak_share": workload.flops().useful * users / took["rankd cold"] / 1e9 / peak if peak else None,
    }


def contestants(
    place: Place, artifact: Artifact, workload: Workload, users: int, others: Mapping[str, tuple[str, bool]]
) -> tuple[dict[str, Call], dict[str, str], dict[str, float]]:
    """Calls on the same inputs, the reasons of those that are left out, and by how much logits differ from torch's."""
    import torch

    from rankd.bench.engine_suite.dense_attention import Attention
    from rankd.bench.engine_suite.dense_model import dense_form
    from rankd.bench.engine_suite.gpu_contestants import COMPILED
    from rankd.bench.parity import torch_model

    histories, candidates = inputs_of(artifact, workload, users)
    together = {name: np.concatenate([history[name] for history in histories]) for name in histories[0]}
    sides = [{n: torch.from_numpy(a).to(place.name) for n, a in side.items()} for side in (together, candidates)]
    with torch.inference_mode():
        plain = dense_form(torch_model(artifact)).eval().to(place.name)
        ones = [[{n: t[user : user + 1] for n, t in side.items()} for side in sides] for user in range(users)]
        expected = np.concatenate([plain(*one).cpu().numpy() for one in ones])  # together they may be too large
    del plain

    def autocast(run: Any) -> Call:
        def call() -> object:
            with torch.inference_mode(), torch.autocast(place.name, torch.bfloat16):
                return run(*sides).float().cpu().numpy()

        return call

    calls = rankd_calls(backend_of(place, artifact, 1, 1), histories, candidates)
    left_out, parity = dict[str, str](), dict[str, float]()
    for name, (attention, compiled) in others.items():
        torch._dynamo.reset()
        model = dense_form(torch_model(artifact), Attention(attention)).eval().to(place.name)
        calls[name] = autocast(torch.compile(model, mode=COMPILED) if compiled and not place.rehearses else model)
    for name in list(calls):
        try:
            bound = OWN_BOUND * float(np.abs(expected).max()) if name.startswith("rankd") else BOUND
            parity[name] = differs(expected, calls[name](), bound)
        except Exception as error:
            if name.startswith("rankd"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}"[:500]
            del calls[name]
        if not place.rehearses:
            torch.cuda.empty_cache()  # what one needed is no memory that others lack
    return calls, left_out, parity


def differs(expected: Array, made: Any, bound: float = BOUND) -> float:
    """The largest difference of a logit.

    Raises:
        EngineFailure: it is above the bound.
    """
    worst = float(np.abs(expected - made).max())
    if not worst <= bound:
        raise EngineFailure(f"its scores differ from torch by {worst:.3g}; allowed is {bound:g}")
    return worst


def rankd_calls(backend: Any, histories: Sequence[dict[str, Array]], candidates: dict[str, Array]) -> dict[str, Call]:
    """Ours: states made anew, found in GPU memory, and sent from the host's. Those of the host lie in locked memory, as
    they do while it serves; "staged": in ordinary memory, so that the host copies them into pinned blocks and out."""
    executor: Any = backend.executor()
    kept = marked_states(executor, histories, backend.host_memory)
    sent = [UserState(state.arrays, state.lengths) for state in kept]
    staged = [UserState({name: a.copy() for name, a in state.arrays.items()}, state.lengths) for state in kept]
    homes = arrays_for(executor, histories, backend.host_memory)

    def cold(into: Sequence[dict[str, Array] | None]) -> object:
        made = executor.encode_all(histories, into)
        marks = [next(MARKS).to_bytes(8, "little") for _ in histories]
        executor.keep_all(marks)
        states = [UserState(a, one.lengths, m) for a, one, m in zip(made, kept, marks, strict=True)]
        return executor.score(states, candidates)

    return {
        "rankd cold": lambda: cold(homes),
        "rankd cold, staged": lambda: cold([None] * len(histories)),
        "rankd warm": lambda: executor.score(kept, candidates),
        "rankd warm, states sent": lambda: executor.score(sent, candidates),
        "rankd warm, states staged": lambda: executor.score(staged, candidates),
    }


def arrays_for(executor: Any, histories: Sequence[dict[str, Array]], memory: Allocate | None) -> list[dict[str, Array]]:
    """Arrays for the states of histories, in memory of a kind."""
    model, rooms = executor._model, [history["history_time"].shape[2] for history in histories]
    return [empty_state(model.specs, room, model.state_type, memory=memory) for room in rooms]


def marked_states(
    executor: Any, histories: Sequence[dict[str, Array]], memory: Allocate | None = None
) -> list[UserState]:
    """States that are in GPU memory under marks of their own, and in memory of a kind on the host."""
    made = executor.encode_all(histories, arrays_for(executor, histories, memory))
    marks = [next(MARKS).to_bytes(8, "little") for _ in histories]
    executor.keep_all(marks)
    lengths = [tuple(history["history_length"][0].tolist()) for history in histories]
    return [UserState(*one) for one in zip(made, lengths, marks, strict=True)]
