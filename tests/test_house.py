"""The house keeps its order: imports run downwards, serving never needs training, names are unique, help is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rankd

SOURCE = Path(rankd.__file__).parent
# Each folder or file may import those before it (and itself). `cli`, `demo` and `bench` stand above all.
FLOORS = [
    ["errors", "types"],
    ["config", "observe", "picture"],
    ["gate", "machine_code", "malloc"],
    ["embeddings"],
    ["plan"],
    ["shards"],
    ["features"],
    ["gate_record"],
    ["artifact"],
    ["models"],
    ["engine"],
    ["states", "schedule"],
    ["request_path"],
    ["ranker"],
    ["serve", "client"],
    ["deploy"],
    ["train"],
    ["build"],
    ["compress"],
    ["demo", "bench"],
    ["cli", "__main__"],
]
ALLOWED_UP = {("observe.metrics", "__init__")}
FORBIDDEN = {
    "serve": {"models", "train", "build", "compress"},
    "features": {"engine", "schedule"},
    "models": {"serve", "ranker"},
    "schedule": {"states"},
    "states": {"schedule"},
}


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rankd":
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rankd.")}
    return found


def test_imports_run_downwards() -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        for module in imports_of(path):
            target = module.split(".")[1] if "." in module else "types"
            if floor_of[target] > floor_of[place] or target in FORBIDDEN.get(place, ()):
                wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert wrong == []


def test_serving_imports_neither_torch_nor_training() -> None:
    code = (
        "import sys, rankd.serve.lifecycle, rankd.client, rankd.demo.showcase, rankd.embeddings.table_kernels\n"
        "ours = ('rankd.train', 'rankd.models', 'rankd.build', 'rankd.compress')\n"
        "bad = [m for m in sys.modules if m.split('.')[0] == 'torch' or m.startswith(ours)]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_file_names_are_unique() -> None:
    names = [path.name for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


HEAVY = ("openvino", "torch", "ray", "numpy", "polars", "starlette", "uvicorn", "rich", "httpx", "msgspec")


@pytest.mark.parametrize("command", ["", "serve", "train", "compress", "plan", "deploy", "bench"])
def test_help_imports_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code = (
        "import sys\nfrom rankd.cli import rankd\n"
        f"try:\n    rankd({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Usage:" in result.stdout
    assert result.stderr.strip() == "[]"


def test_the_help_of_every_command_is_listed() -> None:
    from rankd.cli import COMMANDS, HELP

    result = subprocess.run([sys.executable, "-m", "rankd", "--help"], capture_output=True, text=True)
    for name in COMMANDS:
        assert f"  {name} " in result.stdout
        assert HELP[name] in " ".join(result.stdout.split())
        one = subprocess.run([sys.executable, "-m", "rankd", name, "--help"], capture_output=True, text=True)
        assert HELP[name] in " ".join(one.stdout.split()), name
