"""The online commands: `rankd serve`, `rankd rank`, `rankd demo`."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rankd.errors import InvalidRequest

if TYPE_CHECKING:
    from rankd.types import RankRequest, Scores

ENGINE = ("target", "mix", "precision", "executors", "threads", "isolation")
PRECISIONS = click.Choice(["auto", "fp32", "bf16", "int8"])


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--host", help="The address to listen on; 127.0.0.1 by default.")
@click.option("--port", type=int, help="The port; 8000 by default, 0 takes a free one.")
@click.option("--grpc-port", type=int, help="The port of gRPC; the one above --port by default, 0 takes a free one.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file; flags and RANKD_* variables go over it.")
@click.option("--model", "names", multiple=True, help="Load only this model; may be given several times.")
@click.option(
    "--target", help="openvino, native, cuda, onnxruntime or reference; auto takes the fastest one measured here."
)
@click.option(
    "--mix",
    callback=lambda _, __, text: text.split(",") if text else None,
    help="Several targets at once, with their executors and threads: openvino:1,onnxruntime:2x1.",
)
@click.option("--precision", type=PRECISIONS, help="Over what the artifacts were built for.")
@click.option("--executors", type=click.IntRange(0), help="Requests computed at once; one for each core by default.")
@click.option("--threads", type=click.IntRange(1), help="Threads of one request; 1 by default.")
@click.option(
    "--isolation",
    type=click.Choice(["threads", "processes"]),
    help="Executors on threads (default), or each in a process, so that one that crashes takes no other with it.",
)
@click.option("--states-mib", type=click.IntRange(0), help="Memory for user states, a model; 1024 by default.")
@click.option("--states-spill", type=click.Path(), help="A folder for states that leave memory; survives a restart.")
@click.option(
    "--store", help="Where features and events are kept; lmdb:MODELS/.store by default, or redis://..., memory:"
)
@click.option("--outbox", type=click.Path(), help="A folder for events that a remote store has not confirmed yet.")
@click.option("--histories", type=click.Path(), help="Parquet: histories in place of the artifact's (one model only).")
@click.option("--items", type=click.Path(), help="Parquet: item features over the artifact's (one model only).")
def serve(models: Path, config: Path | None, names: tuple[str, ...], **flags: Any) -> None:
    """Serve a folder of models over HTTP and gRPC.

    MODELS holds <model>/<version>/; the newest version of each is loaded. The server is ready when every shape is warm,
    and drains on SIGTERM.
    """
    from rankd.config import read_config
    from rankd.serve.lifecycle import run_server
    from rankd.serve.settings import ServeConfig, durable

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    engine = {f"engine.{key}": flags.pop(key) for key in ENGINE}
    states = {"states.budget_mib": flags.pop("states_mib"), "states.spill": flags.pop("states_spill")}
    features = {"features.store.url": flags.pop("store"), "features.outbox": flags.pop("outbox")}
    given = {**flags, **engine, **states, **features, "models": list(names) or None}
    run_server(models, durable(read_config(ServeConfig, config, os.environ, given), models))


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="A model or version folder, ranked in this process.")
@click.option("--url", help="A running server, such as http://localhost:8000.")
@click.option("--name", default="", help="The model's name on the server, where it has several.")
@click.option("--user", required=True, help="The user's id.")
@click.option("--candidates", default="", help="Item ids, separated by commas.")
@click.option("--candidates-file", type=click.File(), help="Item ids, one a line; - reads standard input.")
@click.option(
    "--history", type=click.File(), help='JSON: [{"item_id": "...", "event": "..."}, ...], over the stored one.'
)
@click.option("--top-k", type=click.IntRange(1), help="Only the best so many.")
@click.option("--time", type=int, help="The moment of the request, in seconds since 1970 UTC.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def rank(model: Path | None, url: str | None, as_json: bool, **given: Any) -> None:
    """Rank candidates for a user, with a model on disk or a server."""
    if (model is None) == (url is None):
        raise InvalidRequest("give --model FOLDER or --url URL, one of the two")
    request = _request(**given)
    if model is not None:
        from rankd.ranker import Ranker

        with Ranker.load(model) as ranker:
            scores = ranker.rank(request)
    else:
        from rankd.client import Client

        with closing(Client(str(url))) as client:
            scores = client.rank(request)
    _print_scores(scores, as_json)


@click.command()
@click.option("--host", default="127.0.0.1", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="The port; 0 takes a free one.")
@click.option("--once", is_flag=True, help="Exit after the requests instead of staying up.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on one line.")
def demo(host: str, port: int, once: bool, as_json: bool) -> None:
    """Serve a small trained model, send it requests, show what comes back.

    Stays up with the address of the live page until interrupted.
    """
    from rankd.demo import showcase

    showcase.run(host, port, once, as_json)


def _request(
    name: str,
    user: str,
    candidates: str,
    candidates_file: Any,
    history: Any,
    top_k: int | None,
    time: int | None,
) -> RankRequest:
    import msgspec

    from rankd.serve.wire import EventBody, decode_event
    from rankd.types import RankRequest

    ids = [part.strip() for part in candidates.split(",")] if candidates else []
    if candidates_file is not None:
        try:
            ids += [line.strip() for line in candidates_file if line.strip()]
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"{candidates_file.name}: not UTF-8 text: {error}") from error
    events = None
    if history is not None:
        try:
            raw = msgspec.json.decode(history.read(), type=list[EventBody])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{history.name}: {error}") from error
        events = tuple(decode_event(one) for one in raw)
    return RankRequest(user, tuple(ids), model=name, history=events, top_k=top_k, time=time)


def _print_scores(scores: Scores, as_json: bool) -> None:
    if as_json:
        from rankd.serve.wire import encode_scores

        click.echo(json.dumps(json.loads(encode_scores(scores))))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("candidate", *scores.tasks, title=f"{scores.model} {scores.version}")
    for candidate, row in zip(scores.candidates, scores.scores, strict=True):
        table.add_row(candidate, *(f"{value:.4f}" for value in row))
    Console().print(table)
    if scores.unknown:
        click.echo(f"unknown to the model, scored as missing: {', '.join(scores.unknown)}")
    click.echo(", ".join(f"{stage} {ms:.2f} ms" for stage, ms in scores.timings_ms.items()))
