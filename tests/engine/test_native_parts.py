"""The native engine's parts: what it says of a processor, packed weights, products and time buckets by themselves."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankd.engine.native import support
from rankd.models.blocks import time_bucket
from rankd.types import Array
from tests.engine.test_native_climber import OPTIONS, floats, schema_of

here = support.why_not(OPTIONS, schema_of())
needs_it = pytest.mark.skipif(here is not None, reason=str(here))
FLAGS = "flags\t\t: fpu avx512f avx512bw avx512vl avx512_bf16 sha_ni\n"


def test_reads_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(support, "CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert "cannot be read" in str(support.why_not(OPTIONS, schema_of()))
    cpuinfo.write_text("processor\t: 0\n" + FLAGS)
    assert support.why_not(OPTIONS, schema_of()) is None
    cpuinfo.write_text(FLAGS.replace("avx512_bf16", "avx512_vnni"))
    assert support.why_not(OPTIONS, schema_of()) == "the processor has no avx512_bf16"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "aarch64" in str(support.why_not(OPTIONS, schema_of()))


def test_amx_outdoes_it_in_wide_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(support, "CPUINFO", cpuinfo)
    cpuinfo.write_text(FLAGS)
    assert not support.outdone({"width": 512})
    cpuinfo.write_text(FLAGS.replace("sha_ni", "amx_bf16 amx_tile"))
    assert [support.outdone(options) for options in ({"width": 256}, {"width": 128}, {})] == [True, False, False]


@needs_it
def test_distances_stand_from_right_to_left() -> None:
    from rankd.engine.native.weight_panels import LOG2_E, distance_table

    position = np.arange(6, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    table = distance_table(position)
    assert table.shape == (2, 2 * 6 + 81)
    assert np.allclose(table[1, -17 : -17 - 9 : -1] / LOG2_E, [0, 1, 2, 3, 4, 5, 5, 5, 5])


@needs_it
def test_bfloat16_rounds_as_torch_does() -> None:
    from rankd.engine.native.weight_panels import to_bf16

    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e3
    assert (floats(to_bf16(x)) == torch.from_numpy(x).bfloat16().float().numpy()).all()


@needs_it
def test_time_buckets_are_the_models() -> None:
    from rankd.engine.native import row_code
    from rankd.engine.native.compiled import compiled
    from rankd.engine.native.weight_panels import aligned

    buckets: Any = row_code.buckets

    @compiled
    def fill(now: int, times: int, vectors: int, out: int) -> None:
        buckets(now, times, vectors, out)

    seconds = np.concatenate([np.arange(-16, 4096), np.geomspace(4096, 2**31 - 1, 4096).astype(np.int64)])
    times, out = aligned((len(seconds),), np.int32), aligned((len(seconds),), np.uint8)
    times[:] = (2**31 - 1 - seconds).clip(max=2**31 - 1)
    fill(2**31 - 1, times.ctypes.data, len(seconds) // 16, out.ctypes.data)
    assert (out == time_bucket(torch.from_numpy(seconds)).numpy()).all()


@needs_it
@pytest.mark.parametrize("rows", [1, 3, 4, 13, 29])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 32), (64, 96), (320, 64)])
@pytest.mark.parametrize("name", ["linear", "gelu", "silu", "relu", "add", "gate"])
def test_products(name: str, rows: int, inputs: int, outputs: int) -> None:
    from rankd.engine.native import products
    from rankd.engine.native.compiled import compiled
    from rankd.engine.native.weight_panels import aligned, panels, to_bf16

    product: Any = getattr(products, name)

    @compiled
    def run(a: int, b: int, c: int, d: int, e: int, f: int, g: int, h: int, i: int) -> None:
        product(a, b, c, d, e, f, g, h, i)

    random = np.random.default_rng(rows)
    x, weight = (
        to_bf16(random.standard_normal((rows, inputs)).astype(np.float32)),
        random.standard_normal((outputs, inputs)).astype(np.float32),
    )
    bias, packed = (
        random.standard_normal(outputs).astype(np.float32),
        aligned((outputs // 32, inputs // 2, 64), np.uint16),
    )
    packed[:] = panels(weight)
    wide = name in ("add", "gate")
    out = np.ones((rows + 1, outputs), np.float32 if wide else np.uint16)
    out[:rows] = 2 if wide else 0
    run(
        x.ctypes.data, x.strides[0], rows, packed.ctypes.data, inputs // 2, outputs // 32, out.ctypes.data,
        out.strides[0], bias.ctypes.data,
    )  # fmt: skip
    plain = torch.from_numpy(floats(x) @ floats(to_bf16(weight)).T + bias)
    expected: Array = {
        "linear": lambda: plain,
        "gelu": lambda: torch.nn.functional.gelu(plain),
        "silu": lambda: torch.nn.functional.silu(plain),
        "relu": lambda: plain.relu(),
        "add": lambda: plain + 2,
        "gate": lambda: plain.sigmoid() * 2,
    }[name]().numpy()
    made = out[:rows] if wide else floats(out[:rows])
    assert np.abs(made - expected).max() < (1e-3 if wide else 0.01 * np.abs(expected).max() + 1e-3)
    assert (out[rows] == 1).all()
