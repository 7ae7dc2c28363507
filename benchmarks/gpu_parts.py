"""Parts of the engine for `gpu.py`: calls under way at once, transfers, and the attention kernels by themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from gpu_place import ROOT, Call, Place, backend_of, device_class, device_ms, gpu_model, inputs_of
from gpu_requests import marked_states
from rankd.artifact import Artifact
from rankd.bench.flops import ModelKind
from rankd.bench.workload import Workload
from rankd.engine.backend import MOST_IN_FLIGHT, EngineConfig, Precision
from rankd.types import Allocate, UserState


def in_flight(place: Place, artifact: Artifact, workload: Workload) -> dict[str, Any]:
    """Calls of a few users a second: k on the same streams, executors with streams of their own, one without graphs.
    `h2d_share` is the share of the transfers' time that is hidden behind computing with so many under way."""
    from rankd.engine.cuda.calls_in_flight import rate
    from rankd.engine.cuda.cuda_backend import open_pool
    from rankd.engine.cuda.cuda_device import Way
    from rankd.engine.cuda.cuda_executor import CudaExecutor

    class Launched(device_class(place)):  # type: ignore[misc]
        """Without graphs."""

        def captured(self, work: Callable[[], None], way: Way = Way.COMPUTE) -> Callable[[], None]:
            """Every kernel that computes is launched by itself."""
            replay: Callable[[], None] = super().captured(work, way)
            return replay if way is not Way.COMPUTE or place.rehearses else work

    users = place.flight_users
    histories, candidates = inputs_of(artifact, workload, users)
    backends = [backend_of(place, artifact, 1, MOST_IN_FLIGHT), backend_of(place, artifact, MOST_IN_FLIGHT, 1)]
    shared, apart = ([backend.executor() for _ in range(MOST_IN_FLIGHT)] for backend in backends)
    launched_on, model = Launched(), gpu_model(place, artifact)
    pool = open_pool(model, launched_on, EngineConfig("cuda", Precision.BF16, gpu_state_mib=64), users)
    launched = CudaExecutor(model, pool, launched_on)

    def calls(executors: Sequence[CudaExecutor], found: bool, memory: Allocate | None = None) -> list[Call]:
        kept = marked_states(executors[0], histories, memory)
        states = kept if found else [UserState(state.arrays, state.lengths) for state in kept]
        made: list[Call] = [partial(executor.score, states, candidates) for executor in executors]
        for call in made:
            call()
        return made

    rates: dict[str, dict[int, float]] = {}
    ready: dict[str, list[Call]] = {}  # kept to the end: what was sent last is sent again by `parts_ms`
    for name, executors, there, memory in (
        ("k in flight, states found", shared, True, None),
        ("k in flight, states staged", shared, False, None),
        ("k in flight, states sent", shared, False, backends[0].host_memory),
        ("k executors, states found", apart, True, None),
    ):
        ready[name] = calls(executors, there, memory)
        rates[name] = {k: rate(ready[name][:k], place.rate_seconds) for k in range(1, MOST_IN_FLIGHT + 1)}
    plain = rate(calls([launched], True), place.rate_seconds)
    spent = parts_ms(place, shared[0], users)
    found, sent, staged = (rates[f"k in flight, states {how}"] for how in ("found", "sent", "staged"))

    def hidden(k_rates: dict[int, float], transfers: float) -> float:
        exposed = 1e3 / max(k_rates.values()) - spent["compute"]
        return min(max(1.0 - exposed / transfers, 0.0), 1.0)

    return {
        "calls_a_second": rates | {"one executor without graphs": plain},
        "device_ms": spent,
        "dso_gain": max(rates["k executors, states found"].values()) / plain,
        "in_flight_gain": max(found.values()) / found[1],
        "in_flight_gain_sent": max(sent.values()) / sent[1],
        "h2d_share": hidden(found, spent["in"] + spent["out"]),
        "pinned_gain": max(sent.values()) / max(staged.values()),
        "h2d_share_sent": hidden(sent, spent["in"] + spent["out"] + spent["states in"]),
    }


def parts_ms(place: Place, executor: Any, users: int) -> dict[str, float]:
    """What the GPU spends on each part of the call that the executor ran last: copies, and all kernels."""
    from rankd.engine.cuda.kernels.triton_host_states import fetch_pages

    prepared, arriving = list(executor._scoring.values())[-1], executor._arriving  # of the start's is the first
    last, shape = arriving._fetched._turns[arriving._fetched._next - 1].staging.there, executor._shape
    states = executor._pool.states(last["count"])

    def copied(staging: Any) -> float:
        return device_ms(place, lambda: staging._block.copy_(staging._pinned, non_blocking=True))

    return {
        "compute": device_ms(place, prepared.launch),
        "in": copied(prepared.staging),
        "out": device_ms(place, lambda: prepared.result.copy_(prepared.made, non_blocking=True)),
        "states in": device_ms(
            place, lambda: fetch_pages(states, last["rows"], last["count"], shape.heads, shape.dtype)
        ),
        "states in, staged": users * copied(arriving._turns[0].staging),
    }


def attention_alone(place: Place, workload: Workload, peak: float | None) -> dict[str, Any]:
    """The attention kernels by themselves, as many users as there are, by device events, for each storage of pages."""
    import torch

    from rankd.engine.cuda.kernels.triton_attention_steps import Weighting
    from rankd.engine.cuda.kernels.triton_candidate_attention import CandidateRows, attend_candidates
    from rankd.engine.cuda.kernels.triton_history_attention import HistoryRows, attend_history
    from rankd.engine.cuda.paged_states import PageType

    if not place.rehearses:
        sys.path.insert(0, str(ROOT))
        os.environ["RANKD_TEST_GPU"] = "1"
    from tests.engine.cuda.plain_attention import PAGE, Sizes, states_of, tables_of
    from tests.engine.cuda.test_attention_kernels import padded, tiles_over

    users, tokens, count = place.users[-1], workload.block_tokens, workload.buckets.candidates[-1]
    model, made = workload.model, {}
    weighting = Weighting.SOFTMAX if model.kind is ModelKind.CLIMBER else Weighting.POINTWISE
    sizes = Sizes(model.blocks, 1, model.heads, model.width // model.heads, tokens + 1)
    with torch.device(place.name):
        lengths, now = torch.full((users, model.blocks), tokens, dtype=torch.int32), torch.full((users,), 10**7)
        for kind in (PageType.BF16, PageType.FP8):
            dtype = torch.bfloat16
            states, tables = states_of(sizes, lengths, kind), tables_of(sizes, weighting)
            cells: Sequence[tuple[str, int, float]] = (
                ("history", tokens, users * model.blocks * tokens * (tokens + 1) / 2 * 4 * model.width),
                ("candidates", count, users * model.blocks * count * (tokens + 1) * 4 * model.width),
            )
            for name, rows, flops in cells:
                qkv = torch.randn(model.blocks, users * rows, 3 * model.width, dtype=dtype)
                out = torch.empty(model.blocks, users * rows, model.width, dtype=dtype)
                tiles = padded([tiles_over([rows] * users)] * model.blocks)
                if name == "history":
                    times = torch.zeros(model.blocks, users * rows, dtype=torch.int32)
                    told = HistoryRows(tiles, torch.zeros_like(lengths), times, PAGE)
                    spent = device_ms(place, partial(attend_history, out, qkv, told, states, tables, 0))
                else:
                    who = CandidateRows(tiles[0].contiguous(), lengths, now.int(), PAGE)
                    spent = device_ms(place, partial(attend_candidates, out, qkv, who, states, tables, 0))
                share = flops / spent / 1e9 / peak if peak else None
                made[f"{name} {kind.value}"] = {"ms": spent, "peak_share": share}
    return made
