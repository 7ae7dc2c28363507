"""The model of a workload: the packaged one where its sizes agree, else random weights over a made-up catalogue.

In: a Workload. Out: a version folder that loads like any other. Random weights compute as long as trained ones.
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from rankd.artifact import FORMAT, Artifact, EngineRecord, Manifest, write_artifact
from rankd.bench.flops import ModelSizes
from rankd.bench.workload import Workload, draw
from rankd.demo import MODELS
from rankd.engine.backend import Precision
from rankd.errors import ArtifactError, MissingExtra
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.features.schema import (
    FIRST_ITEM_ROW,
    MATCH_FEATURES,
    Categorical,
    DefaultTime,
    FeatureSchema,
    Numeric,
    Strategy,
    SubSequence,
    Task,
    candidate_specs,
    history_specs,
)
from rankd.features.tables import ItemTable, UserFeatures
from rankd.types import Features, UserHistory

GENRES, PLANS, NEIGHBOURS = 50, 3, 32
LOG_END = 1_790_812_800  # 2026-10-01
LOG_SECONDS = 90 * 86_400
PARITY_REQUESTS = 8
CLIMBER_DEFAULTS = {"width": 64, "heads": 4, "layers": 2, "ffn_ratio": 4, "hidden": 128}
"""The options of `models.climber.Climber` that are sizes; here because serving does not import torch."""


def packaged_model(workload: Workload, root: Path = MODELS) -> Path | None:
    """The version folder of the packaged model whose sizes are the workload's; None if there is none."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            artifact = Artifact.open(folder)
        except ArtifactError:
            continue
        if agrees(artifact.manifest, workload):
            return artifact.path
    return None


def agrees(manifest: Manifest, workload: Workload) -> bool:
    """Whether a model has the workload's sizes and padded shapes."""
    schema = manifest.schema
    options = {name: manifest.options.get(name, default) for name, default in CLIMBER_DEFAULTS.items()}
    sizes = ModelSizes(blocks=schema.num_sub_sequences, tasks=len(schema.tasks), **options)
    shapes = (schema.history_length, schema.history_buckets, schema.candidate_buckets)
    wanted = (workload.block_tokens, workload.buckets.history, workload.buckets.candidates)
    return manifest.model == "climber" and sizes == workload.model and shapes == wanted


def build_model(workload: Workload, root: Path) -> Path:
    """Write a model of random weights to `<root>/<workload>/1`; returns that folder.

    Raises:
        MissingExtra: torch is not installed.
        BuildError: the graphs could not be exported, or do not compute what torch computes.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("tomli_w") is None:
        raise MissingExtra(f"rankd bench --workload {workload.name}", "train")
    import torch
    from safetensors.torch import save_file

    from rankd.build.export import export
    from rankd.build.pack import check_parity, measure_parity
    from rankd.engine.openvino_backend import TARGET, supports
    from rankd.models.protocol import create_model

    schema, catalogue = schema_of(workload), catalogue_of(workload)
    sizes = workload.model
    options = {name: getattr(sizes, name) for name in CLIMBER_DEFAULTS}
    torch.manual_seed(workload.seed)
    model = create_model("climber", schema, options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias.position", "bias.time")):  # zeros when new: parity would not see them
            torch.nn.init.normal_(parameter, std=0.1)
    requests = _parity_requests(schema, catalogue)

    def fill(folder: Path) -> Manifest:
        graphs = folder / "engines" / TARGET
        state = export(model, schema, graphs)
        parity = {
            p: measure_parity(model, graphs, p, requests) for p in (Precision.FP32, Precision.BF16) if supports(p)
        }
        check_parity(parity)
        save_file(
            {name: t.detach().contiguous() for name, t in model.state_dict().items()}, folder / "weights.safetensors"
        )
        catalogue.save(folder / "tables")
        return Manifest(
            format=FORMAT,
            name=workload.name,
            version="1",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model="climber",
            split=True,
            schema=schema,
            history_inputs=history_specs(schema),
            candidate_inputs=candidate_specs(schema),
            state=state,
            engines={TARGET: EngineRecord(Precision.FP32.value, {p.value: worst for p, worst in parity.items()})},
            options=options,
        )

    return write_artifact(root, workload.name, "1", fill)


def schema_of(workload: Workload) -> FeatureSchema:
    """N behaviours, a block for each; items, users and events have a few features of every kind."""
    behaviours = tuple(f"behaviour-{number}" for number in range(workload.model.blocks))
    return FeatureSchema(
        num_item_rows=workload.items + FIRST_ITEM_ROW,
        event_types=behaviours,
        sub_sequences=tuple(SubSequence(Strategy.EVENT, events=(name,)) for name in behaviours),
        history_length=workload.block_tokens,
        history_buckets=workload.buckets.history,
        candidate_buckets=workload.buckets.candidates,
        tasks=tuple(Task(f"task-{number}") for number in range(workload.model.tasks)),
        stored_history=workload.block_tokens * workload.model.blocks,
        item_categorical=(Categorical("genre", offset=1, size=GENRES),),
        item_numeric=(Numeric("price"), Numeric("age")),
        user_categorical=(Categorical("plan", offset=1, size=PLANS),),
        event_values=(Numeric("seconds"),),
        match=MATCH_FEATURES,
        time_origin=LOG_END - LOG_SECONDS,
        log_end=LOG_END,
        default_time=DefaultTime.LOG_END,
    )


def catalogue_of(workload: Workload) -> Catalogue:
    """Made-up items, and users whose histories follow the workload's law; equal for equal workloads."""
    random = np.random.default_rng(workload.seed)
    rows, users, blocks = workload.items + FIRST_ITEM_ROW, workload.users.count, workload.model.blocks
    lengths = draw(workload.history, random, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    place = np.arange(total) - np.repeat(offsets[:-1], lengths)  # of an event within its history
    ages = random.random(total)
    ages = ages[np.lexsort((-ages, np.repeat(np.arange(users), lengths)))]  # within a history the oldest event first
    history = UserHistory(
        rows=random.integers(FIRST_ITEM_ROW, rows, total).astype(np.int32),
        events=(place % blocks).astype(np.int32),
        times=LOG_END - (ages * LOG_SECONDS).astype(np.int64),
        values=random.standard_normal((total, 1)).astype(np.float32),
    )
    items = ItemTable(
        categories=random.integers(1, GENRES + 1, (rows, 1)).astype(np.int32),
        numeric=random.standard_normal((rows, 2)).astype(np.float32),
        neighbours=random.integers(FIRST_ITEM_ROW, rows, (rows, NEIGHBOURS)).astype(np.int32),
        similarities=random.random((rows, NEIGHBOURS)).astype(np.float32),
    )
    ids = Ids(
        items=tuple(f"item-{number:05d}" for number in range(workload.items)),
        item_names=tuple(f"Item {number}" for number in range(workload.items)),
        users=tuple(f"user-{number:05d}" for number in range(users)),
        vocabularies={
            "item.genre": tuple(f"genre-{number}" for number in range(GENRES)),
            "user.plan": tuple(f"plan-{number}" for number in range(PLANS)),
        },
    )
    people = UserTable(
        categories=random.integers(1, PLANS + 1, (users, 1)).astype(np.int32),
        numeric=np.zeros((users, 0), np.float32),
        offsets=offsets,
        history=history,
    )
    return Catalogue(ids, items, people)


def _parity_requests(schema: FeatureSchema, catalogue: Catalogue) -> list[Features]:
    random = np.random.default_rng(0)
    requests = []
    for user in range(min(PARITY_REQUESTS, len(catalogue.ids.users))):
        rows = random.integers(FIRST_ITEM_ROW, schema.num_item_rows, random.integers(1, schema.max_candidates + 1))
        about = UserFeatures(catalogue.users.categories[user], catalogue.users.numeric[user])
        history = catalogue.users.history_of(user)
        requests.append(assemble(schema, catalogue.items, history, rows.astype(np.int32), about, schema.log_end))
    return requests
