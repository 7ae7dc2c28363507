"""The model of a workload: the packaged one where its sizes agree, else random weights over a made-up catalogue.

In: a Workload. Out: a version folder that loads like any other. Random weights compute as long as trained ones.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from rankd.artifact import Artifact, Manifest
from rankd.bench.flops import OPTIONS
from rankd.bench.workload import Fixed, Workload, draw
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
)
from rankd.features.tables import ItemTable, UserFeatures
from rankd.types import Features, UserHistory

GENRES, PLANS, NEIGHBOURS = 50, 3, 32
LOG_END = 1_790_812_800  # 2026-10-01
LOG_SECONDS = 90 * 86_400
PARITY_REQUESTS = 8


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
    schema, model = manifest.schema, workload.model
    options = {name: manifest.options.get(name, default) for name, default in OPTIONS[model.kind].items()}
    sizes = options | {"blocks": schema.num_sub_sequences, "tasks": len(schema.tasks)}
    wanted_sizes = model.options() | {"blocks": model.blocks, "tasks": model.tasks}
    shapes = (schema.history_length, schema.history_buckets, schema.candidate_buckets)
    wanted = (workload.block_tokens, workload.buckets.history, workload.buckets.candidates)
    return manifest.model == model.kind.value and sizes == wanted_sizes and shapes == wanted


def model_for(workload: Workload, root: Path, precision: Precision = Precision.FP32) -> tuple[str, Path]:
    """Where the workload's model comes from, and its version folder: the packaged one or one made in `root`.

    One that is made is served in `precision`, by all targets that `rankd build` would choose for it.
    """
    packaged = packaged_model(workload)
    if packaged is not None:
        return "packaged", packaged
    return "random weights", build_model(workload, root, (), precision)


def users_for(catalogue: Catalogue, workload: Workload) -> list[str]:
    """Where histories are all alike, users whose history fills a block; else all who have one."""
    wanted = workload.block_tokens if isinstance(workload.history, Fixed) else 1
    lengths = np.diff(catalogue.users.offsets)
    chosen = np.flatnonzero(lengths >= wanted)
    return [catalogue.ids.users[user] for user in chosen.tolist()]


def build_model(
    workload: Workload,
    root: Path,
    targets: tuple[str, ...] = ("openvino",),
    precision: Precision = Precision.FP32,
    parity_requests: int = PARITY_REQUESTS,
) -> Path:
    """Write a model of random weights to `<root>/<workload>/1`, built for the targets; returns that folder.

    `parity_requests`: on how many it is held to torch on the processor; of a long history one takes seconds.

    Raises:
        MissingExtra: torch is not installed.
        BuildError: the graphs could not be exported, or do not compute what torch computes.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("tomli_w") is None:
        raise MissingExtra(f"rankd bench --workload {workload.name}", "train")
    import torch

    from rankd.build.pack import BuildOptions, Contents, pack
    from rankd.models.protocol import create_model

    schema, catalogue = schema_of(workload), catalogue_of(workload)
    kind, options = workload.model.kind.value, workload.model.options()
    torch.manual_seed(workload.seed)
    model = create_model(kind, schema, options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias.position", "bias.time")):  # zeros when new: parity would not see them
            torch.nn.init.normal_(parameter, std=0.1)
    requests = _parity_requests(schema, catalogue, parity_requests)
    contents = Contents(model, kind, schema, catalogue, requests, options)
    return pack(root, contents, BuildOptions(workload.name, "1", precision, targets, fall_back=True))


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
        window_step=max(workload.block_tokens // 8, 1),
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


def _parity_requests(schema: FeatureSchema, catalogue: Catalogue, count: int) -> list[Features]:
    random = np.random.default_rng(0)
    requests = []
    for user in range(min(count, len(catalogue.ids.users))):
        rows = random.integers(FIRST_ITEM_ROW, schema.num_item_rows, random.integers(1, schema.max_candidates + 1))
        about = UserFeatures(catalogue.users.categories[user], catalogue.users.numeric[user])
        history = catalogue.users.history_of(user)
        requests.append(assemble(schema, catalogue.items, history, rows.astype(np.int32), about, schema.log_end))
    return requests
