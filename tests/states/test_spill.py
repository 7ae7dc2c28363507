"""The tier on disk: what is damaged is noticed, counted and forgotten; the budget holds; strangers are not read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankd.errors import ConfigError
from rankd.states.spill import SpilledHeader, SpillTier, id_bytes


def header(user: str, size: int = 64) -> SpilledHeader:
    return SpilledHeader(id_bytes(user), b"h" * 16, b"t" * 16, (3, 1), 8, size)


def opened(folder: Path, identity: str = "one", budget: int = 1 << 20) -> SpillTier:
    return SpillTier(folder, "model", "1", identity, budget)


CONTENT = np.arange(64, dtype=np.uint8)


@pytest.mark.parametrize("user", ["u", "../../etc/passwd", "ü" * 300, "\udcff", " "])
def test_a_state_survives_a_restart(tmp_path: Path, user: str) -> None:
    opened(tmp_path).write(header(user), CONTENT)
    tier = opened(tmp_path)
    found = tier.read(user)
    assert found is not None
    assert found[0] == header(user)
    np.testing.assert_array_equal(found[1], CONTENT)
    assert (tier.counts().files, tier.counts().restored, tier.counts().corrupt) == (1, 1, 0)
    assert all(tmp_path in file.resolve().parents for file in tmp_path.rglob("*"))
    tier.remove(user)
    assert tier.read(user) is None
    assert tier.counts().used_bytes == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
def test_damage_is_noticed_counted_and_forgotten(tmp_path: Path, position: int, flip: int, cut: bool) -> None:
    tier = opened(tmp_path)
    tier.write(header("u"), CONTENT)
    (file,) = tmp_path.rglob("*.state")
    content = bytearray(file.read_bytes())
    if cut:
        content = content[: position % len(content)]
    else:
        content[position % len(content)] ^= flip
    file.write_bytes(content)
    assert tier.read("u") is None
    assert tier.counts().corrupt == 1
    assert not file.exists()
    assert tier.read("u") is None
    assert tier.counts().corrupt == 1


def test_the_budget_holds_and_the_oldest_go(tmp_path: Path) -> None:
    tier = opened(tmp_path, budget=1000)
    for number in range(20):
        tier.write(header(f"user-{number}"), CONTENT)
        on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.state"))
        assert on_disk == tier.counts().used_bytes <= 1000
    assert tier.read("user-0") is None
    assert tier.read("user-19") is not None
    tier.write(header("huge", 5000), np.zeros(5000, np.uint8))
    assert tier.read("huge") is None
    smaller = opened(tmp_path, budget=400)
    assert smaller.counts().used_bytes <= 400


def test_states_of_another_build_are_removed_and_unfinished_ones_too(tmp_path: Path) -> None:
    opened(tmp_path, "one").write(header("u"), CONTENT)
    (file,) = tmp_path.rglob("*.state")
    file.with_suffix(".1.part").write_bytes(b"half")
    assert opened(tmp_path, "one").read("u") is not None
    assert not list(tmp_path.rglob("*.part"))
    assert opened(tmp_path, "two").read("u") is None
    assert not list(tmp_path.rglob("*.state"))


def test_a_file_under_another_users_name_is_not_read(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    tier.write(header("a"), CONTENT)
    tier.write(header("b"), CONTENT)
    first, second = sorted(tmp_path.rglob("*.state"))
    second.write_bytes(first.read_bytes())
    assert [tier.read(user) is None for user in "ab"].count(True) == 1
    assert tier.counts().corrupt == 1


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"states\.spill"):
        opened(tmp_path / "file")


def test_a_broken_disk_is_counted_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = opened(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "replace", full)
    tier.write(header("u"), CONTENT)
    assert (tier.counts().failed, tier.counts().files, tier.counts().used_bytes) == (1, 0, 0)
    assert not list(tmp_path.rglob("*.part"))
