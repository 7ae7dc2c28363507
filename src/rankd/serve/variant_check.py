"""Whether a version may stand in for the full one: what the accuracy gate has written into its model.toml decides.

In: both manifests and the bounds of a configuration. Out: nothing, or why not. Next: `elastic_model.py` uses those that
may.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rankd.artifact import Manifest
from rankd.engine.backend import Precision
from rankd.features.schema import FeatureSchema
from rankd.gate_record import Compression, GateRecord


def why_not_variant(full: Manifest, variant: Manifest, bounds: Mapping[str, float]) -> str:
    """Why a version cannot answer for another one, or "". `bounds`: what it has to keep of each metric, beside what its
    own gate asked for; a bound is kept when the whole interval is above it."""
    made = variant.compression
    if not isinstance(made, Compression):
        return "it has no gate record; a variant is built from what `rankd compress` makes of the full version's run"
    if not full.run_sha256:
        return (
            f"version '{full.version}' does not say which run it was built from, so that nothing was judged against "
            "it; build it again"
        )
    if made.original_sha256 != full.run_sha256:
        return (
            f"its gate judged it against another model than version '{full.version}': compress the run that this one "
            "was built from"
        )
    gates = {"the gate": made.gate}
    if Precision.INT8.value in {engine.precision for engine in variant.engines.values()}:
        if isinstance(made.int8, msgspec.UnsetType):
            return "it is in int8, and its gate record says nothing of that; compress with [quantize] and build again"
        gates["the gate of int8"] = made.int8.gate
    for name, gate in gates.items():
        if lost := _lost(gate, bounds):
            return f"{name}: {lost}"
    if _asked(variant.schema) != _asked(full.schema):
        return f"its features, tasks or items are not those of version '{full.version}'; build both from the same log"
    return ""


def _lost(gate: GateRecord, bounds: Mapping[str, float]) -> str:
    if not gate.metrics:
        return "it has judged no metric"
    for name, metric in gate.metrics.items():
        bound = max(metric.bound, bounds.get(name, 0.0))
        if not metric.low >= bound:
            return f"{name} keeps {metric.kept:.4f} ({metric.low:.4f} to {metric.high:.4f}), and {bound:g} is asked for"
    if missing := [name for name in bounds if name not in gate.metrics]:
        return f"it has judged {', '.join(gate.metrics)}, and {', '.join(missing)} is asked for"
    return ""


def _asked(schema: FeatureSchema) -> FeatureSchema:
    """What requests and answers depend on: neither how calls are padded, but for the most candidates, nor which tables
    are beside the graph."""
    return msgspec.structs.replace(schema, history_buckets=(), candidate_buckets=(schema.max_candidates,), embedded=())
