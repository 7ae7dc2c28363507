"""What machine code on disk goes by: the kernel's file and all that it is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankd import machine_code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in place of ours: kernels made of parts, which have constants; and a file that they do not know."""
    root = tmp_path / "made_up"
    (root / "deep").mkdir(parents=True)
    texts = {
        "some_kernels.py": "from made_up.deep import parts\n",
        "deep/__init__.py": "",
        "deep/parts.py": "def f():\n    from made_up.constants import ONE\n    import made_up.some_kernels\n",
        "constants.py": "ONE = 1\n",
        "other.py": "import numpy\n",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    monkeypatch.setattr(machine_code, "_ROOT", root)
    return root


def number(package: Path) -> int:
    machine_code._imported.cache_clear()
    machine_code.source_number.cache_clear()
    return machine_code.source_number(package / "some_kernels.py")


def test_sources_are_all_that_is_imported(package: Path) -> None:
    names = {str(one.relative_to(package)) for one in machine_code.sources(package / "some_kernels.py")}
    assert names == {"some_kernels.py", "deep/__init__.py", "deep/parts.py", "constants.py"}


@pytest.mark.parametrize(("name", "counts"), [("some_kernels.py", True), ("constants.py", True), ("other.py", False)])
def test_a_change_of_a_source_is_another_number(package: Path, name: str, counts: bool) -> None:
    before = number(package)
    (package / name).write_text("ONE = 2\n" + (package / name).read_text())
    assert (number(package) != before) is counts


def test_kernels_of_the_cache_are_made_of_those_of_decoding() -> None:
    root = Path(machine_code.__file__).parent
    found = machine_code.sources(root / "features/cache/cache_kernels.py")
    assert {"machine_code.py", "decoding_kernels.py", "row_decoding.py", "row_cache.py"} <= {one.name for one in found}
