"""Deployments on Ray: `rankd deploy up`, `status`, `scale`, `apply`, `drain`, `down`."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rankd.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from rankd.deploy.deployment_status import DeploymentStatus, ProcessStatus

ray_option = click.option(
    "--ray", "address", default="auto", show_default=True, help="Ray's address, host:port, or auto: of this machine."
)


@click.group()
def deploy() -> None:
    """Run shards and ranking servers on a Ray cluster, and change them while they serve."""


@deploy.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--ray", "address", default="auto", show_default=True, help="host:port, auto, or local: start one here.")
def up(file: Path, address: str) -> None:
    """Start the deployment that FILE describes; returns when all of it serves."""
    from msgspec.structs import replace

    from rankd.deploy import local_ray, ray_session
    from rankd.deploy.deployment import read_deployment
    from rankd.deploy.deployment_record import DeploymentRecord
    from rankd.plan.plan_file import read_plan

    deployment = read_deployment(file)
    plan = read_plan(Path(deployment.plan))
    if not (deployment.security.secret or deployment.security.tls_cert):
        made_up = replace(deployment.security, secret=secrets.token_hex(16))
        deployment = replace(deployment, security=made_up)
    started = local_ray.start_local() if address == ray_session.LOCAL else None
    try:
        ray_session.connect(started.address if started else address)
        if started:
            local_ray.keep(started)
        controller = ray_session.start_controller(DeploymentRecord(deployment, plan))
        try:
            ray_session.answer(controller.up.remote())
        except BaseException:
            ray_session.end_controller(deployment.name, controller)
            raise
    except BaseException:
        if started:
            ray_session.disconnect()
            local_ray.stop_local(started)
        raise
    _show(ray_session.answer(controller.status.remote()))


@deploy.command()
@click.argument("name", default="")
@ray_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on one line.")
def status(name: str, address: str, as_json: bool) -> None:
    """Show each process of deployment NAME: where it is, how it is, how long it was away last."""
    from rankd.deploy import ray_session

    ray_session.connect(address)
    _, controller = ray_session.find_controller(name)
    found = ray_session.answer(controller.status.remote())
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(found).decode())
    else:
        _show(found)


@deploy.command()
@click.argument("name", default="")
@ray_option
@click.option("--replicas", type=click.IntRange(1), help="Processes for each shard.")
@click.option("--servers", type=click.IntRange(0), help="Ranking servers.")
def scale(name: str, address: str, replicas: int | None, servers: int | None) -> None:
    """Run more or fewer replicas of each shard, or ranking servers, of deployment NAME."""
    if replicas is None and servers is None:
        raise InvalidRequest("give --replicas, --servers, or both")
    _change(name, address, "scale", replicas, servers)


@deploy.command()
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", default="", help="The deployment, if there are several.")
@ray_option
def apply(plan: Path, name: str, address: str) -> None:
    """Go over to another PLAN of the same tables while requests are served.

    Shards of the new plan start beside the old ones; when all ranking servers ask them, the old ones drain and end.
    """
    from rankd.plan.plan_file import read_plan

    _change(name, address, "apply", read_plan(plan))


@deploy.command()
@click.argument("processes", nargs=-1)
@click.option("--node", default="", help="All processes on this node: its address, or its id.")
@click.option("--name", default="", help="The deployment, if there are several.")
@ray_option
def drain(processes: tuple[str, ...], node: str, name: str, address: str) -> None:
    """Start others in place of PROCESSES (names as in `status`), then let these finish and end them."""
    if not processes and not node:
        raise InvalidRequest("name processes to drain, or give --node; `rankd deploy status` lists both")
    _change(name, address, "drain", processes, node)


@deploy.command()
@click.argument("name", default="")
@ray_option
def down(name: str, address: str) -> None:
    """End deployment NAME: ranking servers drain first, then shards. A Ray that `up` started ends with the last."""
    from rankd.deploy import local_ray, ray_session

    ray_session.connect(address)
    try:
        found, controller = ray_session.find_controller(name)
    except NotFound:
        if not name or not ray_session.end_left(name):  # of a `down` that did not come to its end
            raise
        found = name
    else:
        ray_session.answer(controller.down.remote())
        ray_session.end_controller(found, controller)
    click.echo(f"{found} is down")
    # Ray lists a controller that it is ending for a while yet
    others = [one for one in ray_session.deployments() if one != found]
    if (started := local_ray.kept()) is not None and not others:
        ray_session.disconnect()
        local_ray.stop_local(started)


def _change(name: str, address: str, method: str, *arguments: object) -> None:
    """Have a deployment's controller change it, and show what there is then."""
    from rankd.deploy import ray_session

    ray_session.connect(address)
    _, controller = ray_session.find_controller(name)
    ray_session.answer(getattr(controller, method).remote(*arguments))
    _show(ray_session.answer(controller.status.remote()))


def _show(found: DeploymentStatus) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    change = f", {found.change} is under way" if found.change else ""
    kept = (Column(name, no_wrap=True) for name in ("process", "state", "address"))
    table = Table(*kept, "node", "pid", "restarts", "away last", title=f"{found.name}: {found.plan}{change}")
    for process in found.processes:
        table.add_row(process.name, *_cells(process))
    Console().print(table)
    for process in found.processes:
        if process.report is not None and process.report.trouble:
            click.echo(f"{process.name}: {process.report.trouble}")


def _cells(process: ProcessStatus) -> list[str]:
    from rich.markup import escape

    report = process.report
    if report is None:
        return ["no answer", "", "", "", "", ""]
    away = "" if report.recovery_s is None else f"{report.recovery_s:.1f} s"
    return [report.state.value, escape(report.address), report.node[:8], str(report.pid), str(report.restarts), away]
