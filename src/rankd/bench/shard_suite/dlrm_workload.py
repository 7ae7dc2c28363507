"""A DLRM as a workload: tables as the planner knows them, the sizes of its networks, and how many candidates come.

In: `dlrm.toml`, or a file of one's own. Out: DlrmWorkload, a version folder of random weights, and requests. Ids are
drawn evenly from each table: no row is hot.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np

from rankd.bench.workload import Count, Law, draw, largest
from rankd.config import read_struct
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.targets import float_precision
from rankd.errors import ConfigError
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.features.schema import (
    FIRST_ITEM_ROW,
    Categorical,
    DefaultTime,
    FeatureSchema,
    Numeric,
    Strategy,
    SubSequence,
    Task,
)
from rankd.features.tables import ItemTable, no_user_features
from rankd.plan.declaration import loads_of, read_declaration
from rankd.types import Features, RankRequest, UserHistory

PACKAGED = Path(__file__).parent / "dlrm.toml"
EVENT = "view"
USERS = 16
PARITY_REQUESTS = 4


class DlrmWorkload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tables` is what `rankd plan` takes; a candidate has as many ids of each as its statistics say. `items` of those
    are made up, of which a request's candidates are drawn."""

    name: str
    use: str
    tables: str
    numbers: Count
    candidates: Law
    buckets: tuple[Count, ...]
    bottom: tuple[Count, ...]
    top: tuple[Count, ...]
    cross_layers: Count = 3
    cross_rank: Count = 512
    storage: TableStorage = TableStorage.FP32
    items: Count = 20_000
    seed: int = 1


def load_dlrm(name: str) -> DlrmWorkload:
    """The packaged workload "dlrm", or a file that ends in .toml.

    Raises:
        ConfigError: another name, an unknown key or a bad value.
    """
    if name != "dlrm" and not name.endswith(".toml"):
        raise ConfigError(f"--workload {name}: there is dlrm, or a .toml file of your own")
    workload = read_struct(DlrmWorkload, PACKAGED if name == "dlrm" else Path(name))
    if largest(workload.candidates) > min(workload.buckets[-1], workload.items):
        raise ConfigError(
            f"{name}: up to {largest(workload.candidates)} candidates are drawn; the largest bucket is "
            f"{workload.buckets[-1]} and there are {workload.items} items"
        )
    return workload


def build_dlrm(workload: DlrmWorkload, root: Path) -> Path:
    """Write a model of random weights to `<root>/<name>/1`, its tables beside the graph; returns that folder.

    Raises:
        ConfigError: tables of different widths.
        BuildError: the graph could not be exported, or does not compute what torch computes.
    """
    import torch

    from rankd.build.pack import BuildOptions, Contents, pack
    from rankd.models.protocol import create_model

    loads = loads_of(read_declaration(workload.tables))
    dims = {load.spec.dim for load in loads}
    if len(dims) != 1:
        raise ConfigError(f"{workload.tables} has tables of the widths {sorted(dims)}; a DLRM has one width")
    widths = [max(round(load.statistics.lookups), 1) for load in loads]
    offsets = accumulate((load.spec.rows for load in loads), initial=1)
    columns = tuple(
        Categorical(load.name, offset, load.spec.rows, width)
        for load, offset, width in zip(loads, offsets, widths, strict=False)
    )
    schema = _schema(workload, columns)
    catalogue = _catalogue(workload, columns)
    options = {
        "dim": dims.pop(),
        "bottom": list(workload.bottom),
        "top": list(workload.top),
        "cross_layers": workload.cross_layers,
        "cross_rank": workload.cross_rank,
        "item_table": False,
    }
    torch.manual_seed(workload.seed)
    model = create_model("dlrm", schema, options).eval()
    precision = float_precision("openvino")
    contents = Contents(model, "dlrm", schema, catalogue, _parity_requests(schema, catalogue), options)
    build = BuildOptions(workload.name, "1", precision, ("openvino",), fall_back=True, tables=workload.storage)
    return pack(root, contents, build)


def draw_dlrm_requests(workload: DlrmWorkload, count: int) -> list[RankRequest]:
    """Requests of any user, with candidates drawn evenly and without repetition."""
    random = np.random.default_rng(workload.seed)
    sizes = draw(workload.candidates, random, count).tolist()
    return [
        RankRequest(
            user_id=f"user-{number % USERS}",
            candidates=tuple(_item(one) for one in random.choice(workload.items, size, replace=False).tolist()),
            model=workload.name,
        )
        for number, size in enumerate(sizes)
    ]


def _schema(workload: DlrmWorkload, columns: tuple[Categorical, ...]) -> FeatureSchema:
    return FeatureSchema(
        num_item_rows=workload.items + FIRST_ITEM_ROW,
        event_types=(EVENT,),
        sub_sequences=(SubSequence(Strategy.RECENT),),
        history_length=1,
        history_buckets=(1,),
        candidate_buckets=workload.buckets,
        tasks=(Task("click"),),
        item_categorical=columns,
        item_numeric=tuple(Numeric(f"number-{number}") for number in range(workload.numbers)),
        default_time=DefaultTime.LOG_END,
    )


def _catalogue(workload: DlrmWorkload, columns: tuple[Categorical, ...]) -> Catalogue:
    random, rows = np.random.default_rng(workload.seed), workload.items + FIRST_ITEM_ROW
    codes = [
        random.integers(column.offset, column.offset + column.size, (rows, column.width), np.int32)
        for column in columns
    ]
    items = ItemTable(
        categories=np.concatenate(codes, axis=1),
        numeric=random.standard_normal((rows, workload.numbers)).astype(np.float32),
        neighbours=np.zeros((rows, 1), np.int32),
        similarities=np.zeros((rows, 1), np.float32),
    )
    nothing = UserHistory(
        np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    )
    people = UserTable(
        np.zeros((USERS, 0), np.int32), np.zeros((USERS, 0), np.float32), np.zeros(USERS + 1, np.int64), nothing
    )
    names = tuple(_item(number) for number in range(workload.items))
    words: dict[str, tuple[str, ...]] = {f"item.{column.name}": () for column in columns}
    return Catalogue(Ids(names, names, tuple(f"user-{number}" for number in range(USERS)), words), items, people)


def _item(number: int) -> str:
    return f"item-{number:06d}"


def _parity_requests(schema: FeatureSchema, catalogue: Catalogue) -> list[Features]:
    random, user = np.random.default_rng(0), no_user_features(schema)
    history = catalogue.users.history_of(0)
    requests = []
    for _ in range(PARITY_REQUESTS):
        rows = random.integers(FIRST_ITEM_ROW, schema.num_item_rows, random.integers(1, schema.max_candidates + 1))
        requests.append(assemble(schema, catalogue.items, history, rows.astype(np.int32), user, schema.log_end))
    return requests
