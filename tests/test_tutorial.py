"""The tutorial and the README are run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rankd.config import read_config
from rankd.demo import MODELS
from rankd.features.feature_config import Mode
from rankd.serve.settings import ServeConfig
from rankd.shards.shard_config import ShardServerConfig
from tests.free_ports import free_port

ROOT = Path(__file__).parents[1]
LOG = ROOT.parent / "shared" / "data" / "online_retail_until_2011-08.parquet"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page of the project."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def environment(**more: str) -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    return {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", **more}


def test_the_tutorial_runs_as_it_is_written(tmp_path: Path) -> None:
    """All its commands in their order, training cut to one epoch."""
    if not LOG.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI has to have {LOG}")
        pytest.skip("the Online Retail log is not on this machine")
    page, port = "docs/tutorial-online-retail.md", free_port()
    script = "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\n" + "\n".join(blocks(page, "bash"))
    script = script.replace("8000", str(port)).replace(
        "--out runs/online-retail", "--out runs/online-retail --epochs 1"
    )
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment(LOG=str(LOG)),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    said = result.stdout
    assert "rows in the file 320,705" in said
    assert "bought before + co-occurrence (users)" in said
    assert "unknown to the model, scored as missing: POST" in said
    answers = re.findall(r'\{"model":"online-retail".*?\}\}', said)
    assert len(answers) == 2
    before, after = (re.search(r'"scores":(\[\[.*?\]\])', answer) for answer in answers)
    assert before is not None
    assert after is not None
    assert before[1] != after[1]
    (python,) = blocks(page, "python")
    result = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "Scores(model='online-retail'" in result.stdout


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_the_readmes_python_runs(number: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", blocks("README.md", "python")[number]],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_the_page_on_feature_stores_runs_as_it_is_written(tmp_path: Path) -> None:
    page = "docs/feature-store.md"
    shutil.copytree(MODELS / "demo", tmp_path / "models" / "films")
    script = "set -euo pipefail\n" + "\n".join(blocks(page, "bash"))
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "items of films" in result.stdout
    (settings,) = blocks(page, "toml")
    (tmp_path / "rankd.toml").write_text(settings)
    assert read_config(ServeConfig, tmp_path / "rankd.toml").features.items.mode is Mode.ASYNC


def test_the_settings_on_the_page_on_traces_are_read(tmp_path: Path) -> None:
    (settings,) = blocks("docs/tracing.md", "toml")
    (tmp_path / "rankd.toml").write_text(settings)
    tracing = read_config(ServeConfig, tmp_path / "rankd.toml").tracing
    assert (tracing.enabled, tracing.sample_ratio) == (True, 0.01)
    assert read_config(ShardServerConfig, tmp_path / "rankd.toml").tracing == tracing


def test_what_the_readme_and_docs_name_is_there() -> None:
    for page in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
        for command in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
