"""Sums that shards send back in bfloat16: rounded once, and only where the engine rounds them in any case."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankd import Ranker
from rankd.embeddings.jagged import JaggedIds
from rankd.embeddings.table_spec import TablePart
from rankd.engine.backend import Precision
from rankd.errors import InvalidRequest, PayloadTooLarge
from rankd.shards.answer_kernels import narrow_sums
from rankd.shards.shard_config import ShardClientConfig, ShardServerConfig, SumFormat
from rankd.shards.shard_layout import Shard, ShardLayout
from rankd.shards.table_config import TableConfig, with_sums
from rankd.types import Array, Float32Array
from tests.features.stores.redis_server import eventually
from tests.shards.films import ENGINE
from tests.shards.plain_tables import (
    asking,
    jagged,
    layouts,
    make_server,
    one_shard,
    part_of,
    questions,
    serving,
    specs_of,
    two_shards,
    whole,
)
from tests.shards.test_sharded_pooling import both

NARROW = ShardClientConfig(timeout_ms=30_000, sums=SumFormat.BF16)


def rounded(values: Float32Array) -> Float32Array:
    """In bfloat16 and back, as torch does it."""
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def split_sums(layout: ShardLayout, asked: JaggedIds) -> Float32Array:
    """Sums of the parts of each table, rounded one by one and added in the order of their remainders."""
    found = []
    moduli = {part.table: part.modulus for shard in layout.shards for part in shard.parts}
    for number, name in enumerate(asked.tables):
        samples, modulus = asked.num_samples, moduli[name]
        spans = [asked.ids[begin:end] for begin, end in zip(asked.offsets[:-1], asked.offsets[1:], strict=True)][
            number * samples : (number + 1) * samples
        ]
        total = np.zeros((samples, specs_of(layout)[name].dim), np.float32)
        for remainder in range(modulus):
            part = part_of(layout, Shard("s", (), (TablePart(name, modulus, remainder),)))
            own = [[int(one) // modulus for one in span if one % modulus == remainder] for span in spans]
            total += rounded(part.pool(jagged([name], [own])))
        found.append(total)
    return np.concatenate(found, axis=1) if found else np.zeros((0, 0), np.float32)


@given(arrays(np.uint32, st.integers(0, 200), elements=st.integers(0, 2**32 - 1)))
def test_any_float_becomes_the_nearest(bits: Array) -> None:
    out = np.empty(len(bits), np.uint16)
    narrow_sums(bits, out)
    found = (out.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found, rounded(bits.view(np.float32)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_each_part_is_rounded_once(data: st.DataObject) -> None:
    drawn = data.draw(layouts())
    with serving(*[make_server(drawn, number) for number in range(len(drawn.shards))]) as addresses:
        shards = [Shard(one.name, (place,), one.parts) for one, place in zip(drawn.shards, addresses, strict=True)]
        layout = ShardLayout(drawn.plan, drawn.nets, tuple(shards))
        with asking(layout, NARROW) as pooling:
            for _ in range(4):
                asked = data.draw(questions(layout, most_samples=80))
                values = pooling.pool(asked)
                assert values.dtype == np.float32
                np.testing.assert_array_equal(values, split_sums(layout, asked).reshape(values.shape))


@pytest.mark.parametrize("sums", [SumFormat.AUTO, SumFormat.FP32])
def test_nobody_rounds_who_was_not_told_to(sums: SumFormat) -> None:
    layout = two_shards()
    asked = jagged(["item", "city"], [[[5, 6, 7]], [[1, 2]]])
    with both(layout, ShardClientConfig(timeout_ms=30_000, sums=sums)) as pooling:
        np.testing.assert_allclose(pooling.pool(asked), whole(layout).pool(asked), rtol=1e-6)


def test_a_shard_of_an_older_rankd_sends_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look at that bit of the number of a HELLO."""
    monkeypatch.setattr("rankd.shards.handshake.NARROW_SUMS", 0)
    layout = two_shards()
    asked = jagged(["user", "item"], [[[3], [4, 4]], [[5, 6, 7], [100]]])
    with both(layout, NARROW) as pooling:
        values = pooling.pool(asked)
    np.testing.assert_allclose(values, whole(layout).pool(asked), rtol=1e-6)
    assert (values != rounded(values)).any()


def test_rows_that_are_kept_here_are_not_rounded() -> None:
    layout = one_shard()
    asked = jagged(["item"], [[[7]] * 3])
    with serving(make_server(layout)) as (address,), asking(one_shard(address), NARROW, {"item": 40}) as pooling:
        exact = whole(layout).pool(asked)
        np.testing.assert_array_equal(pooling.pool(asked), rounded(exact))
        eventually(lambda: bool((pooling.pool(asked) == exact).all()), "the row is kept here", within_s=30.0)
        assert pooling.kept_bytes() > 0


def test_twice_as_many_samples_fit_the_limits() -> None:
    """Of 1,024 bytes: 64 samples of 4 numbers in float32."""
    layout = one_shard()
    asked = jagged(["item"], [[[number] for number in range(101)]])
    with serving(make_server(layout, config=ShardServerConfig(max_answer_bytes=1024))) as (address,):
        small = msgspec.structs.replace(NARROW, max_answer_bytes=1024)
        with asking(one_shard(address), small) as pooling:
            assert pooling.pool(asked).shape == (101, 4)
            with pytest.raises(PayloadTooLarge, match="2000 bytes"):
                pooling.pool(jagged(["item"], [[[number % 101, number // 101] for number in range(250)]]))
        wide = msgspec.structs.replace(small, sums=SumFormat.FP32)
        with asking(one_shard(address), wide) as pooling, pytest.raises(PayloadTooLarge, match="1616 bytes"):
            pooling.pool(asked)


def test_errors_are_told_as_ever() -> None:
    layout = one_shard()
    with (
        serving(make_server(layout, before=_refuse)) as (address,),
        asking(one_shard(address), NARROW) as pooling,
        pytest.raises(InvalidRequest, match="no such thing"),
    ):
        pooling.pool(jagged(["item"], [[[1]]]))


def _refuse() -> None:
    raise InvalidRequest("no such thing")


def test_the_engine_says_what_auto_is(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[TableConfig]()

    class Enough(Exception):
        pass

    def opened(_path: Path, _widths: object, config: TableConfig) -> None:
        told.append(config)
        raise Enough

    monkeypatch.setattr("rankd.ranker.open_tables", opened)
    for sums in SumFormat:
        tables = TableConfig(client=ShardClientConfig(sums=sums))
        with pytest.raises(Enough):
            Ranker.load(version, msgspec.structs.replace(ENGINE, precision=Precision.FP32), tables=tables)
    assert [one.client.sums for one in told] == [SumFormat.FP32, SumFormat.FP32, SumFormat.BF16]
    assert with_sums(TableConfig(), narrow=True).client.sums is SumFormat.BF16
    assert with_sums(TableConfig(client=ShardClientConfig(sums=SumFormat.FP32)), True).client.sums is SumFormat.FP32
