"""The benchmarks: `rankd bench SUITE --workload NAME`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rankd.cli.compression_benchmark import compress
from rankd.cli.table_benchmarks import shards, tables
from rankd.errors import ConfigError

if TYPE_CHECKING:
    from rankd.bench.arrivals import Arrivals

Command = TypeVar("Command", bound=Callable[..., Any])


def workload_option(default: str) -> Callable[[Command], Command]:
    """--workload, of every suite."""
    return click.option(
        "--workload",
        "name",
        default=default,
        show_default=True,
        help="base, long, hstu, hstu-long, mixed, skewed, small, or a .toml file of your own.",
    )


def trace_options(command: Command) -> Command:
    """--trace and --trace-column, of suites with an open loop."""
    command = click.option(
        "--trace-column", default="time", show_default=True, help="With --trace: the column of moments."
    )(command)
    return click.option(
        "--trace",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Arrivals as in this recording (.parquet or .csv), stretched to each rate, instead of Poisson's.",
    )(command)


def arrivals_of(trace: Path | None, column: str) -> Arrivals:
    """When requests come."""
    from rankd.bench.arrivals import POISSON, read_arrivals

    return POISSON if trace is None else read_arrivals(trace, column)


@click.group()
def bench() -> None:
    """Measure this machine, with the contestants in one run.

    Each suite checks that all contestants give the same scores, then measures them in turn. With --json the last line
    of standard output is one JSON object.
    """


bench.add_command(tables)
bench.add_command(shards)
bench.add_command(compress)


@bench.command()
@workload_option("small")
@click.option("--seconds", type=click.FloatRange(0.1), default=3.0, show_default=True, help="Of each measurement.")
@click.option(
    "--rate", type=click.FloatRange(0.1), help="Requests a second of the open loop; half the capacity if left out."
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Rounds; the figures are their medians."
)
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A model or version folder of your own.")
@trace_options
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def serve(
    name: str,
    seconds: float,
    rate: float | None,
    runs: int,
    model: Path | None,
    trace: Path | None,
    trace_column: str,
    as_json: bool,
) -> None:
    """Latency of the server over what the model itself takes.

    A real server and a load generator, in processes of their own: in process, JSON and binary tensors over HTTP; one
    connection (closed loop), then arrivals at --rate (open loop), latency from the scheduled time.
    """
    from rankd.bench.serve_suite.serving import ServeOptions, run_serve
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report

    options = ServeOptions(seconds, runs, rate, model, arrivals_of(trace, trace_column))
    with progress_bar("serve") as advance:
        report = run_serve(load_workload(name), options, advance)
    show_report(report, as_json)


@bench.command()
@workload_option("base")
@click.option(
    "--threads",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Of one call; may be given several times.",
)
@click.option("--runs", type=click.IntRange(1), default=7, show_default=True, help="Rounds of a few calls each.")
@click.option(
    "--contestant", "contestants", multiple=True, metavar="NAME", help="One of them alone; may be given several times."
)
@click.option("--target", default="", help="Ours alone of this target, and others that compute in the same place.")
@click.option(
    "--users",
    type=click.IntRange(1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="In one call; may be given several times.",
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def engine(
    name: str,
    threads: tuple[int, ...],
    runs: int,
    contestants: tuple[str, ...],
    target: str,
    users: tuple[int, ...],
    as_json: bool,
) -> None:
    """Latency of the model alone, beside torch and its compilers.

    Torch eager under one dense mask (eager-fp32, eager-bf16), torch.compile, ONNX Runtime and OpenVINO on the same
    model, and rankd's engine: all of a request (cold), candidates over a kept state (warm), the state alone (encode),
    8 new events (extend). Each in a process of its own, a few calls in turn; -fast is MKL's best code on any processor.
    """
    from rankd.bench.engine_suite.engine import EngineOptions, run_engine
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report

    options = EngineOptions(tuple(dict.fromkeys(threads)), runs, contestants, target, tuple(dict.fromkeys(users)))
    with progress_bar("engine") as advance:
        report = run_engine(load_workload(name), options, advance)
    show_report(report, as_json)


@bench.command()
@workload_option("mixed")
@click.option(
    "--trace", default="zipf", show_default=True, help="zipf, or an interaction log (Parquet) in the order it happened."
)
@click.option("--describe", default="", help="With a log: what its columns mean, as in `rankd train`.")
@click.option("--visits", type=click.IntRange(10), default=20_000, show_default=True, help="Of a zipf trace.")
@click.option(
    "--requests",
    type=click.IntRange(10),
    default=1200,
    show_default=True,
    help="Computed at each budget; half counts.",
)
@click.option(
    "--storage", type=click.Choice(["auto", "fp32", "bf16", "int8"]), default="auto", help="How states are kept."
)
@click.option("--picture", type=click.Path(path_type=Path), help="Hit rate and latency against memory: a .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def states(
    name: str,
    trace: str,
    describe: str,
    visits: int,
    requests: int,
    storage: str,
    picture: Path | None,
    as_json: bool,
) -> None:
    """How much memory user states need, and what less of it costs.

    Replays who came when: hit rates of every policy at several budgets for the whole trace, then latencies with the
    engine at the same budgets, without states, and with states on disk.
    """
    from rankd.bench.state_suite.states import StatesOptions, draw_picture, run_states
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report
    from rankd.picture import check_picture
    from rankd.states.state_config import Storage

    if picture is not None:
        check_picture(picture)
    options = StatesOptions(trace, describe, visits, requests, Storage(storage))
    with progress_bar("states") as advance:
        report = run_states(load_workload(name), options, advance)
    if picture is not None:
        draw_picture(report, picture)
    show_report(report, as_json)


@bench.command()
@workload_option("small")
@click.option(
    "--candidates",
    type=click.IntRange(1),
    multiple=True,
    default=(512, 128),
    show_default=True,
    help="Of a request; may be given several times. Ratios without a suffix are of the first.",
)
@click.option(
    "--delay-ms",
    "delays_ms",
    type=click.FloatRange(0),
    multiple=True,
    default=(0.2, 1.0),
    show_default=True,
    help="Added to each answer of the store; may be given several times.",
)
@click.option("--items", type=click.IntRange(10), default=1_000_000, show_default=True, help="Rows of 256 bytes.")
@click.option(
    "--ttl", type=click.FloatRange(0.001), default=3600.0, show_default=True, help="Seconds a row is fresh for."
)
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="Of each measurement.")
@click.option(
    "--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds; the figures are their medians."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def features(
    name: str,
    candidates: tuple[int, ...],
    delays_ms: tuple[float, ...],
    items: int,
    ttl: float,
    seconds: float,
    runs: int,
    as_json: bool,
) -> None:
    """What feature rows kept next to the model save, beside no cache and a Python dict.

    Needs redis-server. Four real servers over one store behind a proxy that delays: no cache, dict, rankd's cache sync
    and async, each with a tenth of the rows. Latency at one rate for all, then each one's highest rate under the same
    p99; candidates follow a Zipf law.
    """
    from rankd.bench.feature_suite.feature_subject import FeatureOptions
    from rankd.bench.feature_suite.features import run_features
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report

    options = FeatureOptions(
        tuple(dict.fromkeys(candidates)), tuple(dict.fromkeys(delays_ms)), items, seconds, runs, ttl
    )
    with progress_bar("features") as advance:
        report = run_features(load_workload(name), options, advance)
    show_report(report, as_json)


@bench.command()
@workload_option("mixed")
@click.option("--simulate", is_flag=True, help="In made-up time, with what calls take on this machine.")
@click.option(
    "--mix",
    default="",
    help="With --simulate: two targets at once, like openvino:1,onnxruntime:1, beside the best threshold.",
)
@click.option("--target", default="openvino", show_default=True, help="With --simulate: whose calls are measured.")
@click.option("--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True, help="Of each measurement.")
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="Searches for the highest rates.")
@click.option("--bound-ms", type=click.FloatRange(1), default=100.0, show_default=True, help="The p99 to keep.")
@click.option(
    "--overload-seconds", type=click.FloatRange(0.1), default=60.0, show_default=True, help="At twice the highest rate."
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    metavar="NAME[+states][=PYTHON]",
    help="mosec, litserve, ray, pytriton beside them; +states: users' states kept; =PYTHON: who has it and rankd.",
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["rankd, deadlines", "one queue", "one queue, padded"]),
    help="Contestants that are not measured this time.",
)
@trace_options
@click.option("--picture", type=click.Path(path_type=Path), help="p99 against the offered rate: a .png or .svg.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def schedule(
    name: str,
    simulate: bool,
    mix: str,
    target: str,
    seconds: float,
    runs: int,
    bound_ms: float,
    overload_seconds: float,
    peers: tuple[str, ...],
    without: tuple[str, ...],
    trace: Path | None,
    trace_column: str,
    picture: Path | None,
    as_json: bool,
) -> None:
    """What cutting, packing and ordering requests is worth, beside first come, first served.

    Real servers and a load generator in processes of their own: the highest rate of each whose p99 stays under the
    bound, latencies at shares of rankd's, and what happens at twice it. With --peer general model servers take part,
    around the same model. With --simulate the same arrivals go through the schedules in made-up time, in seconds.
    """
    from rankd.bench.peers.peer_process import parse_peer
    from rankd.bench.schedule_suite.latency_curves import draw_curves
    from rankd.bench.schedule_suite.live_schedule import LiveOptions, run_live
    from rankd.bench.schedule_suite.mixed_schedule import run_mixed
    from rankd.bench.schedule_suite.simulated_schedule import SimulationOptions, run_simulated
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report
    from rankd.picture import check_picture

    workload, arrivals, others = load_workload(name), arrivals_of(trace, trace_column), tuple(map(parse_peer, peers))
    if mix and not simulate:
        raise ConfigError(f"--mix {mix} is for schedules in made-up time: give --simulate too")
    if picture is not None:
        check_picture(picture)
    with progress_bar("schedule") as advance:
        if simulate:
            simulation = SimulationOptions(6 * seconds, bound_ms, arrivals, target)
            if mix or workload.executors:
                report = run_mixed(workload, tuple(filter(None, mix.split(","))), simulation, advance)
            else:
                report = run_simulated(workload, simulation, advance)
        else:
            options = LiveOptions(seconds, runs, bound_ms, overload_seconds, others, arrivals, without)
            report = run_live(workload, options, advance)
    if picture is not None:
        draw_curves(report, picture)
    show_report(report, as_json)


@bench.command()
@workload_option("mixed")
@click.option("--scenario", type=click.Choice(["server", "offline"]), default="server", show_default=True)
@click.option(
    "--logs",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The folder that LoadGen's logs go to.",
)
@click.option("--rate", type=click.FloatRange(0.1), help="Requests a second; 70% of the capacity if left out.")
@click.option("--seconds", type=click.FloatRange(1), default=60.0, show_default=True, help="At least.")
@click.option("--bound-ms", type=click.FloatRange(1), default=100.0, show_default=True, help="The p99 to keep.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def mlperf(
    name: str, scenario: str, logs: Path, rate: float | None, seconds: float, bound_ms: float, as_json: bool
) -> None:
    """MLPerf's own load generator against a real server.

    Scenario server: Poisson arrivals, valid if the p99 stays under --bound-ms. Scenario offline: everything at once.
    LoadGen keeps the time and writes its logs to --logs.
    """
    from rankd.bench.schedule_suite.mlperf import MlperfOptions, Scenario, run_mlperf
    from rankd.bench.workload import load_workload
    from rankd.cli.progress import progress_bar
    from rankd.cli.reporting import show_report

    options = MlperfOptions(Scenario(scenario), logs, rate, seconds, bound_ms)
    with progress_bar("mlperf") as advance:
        report = run_mlperf(load_workload(name), options, advance)
    show_report(report, as_json)
