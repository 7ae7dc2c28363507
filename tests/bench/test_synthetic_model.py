"""Models of random weights: of the workload's sizes, loadable, with histories as the workload says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from rankd import Ranker
from rankd.artifact import Artifact
from rankd.bench.engine_suite.engine import unsuitable
from rankd.bench.flops import ModelKind, ModelSizes
from rankd.bench.parity import against_torch, scores_in_process
from rankd.bench.synthetic_model import agrees, build_model, catalogue_of, packaged_model
from rankd.bench.workload import Buckets, LogNormal, Users, Workload, draw_requests, load_workload
from rankd.engine.targets import runs_here
from rankd.models.layer_shapes import HstuForm

WORKLOAD = Workload(
    name="tiny",
    use="tests",
    model=ModelSizes(blocks=2, layers=1, width=8, heads=2, hidden=8, tasks=2),
    history=LogNormal(median=6, sigma=0.5, minimum=2, maximum=12),
    candidates=LogNormal(median=4, sigma=0.5, minimum=1, maximum=8),
    users=Users(count=30, zipf_exponent=1.0),
    buckets=Buckets(history=(3, 6), candidates=(4, 8)),
    items=60,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(WORKLOAD, tmp_path_factory.mktemp("models"))


def test_it_ranks_and_agrees_with_torch(built: Path) -> None:
    with Ranker.load(built) as ranker:
        requests = draw_requests(WORKLOAD, ranker.catalogue.ids.users, ranker.catalogue.ids.items, 20)
        scores = scores_in_process(ranker, requests)
        assert [one.shape for one in scores] == [(len(request.candidates), 2) for request in requests]
        assert against_torch(ranker, requests, scores) < 1e-4
        assert not any(ranker.rank(request).unknown for request in requests)


def test_its_sizes_are_the_workloads(built: Path) -> None:
    manifest = Artifact.open(built).manifest
    assert agrees(manifest, WORKLOAD)
    wider = msgspec.structs.replace(WORKLOAD, model=msgspec.structs.replace(WORKLOAD.model, width=16))
    assert not agrees(manifest, wider)
    assert not agrees(manifest, msgspec.structs.replace(WORKLOAD, buckets=Buckets((6,), (4, 8))))
    assert not agrees(msgspec.structs.replace(manifest, model="sasrec"), WORKLOAD)
    assert not agrees(msgspec.structs.replace(manifest, options={"width": 9}), WORKLOAD)
    assert packaged_model(WORKLOAD, built.parent.parent) == built
    assert packaged_model(wider, built.parent.parent) is None
    assert packaged_model(WORKLOAD, built.parent.parent / "nowhere") is None


def test_an_hstu_is_made_where_a_workload_names_one(tmp_path: Path) -> None:
    sizes = ModelSizes(1, 2, 8, heads=2, hidden=8, kind=ModelKind.HSTU, form=HstuForm.DLRM_V3)
    workload = msgspec.structs.replace(WORKLOAD, model=sizes)
    manifest = Artifact.open(build_model(workload, tmp_path)).manifest
    assert (manifest.model, manifest.options["form"], manifest.extends) == ("hstu", "dlrm-v3", True)
    assert agrees(manifest, workload)
    assert not agrees(manifest, WORKLOAD)
    paper = msgspec.structs.replace(sizes, form=HstuForm.PAPER)
    assert not agrees(manifest, msgspec.structs.replace(workload, model=paper))
    assert unsuitable("native", workload).startswith("the model is 'hstu'") or not runs_here("native")


def test_histories_follow_the_workload() -> None:
    workload = load_workload("mixed")
    users = catalogue_of(workload).users
    lengths = np.diff(users.offsets)
    assert lengths.min() == 64
    assert lengths.max() == 512
    assert np.median(lengths) == pytest.approx(180, rel=0.1)
    for user in range(20):
        history = users.history_of(user)
        assert (np.diff(history.times) >= 0).all()
        assert history.times[-1] - history.times[0] > 30 * 86_400
        assert abs((history.events == 0).sum() - (history.events == 1).sum()) <= 1
    again = catalogue_of(workload).users
    assert np.array_equal(again.history.rows, users.history.rows)
