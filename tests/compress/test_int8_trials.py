"""Int8 as a dimension of a search: tried, judged, timed, kept, chosen and built as it serves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from rankd.artifact import Artifact
from rankd.build.int8_graphs import Int8Plan
from rankd.build.pack import BuildOptions, build_artifact
from rankd.cli.compression import compress as command
from rankd.compress import trials
from rankd.compress.accuracy_gate import AccuracyGate
from rankd.compress.compress_run import compress, read_compression, read_int8
from rankd.compress.compression_recipe import FineTuning, Gate, ReferenceRequest
from rankd.compress.quantization import plan_sha256, read_plan
from rankd.compress.record_files import write_record
from rankd.compress.search import Looks, Search
from rankd.compress.search_plan import SearchPlan, StepSpace, Timing
from rankd.compress.search_report import report_of, write_report
from rankd.compress.speed_target import Pick, Target
from rankd.compress.trials import Made, TrialRecord
from rankd.engine.backend import Precision
from rankd.errors import ConfigError, DataError, GateRefused
from rankd.gate_record import Compression, Int8Record
from rankd.train.description import Split
from rankd.train.evaluation import Progress
from rankd.train.run import file_sha256, open_run
from rankd.train.trainer import Trainer
from tests.compress.trained_run import WIDE, train_small

INT8 = {"requests": 24, "min_requests": 16, "max_error": 0.5}
TOO_MANY = {"requests": 9000, "min_requests": 9000}
PRUNE = StepSpace("prune", optional=True, settings={"structures": ["ffn"], "requests": 8}, vary={"flops": (0.8,)})
PLAN = SearchPlan(
    steps=(PRUNE,),
    vary={"quantize": (False, INT8, TOO_MANY)},
    halvings=0,
    finetune=FineTuning(epochs=1, learning_rate=1e-3),
    request=ReferenceRequest(candidates=8, target="reference"),
    timing=Timing(requests=4, rounds=1, throughput_s=0.01),
    gate=Gate(bounds={"ndcg@10": 0.2, "gauc": 0.2}, min_users=20, sampled=20),
)
SPLIT = Split("2026-08-25", "2026-09-05")


def quiet(done: int, total: int, line: str) -> None:
    """No bar."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), SPLIT, WIDE)


@pytest.fixture(scope="module")
def trained() -> list[Path]:
    """Where the search of `searched` has trained."""
    return []


@pytest.fixture(scope="module")
def searched(run: Path, trained: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that has tried everything."""
    folder, real = tmp_path_factory.mktemp("searched") / "search", Trainer.start

    def start(trainer: Trainer, progress: Progress) -> list[dict[str, float]]:
        trained.append(trainer.folder)
        return real(trainer, progress)

    with pytest.MonkeyPatch.context() as patch, Search(run, folder, PLAN) as search:
        patch.setattr(Trainer, "start", start)
        assert search.start(30, quiet)
    return folder


def trials_in(run: Path, folder: Path) -> dict[str, TrialRecord]:
    """Of a search that is over, by their labels."""
    with Search(run, folder) as search:
        search.start(0, quiet)
        return {one.label: one for one in search.trials.known}


@pytest.fixture(scope="module")
def found(run: Path, searched: Path) -> dict[str, TrialRecord]:
    return trials_in(run, searched)


def made_of(trial: TrialRecord) -> Made:
    assert trial.made is not None, trial.failure
    return trial.made


def int8_of(trial: TrialRecord) -> Int8Record:
    record = made_of(trial).int8
    assert record is not None
    return record


def named(found: dict[str, TrialRecord], *, steps: bool, requests: int) -> TrialRecord:
    """A trial by what it does: `requests` are those of int8, 0 for none."""
    (one,) = (
        trial
        for trial in found.values()
        if bool(trial.recipe.steps) is steps
        and (0 if trial.recipe.quantize is None else trial.recipe.quantize.requests) == requests
    )
    return one


def test_int8_is_tried_judged_and_timed_as_it_serves(searched: Path, found: dict[str, TrialRecord]) -> None:
    assert len(found) == 5
    plain, narrow, alone = (
        named(found, steps=True, requests=0), named(found, steps=True, requests=24),
        named(found, steps=False, requests=24),
    )  # fmt: skip
    assert made_of(plain).int8 is None
    assert not (searched / "trials" / plain.trial_id / "int8.json").exists()
    for one in (narrow, alone):
        record, made = int8_of(one), made_of(one)
        assert read_plan(searched / "trials" / one.trial_id, record).limits
        assert record.gate != made.gate  # the quantized graphs and the torch model, each by itself
        assert record.gate.num_requests == made.gate.num_requests  # on the same days
        assert made.served_gate == record.gate
        assert min(msgspec.structs.astuple(made.speed)) > 0
        outcome = one.outcome("ndcg@10")
        assert outcome is not None
        assert outcome.accuracy == record.gate.metrics["ndcg@10"].kept
        assert outcome.floats < 0.5
    assert made_of(alone).start.flops == 1.0
    assert made_of(narrow).speed != made_of(plain).speed  # another engine has been measured


def test_too_few_requests_are_the_reason_in_the_trial(searched: Path, found: dict[str, TrialRecord]) -> None:
    for steps in (True, False):
        trial = named(found, steps=steps, requests=9000)
        assert trial.made is None
        assert "ranges of activations need 9000" in trial.failure
        assert [file.name for file in (searched / "trials" / trial.trial_id).iterdir()] == ["trial.json"]


def test_what_differs_by_int8_alone_has_the_weights_of_the_other(
    searched: Path, found: dict[str, TrialRecord], trained: list[Path]
) -> None:
    plain, narrow = named(found, steps=True, requests=0), named(found, steps=True, requests=24)
    assert [folder.name for folder in trained] == [f".{plain.trial_id}"]
    weights = [searched / "trials" / one.trial_id / "best.safetensors" for one in (plain, narrow)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert made_of(plain).gate == made_of(narrow).gate


def forbidden(*arguments: object) -> Any:
    raise AssertionError("this was done before")


def test_a_trial_in_int8_is_what_its_recipe_makes(
    run: Path, searched: Path, found: dict[str, TrialRecord], tmp_path: Path
) -> None:
    trial = named(found, steps=True, requests=24)
    made = compress(run, trial.recipe, tmp_path / "again")
    assert isinstance(made.int8, Int8Record)
    assert made.int8.plan_sha256 == int8_of(trial).plan_sha256
    mine = load_file(searched / "trials" / trial.trial_id / "best.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "best.safetensors").items():
        assert (mine[name] == tensor).all(), name


def settled(run: Path, folder: Path, trial: TrialRecord, out: Path) -> Compression:
    with Search(run, folder) as search:
        search.start(0, quiet)
        return search.settle(Pick(trial, "a test"), Target(), out, quiet)


def test_a_choice_in_int8_is_judged_in_int8_and_built_so(
    run: Path, searched: Path, found: dict[str, TrialRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, out = named(found, steps=True, requests=24), tmp_path / "small"
    shutil.copytree(searched, tmp_path / "search")
    made = settled(run, tmp_path / "search", trial, out)
    assert made == read_compression(out)
    assert isinstance(made.int8, Int8Record)
    assert isinstance(made.search, msgspec.Struct)
    assert made.int8.gate.since == made.gate.since == made.search.until  # on the days that were kept back
    assert made.int8.gate.metrics != made.gate.metrics
    assert made.int8.plan_sha256 == int8_of(trial).plan_sha256
    assert made.int8.ms.keys() >= {"int8"}
    monkeypatch.setattr(AccuracyGate, "judge", forbidden)
    assert settled(run, tmp_path / "search", trial, out) == made  # once
    about, dataset, model = open_run(out)
    options = BuildOptions("films", "1", Precision.INT8, int8=read_int8(out, made))
    place = build_artifact(tmp_path, model, dataset, about.recipe, options, compression=made)
    assert Artifact.open(place).manifest.engines["openvino"].precision == "int8"


def with_scales(folder: Path, trial: TrialRecord, factor: float) -> TrialRecord:
    """The trial with other scales, which its record knows, as if they had been found so."""
    place = folder / "trials" / trial.trial_id
    plan = read_plan(place, int8_of(trial))
    other = Int8Plan({graph: {key: factor * one for key, one in some.items()} for graph, some in plan.limits.items()})
    (place / "int8.json").write_bytes(msgspec.json.encode(other))
    record = msgspec.structs.replace(int8_of(trial), plan_sha256=plan_sha256(other))
    return msgspec.structs.replace(trial, made=msgspec.structs.replace(made_of(trial), int8=record))


def test_a_choice_that_int8_spoils_is_refused_though_its_floats_pass(
    run: Path, searched: Path, found: dict[str, TrialRecord], tmp_path: Path
) -> None:
    """Scales that cut off nearly everything: only the quantized graphs can tell, for the weights are the original's.
    What the gate says of them counts, whatever it says of the floats."""
    shutil.copytree(searched, tmp_path / "search")
    spoiled = Pick(with_scales(tmp_path / "search", named(found, steps=False, requests=24), 1e-4), "a test")
    with Search(run, tmp_path / "search") as search:
        search.start(0, quiet)
        search.settle(spoiled, Target(), tmp_path / "easy", quiet)
        (look,) = search.looks()
        assert look.int8 is not None
        assert look.gate.metrics["ndcg@10"].kept == 1.0
        assert abs(look.int8.gate.metrics["ndcg@10"].kept - 1) > 0.1
        worse = {name: msgspec.structs.replace(one, low=0.1) for name, one in look.int8.gate.metrics.items()}
        lost = msgspec.structs.replace(look.int8, gate=msgspec.structs.replace(look.int8.gate, metrics=worse))
        write_record(tmp_path / "search" / "verdicts.json", Looks((msgspec.structs.replace(look, int8=lost),)))
        with pytest.raises(GateRefused, match=r"is refused in int8 on .*, which the search did not see: .*gauc keeps"):
            search.settle(spoiled, Target(), tmp_path / "small", quiet)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "int8.json cannot be read: .*; remove .* and compress again"), (None, "int8.json cannot be read"),
     ('{"limits": {"score": {"0123456789abcdef.0": 1.0}}}', "int8.json: .*not what the gate has judged")],
)  # fmt: skip
def test_scales_of_a_trial_that_are_damaged_are_refused_by_their_place(
    run: Path, searched: Path, found: dict[str, TrialRecord], tmp_path: Path, content: str | None, message: str
) -> None:
    trial = named(found, steps=True, requests=24)
    shutil.copytree(searched, tmp_path / "search")
    place = tmp_path / "search" / "trials" / trial.trial_id / "int8.json"
    place.unlink()
    if content is not None:
        place.write_text(content)
    with pytest.raises(ConfigError, match=message):
        settled(run, tmp_path / "search", trial, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_search_that_is_interrupted_in_int8_goes_on(
    run: Path, searched: Path, found: dict[str, TrialRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def stopping(*arguments: object) -> Any:
        raise Interrupted

    folder, lost = tmp_path / "search", named(found, steps=True, requests=24)
    shutil.copytree(searched, folder)
    shutil.rmtree(folder / "trials" / lost.trial_id)
    monkeypatch.setattr(Trainer, "start", forbidden)
    with Search(run, folder) as search, monkeypatch.context() as patch:
        patch.setattr(trials, "write_plan", stopping)  # scales were found, and the gate has judged
        with pytest.raises(Interrupted):
            search.start(30, quiet)
    assert [place.name for place in (folder / "trials").glob(".*")] == [f".{lost.trial_id}"]
    with Search(run, folder) as search:
        assert search.start(30, quiet)
        again = {one.label: one for one in search.trials.known}
    assert not list((folder / "trials").glob(".*"))
    assert list(again) == list(found)
    mine = made_of(again[lost.label])
    assert (mine.gate, mine.start) == (made_of(lost).gate, made_of(lost).start)
    assert without_clocks(mine) == without_clocks(made_of(lost))
    assert (folder / "trials" / lost.trial_id / "int8.json").read_bytes() == (
        searched / "trials" / lost.trial_id / "int8.json"
    ).read_bytes()


def without_clocks(made: Made) -> Int8Record | None:
    return None if made.int8 is None else msgspec.structs.replace(made.int8, ms={})


def test_the_report_shows_what_is_in_int8(found: dict[str, TrialRecord], tmp_path: Path) -> None:
    report = report_of(list(found.values()), "ndcg@10", Target(), True)
    write_report(tmp_path, report, Target())
    told = json.loads((tmp_path / "front.json").read_text())
    in_int8 = [point for point in told["points"] if point["int8"] is not None]
    assert len(in_int8) == 2
    for point in in_int8:
        assert point["gate"] == point["int8"]["gate"]
        assert "int8" in point["label"]
        assert point["recipe"]["quantize"]["requests"] == 24
    assert len(told["failures"]) == 2
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def write_requests(run: Path, path: Path, count: int) -> Path:
    """Requests of different users of the log, for the same items."""
    log = open_run(run)[1].log
    lines = [{"user_id": log.user_ids[number], "candidates": list(log.item_ids[:9])} for number in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


ALONE = msgspec.structs.replace(PLAN, steps=(), vary={"quantize": (INT8,)})


def test_requests_of_a_file_are_kept_with_the_search(run: Path, tmp_path: Path) -> None:
    file, folder = write_requests(run, tmp_path / "requests.jsonl", 40), tmp_path / "search"
    digest = file_sha256(file)
    with Search(run, folder, ALONE, calibrate=file):
        pass
    file.unlink()
    with Search(run, folder) as search:  # the same command without the file, or after it has gone
        assert search.start(30, quiet)
        (trial,) = search.trials.known
    assert int8_of(trial).calibration_sha256 == digest
    assert int8_of(trial).num_requests == 24
    other = write_requests(run, tmp_path / "other.jsonl", 41)
    with pytest.raises(ConfigError, match="or other requests for int8"):
        Search(run, folder, calibrate=other)
    (folder / "calibration.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"calibration.jsonl has changed since the search was begun"):
        Search(run, folder)


def test_a_file_of_requests_that_is_wrong_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"user": "somebody"}\n')
    with pytest.raises(DataError, match="line 1"):
        Search(run, tmp_path / "search", PLAN, calibrate=file)
    with pytest.raises(ConfigError, match=r"the plan has no recipe in int8; add quantize = \[false, \{\}\]"):
        Search(run, tmp_path / "search", msgspec.structs.replace(PLAN, vary={}), calibrate=file)
    assert not (tmp_path / "search").exists()


def test_the_command_line_takes_requests_for_a_search(run: Path, tmp_path: Path) -> None:
    file, plan = tmp_path / "requests.jsonl", tmp_path / "plan.toml"
    file.write_text("")
    plan.write_text("[vary]\nquantize = [{}]\n[gate]\nmin_users = 20\n")
    told = CliRunner().invoke(
        command, [str(run), "--search", "--plan", str(plan), "--out", str(tmp_path / "s"), "--calibrate", str(file)]
    )
    assert isinstance(told.exception, DataError)
    assert "requests.jsonl is empty" in str(told.exception)
