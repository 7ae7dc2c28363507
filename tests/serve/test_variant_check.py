"""Which versions may stand in for the full one: those that the gate let pass against its very run, and no others."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

import rankd.demo
from rankd.artifact import EngineRecord, Manifest, read_manifest
from rankd.gate_record import Compression, GatedMetric, GateRecord, Int8Record
from rankd.serve.variant_check import why_not_variant

PLAIN = read_manifest(rankd.demo.MODELS / "demo" / "1")
FULL = msgspec.structs.replace(PLAIN, run_sha256="the full run")
INT8 = EngineRecord("int8", {"int8": 0.1})


def gate(low: float = 0.995, bound: float = 0.99, name: str = "gauc") -> GateRecord:
    metric = GatedMetric(original=0.8, compressed=0.8, kept=low + 0.002, low=low, high=low + 0.004, bound=bound)
    return GateRecord("2026-01-01", "2026-02-01", 100, 50, 100, 0, {name: metric})


def int8(judged: GateRecord) -> Int8Record:
    return Int8Record("a log", "", 64, 10, (), 0.05, "the scales", judged)


def variant(compression: dict[str, Any] | None = None, **changes: Any) -> Manifest:
    made = Compression({}, "the full run", "the pruned run", 0.5, 0.6, gate())
    made = msgspec.structs.replace(made, **(compression or {}))
    return msgspec.structs.replace(PLAIN, version="1-pruned", compression=made, **changes)


def test_what_passed_against_the_same_run_may() -> None:
    assert why_not_variant(FULL, variant(), {}) == ""
    assert why_not_variant(FULL, variant(), {"gauc": 0.995}) == ""
    in_int8 = variant({"int8": int8(gate())}, engines={"openvino": INT8})
    assert why_not_variant(FULL, in_int8, {"gauc": 0.99}) == ""
    fewer_shapes = msgspec.structs.replace(PLAIN.schema, candidate_buckets=(PLAIN.schema.max_candidates,))
    assert why_not_variant(FULL, variant(schema=fewer_shapes), {}) == ""


OTHER_SCHEMA = msgspec.structs.replace(PLAIN.schema, num_item_rows=PLAIN.schema.num_item_rows + 1)
FEWER = msgspec.structs.replace(PLAIN.schema, candidate_buckets=PLAIN.schema.candidate_buckets[:-1])


@pytest.mark.parametrize(
    ("full", "other", "bounds", "words"),
    [
        (FULL, PLAIN, {}, "it has no gate record"),
        (FULL, FULL, {}, "it has no gate record"),
        (PLAIN, variant(), {}, "version '1' does not say which run it was built from"),
        (FULL, variant({"original_sha256": "another run"}), {}, "judged it against another model than version '1'"),
        (FULL, variant({"original_sha256": ""}), {}, "judged it against another model"),
        (FULL, variant({"gate": gate(0.97)}), {}, r"the gate: gauc keeps 0.9720 \(0.9700 to 0.9740\), and 0.99 is"),
        (FULL, variant({"gate": gate(float("nan"))}), {}, "the gate: gauc keeps nan"),
        (FULL, variant({"gate": msgspec.structs.replace(gate(), metrics={})}), {}, "it has judged no metric"),
        (FULL, variant(), {"gauc": 0.999}, "and 0.999 is asked for"),
        (FULL, variant(), {"ndcg@10": 0.99}, "it has judged gauc, and ndcg@10 is asked for"),
        (FULL, variant(engines={"openvino": INT8}), {}, "it is in int8, and its gate record says nothing of that"),
        (
            FULL,
            variant({"int8": int8(gate(0.5))}, engines={"openvino": INT8}),
            {},
            "the gate of int8: gauc keeps 0.5020",
        ),
        (FULL, variant(schema=OTHER_SCHEMA), {}, "its features, tasks or items are not those"),
        (FULL, variant(schema=FEWER), {}, "its features, tasks or items are not those"),
    ],
)
def test_everything_else_may_not(full: Manifest, other: Manifest, bounds: dict[str, float], words: str) -> None:
    assert re.search(words, why_not_variant(full, other, bounds))


def test_a_lower_bound_than_the_gates_own_changes_nothing() -> None:
    assert "0.99 is asked for" in why_not_variant(FULL, variant({"gate": gate(0.97)}), {"gauc": 0.5})
