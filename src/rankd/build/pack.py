"""Packing: a trained model and its dataset become an artifact that serves.

The order is: export the graphs, run them beside the torch model on real requests in every precision (`checks.py`),
refuse if they differ by more than the bound, then write everything at once. Parity stands in model.toml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.torch import save_file
from torch import nn

from rankd.artifact import FORMAT, Artifact, EngineRecord, Manifest, list_versions, write_artifact
from rankd.build.checks import check_split, check_tables, measure_parity
from rankd.build.export import export
from rankd.build.int8_graphs import Int8Plan, write_int8
from rankd.build.outside_tables import embedded_requests, write_tables
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import Precision
from rankd.engine.targets import PRECISIONS, built_together, check_target, runs_here, why_not, why_not_model
from rankd.errors import BuildError
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.features.schema import FeatureSchema, candidate_specs, history_specs
from rankd.gate_record import Compression
from rankd.models.protocol import EmbeddedModel, is_extendable, is_pooled, is_split
from rankd.train.recipe import Recipe
from rankd.train.samples import Dataset
from rankd.types import Features, UserHistory

PARITY_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the artifact is called, the targets it is built for, and the precision it is served in by default.

    `tables` says how the embedding tables of a model that can do without them in its graph are kept beside it; None:
    they stay in the graph. `int8` are the scales that int8 needs; what is built in int8 is served in nothing else.

    A target that cannot compute in that precision is refused, or with `fall_back` served in one that it can; whatever
    else it can is checked and recorded too. No targets: OpenVINO, and the native engine if it computes in that
    precision and suits the model and this machine.
    """

    name: str
    version: str
    precision: Precision = Precision.FP32
    targets: tuple[str, ...] = ()
    fall_back: bool = False
    tables: TableStorage | None = None
    int8: Int8Plan | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into an artifact. `requests` are those on which the engines have to agree with the model.

    `compression` says how `rankd compress` made the model, if it did; `run_sha256` is the checksum of the weights of
    the run that it comes from, if it comes from one.
    """

    model: nn.Module
    kind: str
    schema: FeatureSchema
    catalogue: Catalogue
    requests: Sequence[Features]
    options: Mapping[str, Any]
    metrics: Mapping[str, float] = field(default_factory=dict)
    compression: Compression | None = None
    run_sha256: str = ""


def build_artifact(
    root: Path,
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    options: BuildOptions,
    metrics: dict[str, float] | None = None,
    compression: Compression | None = None,
    run_sha256: str = "",
) -> Path:
    """Write `<root>/<name>/<version>` from a trained model; returns its folder. `compression`: how it was made smaller;
    `run_sha256`: the checksum of the weights of its run (`train.run.weights_sha256`), without which it has no variants.

    Raises:
        ConfigError: an unknown target.
        BuildError: a precision that a target lacks, a failed export, or failed parity.
        ArtifactError: the version exists.
    """
    contents = Contents(
        model=model,
        kind=recipe.model.kind,
        schema=dataset.schema,
        catalogue=catalogue_of(dataset),
        requests=parity_requests(dataset, PARITY_REQUESTS),
        options=recipe.model.options,
        metrics=metrics or {},
        compression=compression,
        run_sha256=run_sha256,
    )
    return pack(root, contents, options)


def pack(root: Path, contents: Contents, options: BuildOptions) -> Path:
    """Export, check and write an artifact; raises as `build_artifact`."""
    if options.tables is not None:
        if not isinstance(contents.model, EmbeddedModel):
            raise BuildError(
                f"model '{contents.kind}' has its tables in its graph: it has no `embedded` and `tables`; build it "
                "without --tables"
            )
        schema = msgspec.structs.replace(contents.schema, embedded=contents.model.embedded())
        contents = replace(contents, schema=schema)
    if not options.targets:
        native = options.precision in PRECISIONS["native"] and not _unsuitable("native", contents)
        options = replace(options, targets=("openvino", "native") if native else ("openvino",))
    if options.precision is Precision.INT8 and options.int8 is None:
        raise BuildError(
            "int8 needs the scales of activations, which this run has none of; run `rankd compress` with a recipe that "
            "has [quantize], and build what comes out"
        )
    for target in options.targets:
        check_target(target)
        if (reason := why_not(target, options.precision)) and not (options.fall_back and runs_here(target)):
            raise BuildError(f"cannot build for {target} in {options.precision.value}: {reason}")
        if lacks := _unsuitable(target, contents):
            raise BuildError(f"cannot build for {target}: {lacks}")
    contents.model.eval()
    check_split(contents.model, contents.requests)
    return write_artifact(root, options.name, options.version, lambda folder: _fill(folder, contents, options))


def _unsuitable(target: str, contents: Contents) -> str:
    return why_not_model(target, contents.kind, contents.options, contents.schema)


def _fill(folder: Path, contents: Contents, options: BuildOptions) -> Manifest:
    model, unchecked = contents.model, draft(folder, contents, options)
    contents.catalogue.save(folder / "tables")
    requests = embedded_requests(folder, contents.schema, contents.requests)
    if options.tables is TableStorage.FP32:
        check_tables(model, contents.requests, requests)
    engines = {}
    for target in options.targets:
        together = built_together(target, options.precision)
        usable = [precision for precision in together if not why_not(target, precision)]
        served = options.precision if options.precision in usable else usable[0]
        record = EngineRecord(served.value, {precision.value: 0.0 for precision in usable})
        drafted = Artifact(folder, msgspec.structs.replace(unchecked, engines={target: record}))
        parity = {p.value: measure_parity(model, drafted, target, p, requests) for p in usable}
        engines[target] = msgspec.structs.replace(record, parity=parity)
    return msgspec.structs.replace(unchecked, engines=engines)


def draft(folder: Path, contents: Contents, options: BuildOptions) -> Manifest:
    """Write weights and graphs into a folder; returns a manifest that names no engine, for none has been checked."""
    model, schema = contents.model, contents.schema
    pooled = is_pooled(model, schema)
    for target in options.targets:
        state = export(model, schema, target, folder / "engines" / target)
        if options.precision is Precision.INT8 and options.int8 is not None:
            write_int8(folder / "engines" / target, options.int8)
    outside = write_tables(folder, model, options.tables) if options.tables is not None else frozenset()
    weights = {name: t.detach().contiguous() for name, t in model.state_dict().items() if t.data_ptr() not in outside}
    save_file(weights, folder / "weights.safetensors")
    return Manifest(
        format=FORMAT,
        name=options.name,
        version=options.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=contents.kind,
        split=is_split(model) and not pooled,
        schema=schema,
        history_inputs=history_specs(schema),
        candidate_inputs=candidate_specs(schema),
        state=state,
        extends=is_extendable(model) and not pooled,
        engines={},
        options=dict(contents.options),
        metrics=dict(contents.metrics),
        run_sha256=contents.run_sha256,
        compression=_compression(contents, options),
    )


def _compression(contents: Contents, options: BuildOptions) -> Compression | msgspec.UnsetType:
    """How the model was compressed; of int8 nothing, if it is built in floats."""
    made = contents.compression
    if made is None or options.precision is Precision.INT8:
        return made or msgspec.UNSET
    return msgspec.structs.replace(made, int8=msgspec.UNSET)


def next_version(model_folder: Path) -> str:
    """One more than the highest version that is a number; "1" for the first."""
    numbers = [int(version) for version in list_versions(model_folder) if version.isdigit()]
    return str(max(numbers, default=0) + 1)


def catalogue_of(dataset: Dataset) -> Catalogue:
    """The tables of the artifact: the newest snapshot of the items, all users and their whole stored histories."""
    schema = dataset.schema
    # What is left out is a whole number of steps, so that windows stand as they stood in training.
    dropped = [max(len(h) - schema.stored_history, 0) for h in dataset.histories]
    dropped = [-(-count // schema.window_step) * schema.window_step for count in dropped]
    histories = [h.last(len(h) - count) for h, count in zip(dataset.histories, dropped, strict=True)]
    ids = Ids(dataset.log.item_ids, dataset.log.item_names, dataset.log.user_ids, dict(dataset.vocabularies))
    users = UserTable(
        categories=np.stack([user.categories for user in dataset.users]),
        numeric=np.stack([user.numeric for user in dataset.users]),
        offsets=np.cumsum([0, *map(len, histories)]),
        history=UserHistory(
            rows=np.concatenate([history.rows for history in histories]),
            events=np.concatenate([history.events for history in histories]),
            times=np.concatenate([history.times for history in histories]),
            values=np.concatenate([history.values for history in histories]),
        ),
    )
    return Catalogue(ids, dataset.tables[-1], users)


def parity_requests(dataset: Dataset, count: int) -> list[Features]:
    """Requests as the server would meet them: users spread over the log (one without history), odd candidate counts."""
    random = np.random.default_rng(0)
    schema, table = dataset.schema, dataset.tables[-1]
    users = random.permutation(len(dataset.users))[:count]
    requests = []
    for number, user in enumerate(users):
        history = dataset.histories[user] if number else dataset.histories[user].until(0)
        rows = random.choice(dataset.snapshots[-1].known, random.integers(1, schema.max_candidates + 1))
        requests.append(assemble(schema, table, history, rows.astype(np.int32), dataset.users[user], schema.log_end))
    return requests
