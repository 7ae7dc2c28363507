"""Packing: a trained model and its dataset become an artifact that serves.

The order is: export the graphs, run them beside the torch model on real requests in every precision, refuse if they
differ by more than the bound, then write everything at once. Parity stands in model.toml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rankd.artifact import FORMAT, EngineRecord, Manifest, list_versions, write_artifact
from rankd.build.export import export
from rankd.engine.backend import Precision
from rankd.engine.openvino_backend import TARGET, OpenVinoExecutor, compile_graph, supports
from rankd.errors import BuildError
from rankd.features.assembly import assemble
from rankd.features.catalogue import Catalogue, Ids, UserTable
from rankd.features.schema import candidate_specs, history_specs
from rankd.models.protocol import is_split, logits_of
from rankd.train.recipe import Recipe
from rankd.train.samples import Dataset
from rankd.types import Array, Features, UserHistory

PARITY_BOUNDS = {Precision.FP32: 1e-3, Precision.BF16: 0.5}
PARITY_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the artifact is called and which precision it is served in by default."""

    name: str
    version: str
    precision: Precision = Precision.FP32
    target: str = TARGET


def build_artifact(
    root: Path,
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    options: BuildOptions,
    metrics: dict[str, float] | None = None,
) -> Path:
    """Write `<root>/<name>/<version>` from a trained model; returns its folder.

    Raises:
        BuildError: an unknown target, a precision this processor lacks, a failed export, or failed parity.
        ArtifactError: the version exists.
    """
    if options.target != TARGET:
        raise BuildError(f"unknown target '{options.target}'; artifacts are built for: {TARGET}")
    if not supports(options.precision):
        raise BuildError(f"this processor does not compute in {options.precision.value}; build with --precision fp32")
    model.eval()
    requests = parity_requests(dataset, PARITY_REQUESTS)
    check_split(model, requests)

    def fill(folder: Path) -> Manifest:
        graphs = folder / "engines" / TARGET
        state = export(model, dataset.schema, graphs)
        parity = {p: measure_parity(model, graphs, p, requests) for p in PARITY_BOUNDS if supports(p)}
        check_parity(parity)
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        catalogue_of(dataset).save(folder / "tables")
        return Manifest(
            format=FORMAT,
            name=options.name,
            version=options.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=recipe.model.kind,
            split=is_split(model),
            schema=dataset.schema,
            history_inputs=history_specs(dataset.schema),
            candidate_inputs=candidate_specs(dataset.schema),
            state=state,
            engines={TARGET: EngineRecord(options.precision.value, {p.value: value for p, value in parity.items()})},
            options=recipe.model.options,
            metrics=metrics or {},
        )

    return write_artifact(root, options.name, options.version, fill)


def next_version(model_folder: Path) -> str:
    """One more than the highest version that is a number; "1" for the first."""
    numbers = [int(version) for version in list_versions(model_folder) if version.isdigit()]
    return str(max(numbers, default=0) + 1)


def catalogue_of(dataset: Dataset) -> Catalogue:
    """The tables of the artifact: the newest snapshot of the items, all users and their whole stored histories."""
    histories = [history.last(dataset.schema.stored_history) for history in dataset.histories]
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


def check_split(model: nn.Module, requests: Sequence[Features]) -> None:
    """The scores of all candidates must equal the scores of any part of them: no candidate may see another one.

    Raises:
        BuildError: they differ.
    """
    for features in requests[:4]:
        whole = reference_logits(model, features)
        half = max(features.num_candidates // 2, 1)
        part = {
            name: array[:, :half] if name.startswith("candidate_") else array
            for name, array in features.candidates.items()
        }
        again = reference_logits(model, Features(features.history, part, half))
        worst = float(np.abs(whole[:half] - again).max())
        if not worst <= PARITY_BOUNDS[Precision.FP32]:
            raise BuildError(
                f"scores change by {worst:.2g} when the candidate list is cut in half; a candidate of a ranker must "
                "not see the others (no attention, no normalisation across candidates)"
            )


@torch.inference_mode()
def reference_logits(model: nn.Module, features: Features) -> np.ndarray:
    """Torch's float32 logits (C, K) of the real candidates."""
    history, candidates = _tensors(features.history), _tensors(features.candidates)
    logits: np.ndarray = logits_of(model, history, candidates)[0, : features.num_candidates].numpy()
    return logits


def measure_parity(model: nn.Module, graphs: Path, precision: Precision, requests: Sequence[Features]) -> float:
    """max |logit - torch float32 logit| of exported graphs over requests."""
    encode = graphs / "encode.xml"
    encoder = compile_graph(encode, precision, 1, 1) if encode.exists() else None
    executor = OpenVinoExecutor(encoder, compile_graph(graphs / "score.xml", precision, 1, 1))
    worst = 0.0
    for features in requests:
        logits = executor.score(executor.encode(features.history), features.candidates)[: features.num_candidates]
        worst = max(worst, float(np.abs(logits - reference_logits(model, features)).max()))
    return worst


def check_parity(parity: dict[Precision, float]) -> None:
    """Refuse graphs that do not compute what the model computes.

    Raises:
        BuildError: a difference above the precision's bound, or not a number.
    """
    for precision, worst in parity.items():
        if not worst <= PARITY_BOUNDS[precision]:
            raise BuildError(
                f"the compiled graphs differ from the torch model by {worst:.3g} in {precision.value}; "
                f"allowed is {PARITY_BOUNDS[precision]:g}"
            )


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
