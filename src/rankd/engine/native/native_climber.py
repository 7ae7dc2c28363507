"""The Climber on AVX512-BF16 without a graph: everything between two products happens in registers or in the cache.

In: a model's weights; then arrays of requests. Out: states in bfloat16 and logits. numba compiles it at the first call
(seconds; kept on disk). `support.why_not` says beforehand whether a model and a processor suit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from rankd.engine.native.layout import Candidates, Events, Known
from rankd.engine.native.native_calls import extend_history, score_candidates
from rankd.engine.native.scratch import Workplace
from rankd.engine.native.support import why_not
from rankd.engine.native.weight_panels import Packed, pack
from rankd.errors import ConfigError, EngineFailure
from rankd.features.schema import FeatureSchema
from rankd.types import Array, Float32Array


class NativeClimber:
    """One model on `threads` threads; serves one call at a time. `twin` gives more of them over the same weights.

    The state: keys_values (1, N, L, 2, T, D) bfloat16 as uint16, times (1, N, T) int32, lengths (1, N) int32.
    Several threads share a history by its blocks and the candidates by their number.
    """

    def __init__(
        self, weights: Mapping[str, Array], options: Mapping[str, Any], schema: FeatureSchema, threads: int = 1
    ) -> None:
        """Pack the weights, the state_dict of models.climber.Climber.

        Raises:
            ConfigError: `why_not` has a reason, or no thread.
        """
        if reason := why_not(options, schema):
            raise ConfigError(f"the native engine cannot run this model: {reason}")
        if threads < 1:
            raise ConfigError(f"{threads} threads given; the native engine needs at least 1")
        floats = {name: np.asarray(array, np.float32) for name, array in weights.items()}
        self._start(pack(floats, int(options.get("heads", 4))), threads)

    def twin(self) -> NativeClimber:
        """Another one over the same weights, with memory of its own."""
        other = NativeClimber.__new__(NativeClimber)
        other._start(self._packed, len(self._places))
        return other

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def memory_bytes(self) -> int:
        """Bytes of the weights."""
        return self._packed.memory_bytes()

    def encode(self, history: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """The state of a history (B = 1), as `features.schema.history_specs` describes it; into `into` if given."""
        times, lengths = history["history_time"], history["history_length"]
        made = into if into is not None else {
            "keys_values": self._keys_values(times.shape[-1]),
            "times": np.empty_like(times),
            "lengths": np.empty_like(lengths),
        }  # fmt: skip
        self._extend(history, Known(0, 0, self._no_counts.ctypes.data, 0), made["keys_values"])
        made["times"][...], made["lengths"][...] = times, lengths
        return made

    def extend(self, state: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
        """What A new events a block add to a state: keys_values (1, N, L, 2, A, D), times (1, N, A), the new lengths.

        `new` is named and shaped as the history. Raises: EngineFailure, see `_known`.
        """
        times, lengths = new["history_time"], state["lengths"]
        made = self._keys_values(times.shape[-1])
        self._extend(new, _known(state), made)
        return {"keys_values": made, "times": times.copy(), "lengths": lengths + new["history_length"]}

    def score(self, state: Mapping[str, Array], candidates: Mapping[str, Array]) -> Float32Array:
        """Logits (C, K) of one user's candidates. Raises: EngineFailure, see `_known`."""
        packed, hold, known = self._packed, _Addresses(candidates), _known(state)
        count, now = candidates["candidate_item"].shape[1], int(candidates["context_time"][0])
        logits: Float32Array = np.empty((count, packed.sizes.tasks), np.float32)
        item = hold["candidate_item"]
        (codes, num_codes), (numeric, num_numeric) = (
            hold.with_width(name) for name in ("candidate_categories", "candidate_numeric")
        )
        user = *hold.with_width("context_categories"), *hold.with_width("context_numeric")

        def part(place: Workplace, first: int, last: int) -> None:
            rows = last - first
            memory = place.memory(rows * packed.sizes.blocks, known.length)
            request = Candidates(
                item + first * 4, codes + first * num_codes * 4, num_codes, numeric + first * num_numeric * 4,
                num_numeric, *user, now, rows,
            )  # fmt: skip
            score_candidates(packed.sizes, packed.top, packed.layers, memory.scratch, known, request)
            logits[first:last] = memory.logits[:rows, : packed.sizes.tasks]

        self._share(count, part)
        return logits

    def _start(self, packed: Packed, threads: int) -> None:
        self._packed = packed
        self._no_counts = np.zeros(packed.sizes.blocks, np.int32)
        self._places = [Workplace(packed) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), "native")  # starts no thread before it is used

    def _share(self, count: int, part: Callable[[Workplace, int, int], None]) -> None:
        """Divide 0..count - 1 among the threads; this one does the first part."""
        threads = len(self._places)
        bounds = [(count * index // threads, count * (index + 1) // threads) for index in range(threads)]
        work = [(place, *bound) for place, bound in zip(self._places, bounds, strict=True) if bound[0] < bound[1]]
        others = [self._pool.submit(part, *one) for one in work[1:]]
        for one in work[:1]:
            part(*one)
        for other in others:
            other.result()

    def _extend(self, new: Mapping[str, Array], known: Known, made: Array) -> None:
        packed, hold = self._packed, _Addresses(new)
        length = new["history_time"].shape[-1]
        categories, num_categories = hold.with_width("history_categories")
        values, num_values = hold.with_width("history_values")
        arrays = {
            "item": hold["history_item"],
            "event": hold["history_event"],
            "times": hold["history_time"],
            "counts": hold["history_length"],
            "categories": categories,
            "num_categories": num_categories,
            "values": values,
            "num_values": num_values,
        }
        out = made.ctypes.data

        def part(place: Workplace, first: int, last: int) -> None:
            memory = place.memory(length, known.length + length)
            events = Events(**arrays, length=length, first=first, last=last)
            extend_history(packed.sizes, packed.top, packed.layers, memory.scratch, events, known, out)

        self._share(packed.sizes.blocks, part)

    def _keys_values(self, tokens: int) -> Array:
        sizes = self._packed.sizes
        return np.empty((1, sizes.blocks, sizes.layers, 2, tokens, sizes.width), np.uint16)


class _Addresses:
    """Addresses of a request's arrays, C-ordered and of 4 bytes an entry; keeps alive what it had to copy."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {
            name: np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int32)
            for name, array in arrays.items()
        }

    def __getitem__(self, name: str) -> int:
        return self._arrays[name].ctypes.data

    def with_width(self, name: str) -> tuple[int, int]:
        """Address and last dimension; (0, 0) for a column that the schema does not have."""
        array = self._arrays.get(name)
        return (0, 0) if array is None else (array.ctypes.data, array.shape[-1])


def _known(state: Mapping[str, Array]) -> Known:
    """Raises: EngineFailure: a state that is not bfloat16 in one piece."""
    keys_values, times, lengths = state["keys_values"], state["times"], state["lengths"]
    if keys_values.dtype != np.uint16 or not all(array.flags.c_contiguous for array in (keys_values, times, lengths)):
        raise EngineFailure(f"the native engine needs a bfloat16 state in C order, not {keys_values.dtype}")
    return Known(keys_values.ctypes.data, times.ctypes.data, lengths.ctypes.data, times.shape[-1])
