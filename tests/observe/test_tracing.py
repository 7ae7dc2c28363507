"""What a request notes becomes a tree, whose laps are its clock's; nothing is kept where nothing is traced."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankd.errors import MissingExtra
from rankd.observe.clocks import StageClock
from rankd.observe.tracing import RequestTrace, SpanNote, TracingConfig, open_span, open_traces, opened

LAPS = st.lists(st.tuples(st.sampled_from(["queue", "features", "score"]), st.integers(0, 9)), max_size=12)


def traced(laps: list[tuple[str, int]]) -> tuple[RequestTrace, int]:
    """A request that came at 10 and reached its clock at 12; its laps took whole seconds. When the last one ended."""
    now = [12]
    clock = StageClock(lambda: float(now[0]), keep_laps=True)
    for stage, seconds in laps:
        now[0] += seconds
        clock.lap(stage)
    return RequestTrace("rank", 1, 10.0, clock=clock), now[0]


@given(LAPS)
def test_the_laps_of_a_trace_are_those_of_its_clock(laps: list[tuple[str, int]]) -> None:
    trace, last = traced(laps)
    spans = trace.spans(last + 3.0)
    assert [span.name for span in spans] == ["read", *(stage for stage, _ in laps), "write"]
    assert {span.parent_id for span in spans} == {trace.span_id}
    assert (spans[0].begin, spans[0].end, spans[-1].begin, spans[-1].end) == (10.0, 12.0, last, last + 3.0)
    for before, after in pairwise(spans):
        assert before.end == after.begin
    assert trace.clock is not None
    timings = trace.clock.timings_ms()
    for stage in {stage for stage, _ in laps}:
        assert sum((s.end - s.begin) * 1e3 for s in spans if s.name == stage) == pytest.approx(timings[stage])


@given(LAPS, st.integers(10, 40), st.integers(0, 9))
def test_a_note_is_below_the_lap_that_it_happened_in(laps: list[tuple[str, int]], begin: int, seconds: int) -> None:
    trace, last = traced(laps)
    trace.notes.append(SpanNote("call", float(begin), float(begin + seconds)))
    *spans, note = trace.spans(last + 3.0)
    around = [span for span in spans if span.begin <= note.begin and note.end <= span.end]
    assert note.parent_id in ({span.span_id for span in around} if around else {trace.span_id})


def test_what_is_begun_in_an_opened_block_can_find_it_and_it_ends_later() -> None:
    trace = RequestTrace("rank", 1, time.perf_counter())
    with opened(trace, "look-up") as span:
        assert span is not None
        assert open_span() is span
    assert open_span() is None
    assert trace.notes == []
    span.end()
    (note,) = trace.notes
    assert (note.name, note.span_id) == ("look-up", span.span_id)
    assert trace.started <= note.begin <= note.end


def test_a_block_that_fails_is_left() -> None:
    with pytest.raises(ValueError, match="x"), opened(RequestTrace("rank", 1, 0.0), "look-up"):
        raise ValueError("x")
    assert open_span() is None


def test_without_a_trace_nothing_is_kept() -> None:
    with opened(None, "look-up") as span:
        assert span is open_span() is None
    clock = StageClock()
    clock.lap("queue")
    assert clock.laps == ()
    assert open_traces(TracingConfig(), "rankd") is None


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from rankd.errors import MissingExtra\n"
        "from rankd.observe.tracing import TracingConfig, open_traces\n"
        "try:\n    open_traces(TracingConfig(enabled=True), 'rankd')\n"
        "except MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "rankd[tracing]" in done.stdout, done.stderr
    assert str(MissingExtra("tracing.enabled", "tracing")) in done.stdout
