"""The command line: output for people and for programs, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from rankd import Ranker, RankRequest
from rankd.config import read_config
from rankd.engine.backend import EngineConfig
from rankd.errors import ConfigError, DataError
from rankd.features.parquet import with_histories, with_items
from rankd.serve.settings import ServeConfig
from rankd.train.run import weights_sha256
from tests.train.small_log import RECIPE, small_frame


def rankd(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankd", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def test_rank_with_a_model_on_disk(demo_models: Path, demo_ranker: Ranker, tmp_path: Path) -> None:
    user, items = demo_ranker.catalogue.ids.users[0], demo_ranker.catalogue.ids.items
    model = str(demo_models / "demo")
    result = rankd("rank", "--model", model, "--user", user, "--candidates", ",".join(items[:6]), "--json")
    answer = json.loads(result.stdout)
    expected = demo_ranker.rank(RankRequest(user, items[:6]))
    np.testing.assert_allclose(answer["scores"], expected.scores, atol=1e-5)
    history = tmp_path / "history.json"
    history.write_text(json.dumps([{"item_id": items[0], "event": "like"}]))
    result = rankd(
        "rank", "--model", model, "--user", "new", "--candidates-file", "-", "--history", str(history), "--top-k", "2",
        stdin=f"{items[0]}\n{items[1]}\nno film\n",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert items[0] in result.stdout
    assert "unknown to the model, scored as missing: no film" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rank", "--user", "u"), "give --model FOLDER or --url URL"),
        (("rank", "--user", "u", "--model", "nowhere", "--candidates", "a"), "no model version here"),
        (("rank", "--user", "u", "--url", "http://127.0.0.1:9", "--candidates", "a"), "no answer from"),
        (
            ("train", "--data", "x.parquet", "--describe", "demo", "--recipe", "dmo", "--out", "r"),
            "Did you mean 'demo'",
        ),
        (("train", "--data", "x.parquet", "--describe", "demo", "--recipe", "demo", "--out", "r"), "no such file"),
        (("eval", "nowhere"), "not a training run"),
        (("eval", "nowhere", "--target", "native"), "are of the engine that runs an --artifact"),
        (("build", "nowhere"), "not a training run"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = rankd(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_offline_commands_without_torch_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "sys.argv = ['rankd', 'eval', 'run']; from rankd.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'rankd[train]'" in result.stderr


def test_train_eval_build_and_rank_in_one_go(tmp_path: Path) -> None:
    small_frame().write_parquet(tmp_path / "log.parquet")
    recipe = tmp_path / "recipe.toml"
    import tomli_w

    recipe.write_text(tomli_w.dumps(msgspec.to_builtins(RECIPE)))
    run, models = str(tmp_path / "run"), str(tmp_path / "models")
    trained = rankd(
        "train", "--data", str(tmp_path / "log.parquet"), "--describe", "demo", "--recipe", str(recipe), "--out", run,
        "--json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert len(json.loads(trained.stdout)["epochs"]) == 2
    evaluated = json.loads(rankd("eval", run, "--json").stdout)
    assert set(evaluated["table"]["ranker"]) == {"ndcg@10", "gauc", "hr@10", "auc", "ne"}
    built = json.loads(rankd("build", run, "--out", models, "--json").stdout)
    assert built["parity"]["openvino"]["fp32"] < 1e-3
    again = json.loads(rankd("eval", run, "--artifact", built["artifact"], "--json").stdout)
    for metric, interval in evaluated["table"]["ranker"].items():
        assert again["table"]["ranker"][metric]["value"] == pytest.approx(interval["value"], abs=2e-3)
    elsewhere = rankd("eval", run, "--artifact", built["artifact"], "--target", "native")
    assert "was built for openvino, not for native" in elsewhere.stderr
    with Ranker.load(models + "/demo", EngineConfig(executors=1)) as ranker:
        assert ranker.manifest.metrics["gauc"] == pytest.approx(evaluated["table"]["ranker"]["gauc"]["value"])
        assert ranker.manifest.run_sha256 == weights_sha256(tmp_path / "run")
    moved = tmp_path / "moved.parquet"
    small_frame().head(1000).write_parquet(moved)
    refused = rankd("eval", run, "--data", str(moved))
    assert "checksum differs" in refused.stderr


def test_configuration_from_file_environment_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('port = 1\nhost = "a"\nmodels = ["m"]\n[engine]\nthreads = 2\n')
    environment = {"RANKD_PORT": "2", "RANKD_ENGINE__THREADS": "3", "OTHER": "x"}
    config = read_config(ServeConfig, path, environment, {"port": 3, "host": None})
    assert (config.port, config.host, config.models, config.engine.threads) == (3, "a", ("m",), 3)
    listed = read_config(ServeConfig, None, {"RANKD_MODELS": "m,n", "RANKD_STATES__BUDGET_MIB": "7"})
    assert (listed.models, listed.states.budget_mib) == (("m", "n"), 7)
    path.write_text("[engine]\nthread = 2\n")
    with pytest.raises(ConfigError, match=r"unknown key 'engine.thread'.*Did you mean 'threads'"):
        read_config(ServeConfig, path)
    path.write_text("port = 'x")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(ServeConfig, path)


def test_histories_and_items_from_parquet(demo_ranker: Ranker, tmp_path: Path) -> None:
    schema, catalogue = demo_ranker.schema, demo_ranker.catalogue
    path = tmp_path / "histories.parquet"
    pl.DataFrame(
        {"user_id": ["b", "a", "b"], "item_id": [catalogue.ids.items[0], "?", catalogue.ids.items[1]],
         "time": [50, 10, 20], "event": ["like", "click", "click"]}
    ).write_parquet(path)  # fmt: skip
    filled = with_histories(catalogue, schema, path)
    assert filled.ids.users == ("a", "b")
    assert filled.users.history_of(1).rows.tolist() == [3, 2]
    assert filled.users.history_of(1).times.tolist() == [20, 50]
    with Ranker.load(demo_ranker.artifact.path, EngineConfig(executors=1), histories=path) as ranker:
        assert not ranker.rank(RankRequest("b", catalogue.ids.items[:3])).unknown_user
        assert ranker.rank(RankRequest(catalogue.ids.users[0], catalogue.ids.items[:3])).unknown_user
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [catalogue.ids.items[0], "new"], "minutes": [9.0, 1.0]}).write_parquet(items)
    changed = with_items(catalogue, schema, items).items.numeric
    column = [one.name for one in schema.item_numeric].index("minutes")
    assert changed[2, column] != catalogue.items.numeric[2, column]
    np.testing.assert_array_equal(changed[3:], catalogue.items.numeric[3:])
    pl.DataFrame({"item_id": ["a"], "minuets": [9.0]}).write_parquet(items)
    with pytest.raises(DataError, match="Did you mean 'minutes'"):
        with_items(catalogue, schema, items)
    pl.DataFrame({"user_id": ["a"], "time": [1]}).write_parquet(path)
    with pytest.raises(DataError, match="'item_id' is missing"):
        with_histories(catalogue, schema, path)
