"""Building: what is served is what was trained, and what is not is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry
from safetensors.torch import load_file
from torch import Tensor, nn

from rankd import Ranker, RankRequest
from rankd.bench.parity import stored_features
from rankd.build.checks import kept_state, reference_logits
from rankd.build.pack import BuildOptions, build_artifact, next_version, parity_requests
from rankd.embeddings.table_spec import TableStorage
from rankd.engine.backend import EngineConfig, Precision
from rankd.engine.targets import why_not_model
from rankd.errors import ArtifactError, BuildError, ConfigError
from rankd.features.schema import EmbeddedFeature, FeatureSchema
from rankd.models.protocol import EmbeddedModel, create_model
from rankd.models.sasrec import SASRec
from rankd.train.batches import sample_features
from rankd.train.evaluation import make_test_events
from rankd.train.recipe import ModelChoice
from rankd.types import Features
from tests.train.small_log import RECIPE, small_dataset

DATASET = small_dataset()
KINDS = ["climber", "sasrec", "hstu", "dlrm", "examples/attentive_pooling.py:AttentivePooling"]
OUTSIDE = KINDS[:4]
"""Those whose tables can be beside the graph."""


def made(kind: str) -> nn.Module:
    torch.manual_seed(1)
    options = RECIPE.model.options if kind == "climber" else {}
    model = create_model(kind, DATASET.schema, options)
    std = 0.1 if kind == "dlrm" else 0.2  # cross layers multiply: its logits would be in the thousands
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    if isinstance(model, EmbeddedModel):
        with torch.no_grad():
            for table in model.tables().values():
                table[0] = 0.0  # nobody's, as training leaves it
    return model.eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Ranker]]:
    """Each kind of ranker, built and loaded."""
    rankers = {}
    for kind in KINDS:
        model, root = made(kind), tmp_path_factory.mktemp("models")
        recipe = msgspec.structs.replace(RECIPE, model=ModelChoice(kind, RECIPE.model.options))
        place = build_artifact(root, model, DATASET, recipe, BuildOptions("films", "1"))
        rankers[kind] = model, Ranker.load(place, EngineConfig(executors=1))
    return rankers


def test_nobody_is_told_that_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's converter would tell its makers."""
    sent: list[object] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("openvino_telemetry.utils.sender.TelemetrySender.send", lambda *given: sent.append(given))
    telemetry = init_ovc_telemetry()
    telemetry.consent = True
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("dlrm", {}))
    build_artifact(tmp_path, made("dlrm"), DATASET, recipe, BuildOptions("films", "1"))
    assert sent == []
    telemetry.send_event("ovc", "what is sent", "is heard here", force_send=True)
    assert len(sent) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_what_torch_computes(built: dict[str, tuple[nn.Module, Ranker]], kind: str) -> None:
    model, ranker = built[kind]
    executor = ranker.backend.executor()
    for features in parity_requests(DATASET, 12):
        logits = executor.score([kept_state(executor, features.history)], features.candidates)[0]
        expected = reference_logits(model, features)
        np.testing.assert_allclose(logits[: features.num_candidates], expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_and_offline_evaluation_give_the_same_scores(
    built: dict[str, tuple[nn.Module, Ranker]], kind: str
) -> None:
    """At the end of the log the artifact's tables are the newest snapshot: the two ways must meet there."""
    model, ranker = built[kind]
    log, end = DATASET.log, DATASET.schema.log_end + 1
    events, _ = make_test_events(DATASET, DATASET.validate_until, end, 20, seed=0)
    for event in events[:10]:
        import dataclasses

        at_end = dataclasses.replace(event.sample, time=end, snapshot=len(DATASET.snapshots) - 1)
        offline = reference_logits(model, sample_features(DATASET, DATASET.schema, at_end, event.rows))
        known = event.rows >= 2
        ids = tuple(log.item_ids[row - 2] for row in event.rows[known])
        served = ranker.rank(RankRequest(log.user_ids[event.sample.user], ids, time=end))
        np.testing.assert_allclose(served.scores, offline[known], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_split_of_the_candidates_scores_like_the_whole(
    built: dict[str, tuple[nn.Module, Ranker]], kind: str, data: st.DataObject
) -> None:
    _, ranker = built[kind]
    user = data.draw(st.sampled_from((*ranker.catalogue.ids.users, "somebody new")))
    items = tuple(data.draw(st.lists(st.sampled_from(ranker.catalogue.ids.items), min_size=2, max_size=64)))
    cut = data.draw(st.integers(1, len(items) - 1))
    whole = ranker.rank(RankRequest(user, items)).scores
    parts = [ranker.rank(RankRequest(user, part)).scores for part in (items[:cut], items[cut:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)


class SeesOthers(nn.Module):
    """A ranker that breaks the rule: a candidate's score depends on the other candidates."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.item = nn.Embedding(schema.num_item_rows, len(schema.tasks))

    def forward(self, history: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        items: Tensor = self.item(candidates["candidate_item"])
        return items - items.mean(1, keepdim=True)


class NotANumber(SeesOthers):
    """A ranker whose scores are NaN."""

    def forward(self, history: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        items: Tensor = self.item(candidates["candidate_item"])
        return items / 0.0 * 0.0


@pytest.mark.parametrize("model", [SeesOthers, NotANumber])
def test_a_model_that_breaks_the_rules_is_refused(tmp_path: Path, model: type[SeesOthers]) -> None:
    with pytest.raises(BuildError, match="must not see the others"):
        build_artifact(tmp_path, model(DATASET.schema), DATASET, RECIPE, BuildOptions("films", "1"))
    assert not (tmp_path / "films").exists()


def test_unknown_targets_are_refused_and_versions_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown target 'openvin'.*Did you mean 'openvino'"):
        build_artifact(tmp_path, made("sasrec"), DATASET, RECIPE, BuildOptions("films", "1", targets=("openvin",)))
    assert next_version(tmp_path / "films") == "1"
    for version in ("2", "11", "beta"):
        (tmp_path / "films" / version).mkdir(parents=True)
        (tmp_path / "films" / version / "model.toml").touch()
    assert next_version(tmp_path / "films") == "12"


@pytest.mark.parametrize("target", ["onnxruntime", "reference"])
def test_a_precision_that_a_target_lacks_is_refused_by_name(tmp_path: Path, target: str) -> None:
    options = BuildOptions("films", "1", Precision.BF16, (target,))
    with pytest.raises(BuildError, match=f"cannot build for {target} in bf16: .* fp32"):
        build_artifact(tmp_path, made("sasrec"), DATASET, RECIPE, options)
    assert not (tmp_path / "films").exists()


class NoSuchOperation(SeesOthers):
    """A ranker with an operation that no target has."""

    def forward(self, history: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        items: Tensor = self.item(candidates["candidate_item"])
        logits: Tensor = items + torch.special.bessel_y0(items.abs() + 1.0)
        return logits


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_an_operation_that_a_target_lacks_is_refused_by_name(tmp_path: Path, target: str) -> None:
    with pytest.raises(BuildError, match="bessel_y0"):
        build_artifact(
            tmp_path, NoSuchOperation(DATASET.schema), DATASET, RECIPE, BuildOptions("films", "1", targets=(target,))
        )
    assert not (tmp_path / "films" / "1").exists()


class ForgetsTheState(nn.Module):
    """A ranker whose `extend` is wrong: it counts the new events alone."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__()
        self.item = nn.Embedding(schema.num_item_rows, len(schema.tasks))
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, history: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"count": history["history_length"].sum(1, keepdim=True) * self.scale}

    def extend(self, state: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"count": new["history_length"].sum(1, keepdim=True) * self.scale + 0.0 * state["count"]}

    def score(self, state: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> Tensor:
        items: Tensor = self.item(candidates["candidate_item"])
        return items + state["count"][:, None]


def test_an_extend_that_forgets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="a state that was extended"):
        build_artifact(tmp_path, ForgetsTheState(DATASET.schema), DATASET, RECIPE, BuildOptions("films", "1"))
    assert not (tmp_path / "films" / "1").exists()


@pytest.mark.parametrize(("storage", "bound"), [("fp32", 1e-3), ("fp16", 0.05), ("int8", 0.3)])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_tables_beside_the_graph_give_the_scores_of_those_in_it(
    tmp_path: Path, kind: str, storage: str, bound: float
) -> None:
    """From requests through the whole server path, and from the artifact's own evaluation."""
    model = made(kind)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice(kind, RECIPE.model.options if kind == "climber" else {}))
    options = BuildOptions("films", "1", tables=TableStorage(storage))
    place = build_artifact(tmp_path, model, DATASET, recipe, options)
    names = {path.name for path in (place / "embeddings").iterdir()}
    assert names == {f"{name}.safetensors" for name in tables_of(model)}
    kept = load_file(place / "weights.safetensors")
    outside = ("tokens.item", "tokens.categories", "tokens.user_categories", "tokens.user_columns")
    assert not any(name.startswith(outside) for name in kept)
    users, items = DATASET.log.user_ids, DATASET.log.item_ids
    with Ranker.load(place, EngineConfig(executors=1)) as ranker:
        for user in (*users[:5], "nobody"):
            candidates = (*items[:9], "unheard of", items[3])
            given = ranker.rank(RankRequest(user, candidates)).scores
            features = stored_features(ranker.features, RankRequest(user, candidates))
            history, plain = (
                {name: array for name, array in arrays.items() if not name.endswith("_embedded")}
                for arrays in (features.history, features.candidates)
            )
            expected = reference_logits(model, Features(history, plain, features.num_candidates))
            expected[-2] = DATASET.schema.missing_item_score
            np.testing.assert_allclose(given, expected, atol=bound)
            assert np.abs(given - expected).max() > 0 or storage == "fp32"


def test_a_model_with_its_tables_in_its_graph_keeps_them_there(tmp_path: Path) -> None:
    options = BuildOptions("films", "1", tables=TableStorage.FP32)
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice(KINDS[-1], {}))
    with pytest.raises(BuildError, match="has no `embedded` and `tables`; build it without --tables"):
        build_artifact(tmp_path, made(KINDS[-1]), DATASET, recipe, options)
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize("target", ["reference", "native", "cuda"])
def test_targets_that_look_rows_up_by_themselves_are_refused(tmp_path: Path, target: str) -> None:
    options = BuildOptions("films", "1", targets=(target,), fall_back=True, tables=TableStorage.FP32)
    with pytest.raises(BuildError, match=f"cannot build for {target}"):
        build_artifact(tmp_path, made("climber"), DATASET, RECIPE, options)
    outside = msgspec.structs.replace(DATASET.schema, embedded=embedded_of("climber"))
    reason = f"the target {target} computes with the tables in the graph; build without --tables"
    assert why_not_model(target, "climber", RECIPE.model.options, outside) == reason


class ReadsRowZero(SASRec):
    """A ranker whose row of nobody counts, which no look-up beside the graph knows."""

    def __init__(self, schema: FeatureSchema) -> None:
        super().__init__(schema, width=8)
        with torch.no_grad():
            self.tokens.item.weight[0] = 3.0
            self.tokens.item.weight[1:] = 0.1

    def encode(self, history: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"user": self.tokens.events(history).sum((1, 2))}


def test_tables_that_are_not_those_of_the_model_are_refused(tmp_path: Path) -> None:
    options = BuildOptions("films", "1", tables=TableStorage.FP32)
    with pytest.raises(BuildError, match="row 0 of each table has to be zeros"):
        build_artifact(tmp_path, ReadsRowZero(DATASET.schema).eval(), DATASET, RECIPE, options)
    assert not (tmp_path / "films" / "1").exists()


@pytest.mark.parametrize("harm", ["missing", "cut", "other rows"])
def test_damaged_tables_are_refused(tmp_path: Path, harm: str) -> None:
    recipe = msgspec.structs.replace(RECIPE, model=ModelChoice("dlrm", {}))
    options = BuildOptions("films", "1", tables=TableStorage.FP32)
    place = build_artifact(tmp_path, made("dlrm"), DATASET, recipe, options)
    table = place / "embeddings" / "item.safetensors"
    if harm == "missing":
        table.unlink()
    elif harm == "cut":
        table.write_bytes(table.read_bytes()[:-4])
    else:
        content = bytearray(table.read_bytes())
        content[100] ^= 1
        table.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"item\.safetensors"):
        Ranker.load(place, EngineConfig(executors=1))


def embedded_of(kind: str) -> tuple[EmbeddedFeature, ...]:
    model = made(kind)
    assert isinstance(model, EmbeddedModel)
    return model.embedded()


def tables_of(model: nn.Module) -> dict[str, Any]:
    assert isinstance(model, EmbeddedModel)
    return model.tables()
