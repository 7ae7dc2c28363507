"""A run folder and what it was made from, so that `eval` and `build` can repeat exactly what `train` saw.

run.json         the log's path and checksum, its description, the recipe, the counts of rows
evaluation.json  the last evaluation (written by `rankd eval`)
beside them, what `trainer.py` writes
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from torch import nn

from rankd.artifact import Artifact
from rankd.config import read_struct
from rankd.embeddings.model_tables import open_model_tables
from rankd.engine.backend import EngineConfig, Executor
from rankd.engine.targets import load_backend
from rankd.errors import ConfigError, DataError, nearest
from rankd.features.embedded import EmbeddedInputs
from rankd.models.protocol import create_model
from rankd.train.baselines import baselines
from rankd.train.batches import sample_features
from rankd.train.description import LogDescription
from rankd.train.evaluation import EvaluationReport, Progress, Scorer, compare, make_test_events, score_events
from rankd.train.interactions import InteractionLog, read_log
from rankd.train.recipe import Recipe
from rankd.train.samples import Dataset, Sample, prepare
from rankd.train.trainer import check_unseen, load_weights, seen_rows, torch_scorer
from rankd.types import Float32Array, Int32Array, UserState

T = TypeVar("T", bound=msgspec.Struct)


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """run.json."""

    data: str
    data_sha256: str
    description: LogDescription
    recipe: Recipe
    rows: dict[str, int]


def packaged_or_file(kind: type[T], folder: str, name: str) -> T:
    """A TOML file by its path, or one of those that come with the package ("logs", "recipes") by its name.

    Raises:
        ConfigError: neither, or its content is not right.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return read_struct(kind, path)
    known = {
        entry.name.removesuffix(".toml"): entry
        for entry in resources.files("rankd.train").joinpath(folder).iterdir()
        if entry.name.endswith(".toml")
    }
    if name not in known:
        raise ConfigError(
            f"'{name}' is neither a .toml file nor one of the packaged {folder}: {', '.join(sorted(known))}."
            f"{nearest(name, known)}"
        )
    with resources.as_file(known[name]) as packaged:
        return read_struct(kind, packaged)


def begin_run(folder: Path, data: Path, description: LogDescription, recipe: Recipe) -> tuple[Run, InteractionLog]:
    """Read the log and write run.json, or check that the folder's run is of the same log, description and recipe.

    Raises:
        ConfigError: the folder holds another run. DataError: the log cannot be read.
    """
    log = read_log(data, description)
    run = Run(str(data.resolve()), file_sha256(data), description, recipe, log.report)
    place = folder / "run.json"
    if place.exists():
        known = read_run(folder)
        for name in ("data_sha256", "description", "recipe"):
            if getattr(known, name) != getattr(run, name):
                raise ConfigError(
                    f"{folder} holds a run with another {name}; train into a new folder, or remove this one"
                )
    folder.mkdir(parents=True, exist_ok=True)
    place.write_bytes(msgspec.json.format(msgspec.json.encode(run)))
    return run, log


def read_run(folder: Path) -> Run:
    """run.json of a folder.

    Raises:
        ConfigError: not a run folder, or one of another version of rankd.
    """
    try:
        return msgspec.json.decode((folder / "run.json").read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{folder} is not a training run (no run.json); make one with `rankd train`") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{folder / 'run.json'}: {error}; train again with this version of rankd") from error


def open_run(folder: Path, data: Path | None = None) -> tuple[Run, Dataset, nn.Module]:
    """The run, its dataset packed again, and its model with the best weights, ready to evaluate and to build.

    `data` says where the log is now, if it was moved; its content must be the same.

    Raises:
        ConfigError, DataError: something is missing or has changed since training, or the weights have seen days of
            the test time.
    """
    run = read_run(folder)
    path = data or Path(run.data)
    if not path.exists():
        raise DataError(f"the log of this run, {path}, is not there; say where it is with --data")
    if file_sha256(path) != run.data_sha256:
        raise DataError(f"{path} is not the log that {folder} was trained on (its checksum differs)")
    dataset = prepare(read_log(path, run.description), run.recipe.shapes)
    torch.manual_seed(run.recipe.training.seed)
    model = create_model(run.recipe.model.kind, dataset.schema, run.recipe.model.options)
    load_weights(model, folder / "best.safetensors")
    check_unseen(folder / "best.safetensors", dataset)
    share_unseen_items(model, dataset)
    return run, dataset, model.eval()


def evaluate_run(
    folder: Path,
    data: Path | None,
    artifact: Path | None,
    engine: EngineConfig,
    sampled: int,
    seed: int,
    progress: Progress,
) -> tuple[EvaluationReport, dict[str, Any]]:
    """Evaluate a run's model, or an artifact built from it on an engine, against the baselines on the log's test time.

    The evaluation of the torch model is kept in the run folder, from where `build` takes its metrics.
    """
    _, dataset, model = open_run(folder, data)
    events, counts = make_test_events(dataset, dataset.validate_until, dataset.schema.log_end + 1, sampled, seed)
    scorer = torch_scorer(model, dataset) if artifact is None else engine_scorer(artifact, engine, dataset)
    contestants = {"ranker": score_events(events, scorer, dataset.schema, True, progress)}
    for name, baseline in baselines(dataset, dataset.validate_until).items():
        contestants[name] = score_events(events, baseline, dataset.schema, logits=False)
    report = compare(contestants, seed)
    document = {"baskets": counts, "sampled": sampled, "seed": seed, **msgspec.to_builtins(report)}
    if artifact is None:
        (folder / "evaluation.json").write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    return report, document


def engine_scorer(artifact: Path, engine: EngineConfig, dataset: Dataset) -> Scorer:
    """An artifact on an engine as a contestant, on the dataset's features of each event's own time.

    Raises:
        ConfigError: the artifact was built for another schema.
        ArtifactError, EngineFailure: it does not run on this engine.
    """
    opened = Artifact.open(artifact)
    if msgspec.structs.replace(opened.schema, embedded=()) != dataset.schema:
        raise ConfigError(f"{artifact} was built from another log or recipe than this run")
    return executor_scorer(opened, load_backend(opened, engine).executor(), dataset)


def executor_scorer(opened: Artifact, executor: Executor, dataset: Dataset) -> Scorer:
    """As `engine_scorer`, of an executor of an artifact that is open, whose schema is the dataset's."""
    widest, widths = dataset.schema.max_candidates, opened.schema.embedded_widths
    embedded = EmbeddedInputs(opened.schema, open_model_tables(opened.path, widths)) if widths else None

    def scorer(sample: Sample, rows: Int32Array) -> Float32Array:
        parts = []
        for start in range(0, len(rows), widest):
            features = sample_features(dataset, dataset.schema, sample, rows[start : start + widest])
            features = features if embedded is None else embedded.embed(features)
            lengths = tuple(features.history["history_length"][0].tolist())
            state = UserState(executor.encode(features.history), lengths)
            parts.append(executor.score([state], features.candidates)[0, : features.num_candidates])
        return np.concatenate(parts)

    return scorer


def read_metrics(folder: Path) -> dict[str, float]:
    """The ranker's metrics of the last evaluation; empty if there was none."""
    place = folder / "evaluation.json"
    if not place.exists():
        return {}
    table = msgspec.json.decode(place.read_bytes())["table"]["ranker"]
    return {name: interval["value"] for name, interval in table.items()}


def share_unseen_items(model: nn.Module, dataset: Dataset) -> None:
    """Items that training never saw get the unknown item's embedding, where the model has one (`tokens`)."""
    tokens = getattr(model, "tokens", None)
    if tokens is not None and hasattr(tokens, "share_unseen"):
        tokens.share_unseen(seen_rows(dataset))


def weights_sha256(folder: Path) -> str:
    """The checksum of a run's best weights, which stands for the run."""
    return file_sha256(folder / "best.safetensors")


def file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
