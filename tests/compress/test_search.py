"""A search from end to end: what it finds is a run that is built, what stops goes on, and no day is used twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from rankd.artifact import Artifact
from rankd.build.pack import BuildOptions, build_artifact
from rankd.cli.compression import compress as command
from rankd.compress.compress_run import compress, read_compression
from rankd.compress.compression_recipe import FineTuning, Gate, ReferenceRequest
from rankd.compress.search import Search
from rankd.compress.search_plan import SearchPlan, StepSpace, Timing
from rankd.compress.search_report import check_drawing, report_of, write_report
from rankd.compress.speed_target import Limit, Target, pick
from rankd.compress.trials import TrialRecord
from rankd.errors import ConfigError, DataError, GateRefused, MissingExtra, TargetMissed
from rankd.train.description import Split
from rankd.train.run import open_run
from tests.compress.trained_run import train_small

PRUNE = StepSpace(
    "prune", settings={"ffn_multiple": 4, "width_multiple": 2, "requests": 8}, vary={"flops": (0.8, 0.6, 0.0001)}
)
PLAN = SearchPlan(
    steps=(PRUNE,),
    width=3,
    halvings=1,
    finetune=FineTuning(epochs=2, learning_rate=1e-3),
    request=ReferenceRequest(candidates=8, target="reference"),
    timing=Timing(requests=5, rounds=1, throughput_s=0.01),
    gate=Gate(bounds={"ndcg@10": 0.3, "gauc": 0.3}, min_users=20),
)
TOML = """
width = 3
halvings = 1
[[steps]]
kind = "prune"
settings = { ffn_multiple = 4, width_multiple = 2, requests = 8 }
vary = { flops = [0.8, 0.6, 0.0001] }
[finetune]
epochs = 2
learning_rate = 1e-3
[request]
candidates = 8
target = "reference"
[timing]
requests = 5
rounds = 1
throughput_s = 0.01
[gate]
bounds = { "ndcg@10" = 0.3, gauc = 0.3 }
min_users = 20
"""


def quiet(done: int, total: int, line: str) -> None:
    """No bar."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_small(tmp_path_factory.mktemp("run"), Split("2026-08-25", "2026-09-05"))


@pytest.fixture(scope="module")
def searched(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that has tried everything."""
    folder = tmp_path_factory.mktemp("searched") / "search"
    with Search(run, folder, PLAN) as search:
        assert search.start(30, quiet)
    return folder


def trials_in(run: Path, folder: Path) -> list[TrialRecord]:
    """Of a search that is over, in their order."""
    with Search(run, folder) as search:
        search.start(0, quiet)
        return search.trials.known


@pytest.fixture(scope="module")
def found(run: Path, searched: Path) -> list[TrialRecord]:
    """The trials of that search, as whoever opens it again reads them."""
    return trials_in(run, searched)


def same(one: TrialRecord, other: TrialRecord) -> bool:
    """All but what clocks measure."""
    if one.made is None or other.made is None:
        return (one.label, one.failure) == (other.label, other.failure)
    return (one.recipe, one.made.start, one.made.gate) == (other.recipe, other.made.start, other.made.gate)


def test_everything_is_tried_and_what_cannot_be_done_says_why(searched: Path, found: list[TrialRecord]) -> None:
    trials = found
    assert sorted(one.recipe.finetune.epochs for one in trials) == [1, 1, 1, 2]
    (impossible,) = [one for one in trials if one.made is None]
    assert impossible.label == "prune 0.0001"
    assert "the budget of" in impossible.failure
    assert "cannot be met" in impossible.failure
    for one in trials:
        folder = searched / "trials" / one.trial_id
        assert (folder / "best.safetensors").exists() is (one.made is not None)
        assert not (folder / "checkpoint.pt").exists()
        if one.made is not None:
            assert one.made.start.flops <= 0.8
            assert min(msgspec.structs.astuple(one.made.speed)) > 0
    assert not list((searched / "trials").glob(".*"))


def test_a_trial_is_what_its_recipe_makes(run: Path, searched: Path, found: list[TrialRecord], tmp_path: Path) -> None:
    """Nothing of the search is in the model: the recipe alone gives the same weights."""
    trial = found[-1]
    compress(run, trial.recipe, tmp_path / "again")
    mine = load_file(searched / "trials" / trial.trial_id / "best.safetensors")
    for name, tensor in load_file(tmp_path / "again" / "best.safetensors").items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)


def test_the_choice_is_judged_once_on_days_that_the_search_did_not_see(
    run: Path, searched: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    with Search(run, searched) as search:
        search.start(0, quiet)
        known = search.trials.known
        chosen = pick(known, Target(), "ndcg@10")
        made = search.settle(chosen, Target(), out, quiet)
        looks = search.looks()
        again = search.settle(chosen, Target(), out, quiet)
    assert made == again == read_compression(out)
    assert [look.trial_id for look in looks] == [chosen.trial.trial_id]
    assert isinstance(made.search, msgspec.Struct)
    assert made.search.tried == len(known)
    assert made.search.judged == 1
    assert made.search.until == made.gate.since  # where choosing ends, judging begins
    assert made.search.since < made.search.until < made.gate.until
    assert chosen.trial.made is not None
    assert chosen.trial.made.gate.num_requests != made.gate.num_requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    about, dataset, model = open_run(out)
    place = build_artifact(
        tmp_path, model, dataset, about.recipe, BuildOptions("films", "1", targets=("reference",)), compression=made
    )
    assert Artifact.open(place).manifest.compression == made


def test_a_choice_that_fails_there_is_refused_and_leaves_what_was(run: Path, searched: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "search", tmp_path / "small"
    shutil.copytree(searched, folder)
    with Search(run, folder) as search:
        search.start(0, quiet)
        chosen = pick(search.trials.known, Target(), "ndcg@10")
        search.settle(chosen, Target(), out, quiet)
        before = (out / "compression.json").read_bytes()
        hard = Target(bounds={"gauc": 0.999999, "ndcg@10": 0.999999})
        with pytest.raises(GateRefused, match=r"which the search did not see: .* keeps .* were? judged"):
            search.settle(chosen, hard, out, quiet)
    assert (out / "compression.json").read_bytes() == before


def test_the_report_names_the_fronts_and_the_choice(found: list[TrialRecord], tmp_path: Path) -> None:
    trials, target = found, Target((Limit("p50", 1e6),), {"ndcg@10": 0.2})
    chosen = pick(trials, target, "ndcg@10")
    report = report_of(trials, "ndcg@10", target, True, chosen.trial.trial_id, chosen.why)
    write_report(tmp_path, report, target)
    told = json.loads((tmp_path / "front.json").read_text())
    assert told["chosen"] == chosen.trial.trial_id
    assert told["complete"] is True
    assert list(told["failures"]) == ["prune 0.0001"]
    assert {point["gate"]["metrics"]["ndcg@10"]["bound"] for point in told["points"]} == {0.2}
    fastest = min(told["points"], key=lambda point: point["speed"]["cold_p50_ms"])
    if fastest["speed"]["cold_p50_ms"] < told["original"]["cold_p50_ms"]:
        assert "p50" in fastest["fronts"]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.json", "front.png"]


def test_without_matplotlib_a_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"`rankd compress --search` needs .* pip install 'rankd\[bench\]'"):
        check_drawing()


def test_a_limit_that_is_over_stops_within_a_trial_and_leaves_what_was_begun(run: Path, tmp_path: Path) -> None:
    ticks = iter(range(10_000))
    with Search(run, tmp_path / "search", PLAN) as search:
        with pytest.raises(ConfigError, match=r"no recipe was finished in 0\.5 minutes; give --minutes more"):
            search.start(0.5, quiet, clock=lambda: 3.0 * next(ticks))
        assert list((tmp_path / "search" / "trials").glob(".*"))


def test_another_plan_and_another_search_beside_it_are_refused(run: Path, searched: Path) -> None:
    with pytest.raises(ConfigError, match="holds a search with another plan, model or log"):
        Search(run, searched, msgspec.structs.replace(PLAN, seed=8))
    with Search(run, searched), pytest.raises(ConfigError, match="another search is under way"):
        Search(run, searched)


def test_days_and_users_are_checked_before_any_work(run: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(DataError, match=message):
            Search(run, tmp_path / "search", msgspec.structs.replace(PLAN, **changes))

    refused("are not cut in two by 2026-08-01", choose_until="2026-08-01")
    refused("are not cut in two by 2026-12-01", choose_until="2026-12-01")
    gate = PLAN.gate
    refused("not judged on days that it has seen", gate=msgspec.structs.replace(gate, since="2026-09-01"))
    refused("an interval over users needs 60", gate=msgspec.structs.replace(gate, min_users=60))
    assert not (tmp_path / "search").exists()


def test_weights_that_have_seen_later_days_than_the_run_says_are_refused(run: Path, tmp_path: Path) -> None:
    """Somebody moved the split of a trained run, so that training days became test days."""
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    about["description"]["split"] = {"train_until": "2026-08-01", "validate_until": "2026-08-15"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="days until 2026-09-05, but its description takes all days from 2026-08-15"):
        open_run(tmp_path / "run")
    with pytest.raises(DataError, match="not judged on its own training days"):
        Search(tmp_path / "run", tmp_path / "search", PLAN)


def test_a_target_that_nothing_meets_names_the_nearest(found: list[TrialRecord]) -> None:
    with pytest.raises(TargetMissed, match="the nearest is 'prune") as missed:
        pick(found, Target((Limit("p50", 1e-6),)), "ndcg@10")
    assert missed.value.nearest_point in {one.trial_id for one in found}


def rankd_process(*arguments: str | Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "rankd", "compress", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    """Until such a file is there; the process must not have ended before."""
    ends = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < ends
        time.sleep(0.01)


def interrupted(process: subprocess.Popen[str]) -> str:
    """What it says when Ctrl-C is pressed, and again while it goes on: Python drops one that comes in a finalizer."""
    while True:
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=4)[1]
        except subprocess.TimeoutExpired:
            continue


def test_a_search_that_is_interrupted_and_killed_goes_on(run: Path, found: list[TrialRecord], tmp_path: Path) -> None:
    plan, folder = tmp_path / "plan.toml", tmp_path / "search"
    plan.write_text(TOML)
    arguments = (run, "--search", "--plan", plan, "--out", folder)
    first = rankd_process(*arguments)
    wait_for(first, folder, "trials/.*/start.json")
    told = interrupted(first)
    assert first.returncode not in (0, 2)
    kept = len(list(folder.glob("trials/[!.]*/trial.json")))
    assert f"interrupted; {kept} finished recipes are kept in {folder}: the same command goes on" in told
    second = rankd_process(*arguments)
    wait_for(second, folder, "trials/*/trial.json")
    os.kill(second.pid, signal.SIGKILL)
    second.communicate(timeout=120)
    for record in folder.glob("trials/[!.]*/trial.json"):
        msgspec.json.decode(record.read_bytes(), type=TrialRecord)
    again = CliRunner().invoke(command, [*map(str, arguments), "--json"], catch_exceptions=False)
    document = json.loads(again.stdout)
    assert document["run"] == str(folder / "chosen")
    assert document["chosen"]
    assert read_compression(folder / "chosen") is not None
    assert (folder / "front.png").exists()
    assert all(map(same, trials_in(run, folder), found))


def test_a_target_makes_a_run_from_a_search(run: Path, searched: Path, tmp_path: Path) -> None:
    def rankd_compress(*arguments: str | Path) -> Result:
        return CliRunner().invoke(command, [str(run), *map(str, arguments)])

    shutil.copytree(searched, tmp_path / "search")
    to = ("--from", tmp_path / "search", "--out", tmp_path / "small", "--to")
    missed = rankd_compress(*to, "p50<=1ns")
    assert isinstance(missed.exception, ConfigError)
    missed = rankd_compress(*to, "p50<=0.001us")
    assert isinstance(missed.exception, TargetMissed)
    assert json.loads((tmp_path / "search" / "front.json").read_text())["why"] == str(missed.exception)
    assert not (tmp_path / "small").exists()
    reached = rankd_compress(*to, "p50<=1e3ms, ndcg@10>=20%")
    assert reached.exception is None
    assert "keeps the most ndcg@10" in " ".join(reached.stdout.split())
    made = read_compression(tmp_path / "small")
    assert made is not None
    assert made.gate.metrics["ndcg@10"].bound == 0.2
    twice = rankd_compress(*to, "p50<=1e3ms")
    assert isinstance(twice.exception, ConfigError)
    assert "exists; name another folder" in str(twice.exception)


@pytest.mark.parametrize("options", [(), ("--search", "--to", "p50<=1ms"), ("--recipe", "r.toml", "--search")])
def test_one_of_the_three_ways_is_given(options: tuple[str, ...], run: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(command, [str(run), "--out", str(tmp_path / "small"), *options])
    assert isinstance(told.exception, ConfigError)
    assert "give one of --recipe FILE, --search and --to TARGET" in str(told.exception)
