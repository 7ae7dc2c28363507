"""The command line's way to Ray: connect, find controllers, call them. `local_ray.py` starts one for this machine.

Who reaches Ray runs code on all of its nodes: its token (`RAY_AUTH_MODE=token`) is asked for unless that was decided
otherwise.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rankd.deploy.deployment_record import DeploymentRecord
from rankd.deploy.local_ray import show_token
from rankd.errors import ConfigError, MissingExtra, NotFound, RankdError, Unavailable, nearest

LOCAL = "local"
JOBS = "rankd"
"""The namespace of all our jobs: Ray finds a placement group by its name only in the one where it was made."""


def connect(address: str) -> None:
    """Be connected to the Ray at "host:port", or to the one of this machine for "auto".

    Raises:
        MissingExtra: Ray is not installed. Unavailable: nobody answers there, or does not let us in.
    """
    if find_spec("ray") is None:
        raise MissingExtra("rankd deploy", "cluster")
    show_token(address)  # before Ray is imported, which looks whether it is to
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, namespace=JOBS, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, RayError) as error:
        raise Unavailable(
            f"no Ray at '{address}' lets us in: {' '.join(str(error).split())[:300]}; start one with `ray start "
            "--head`, or let `rankd deploy up --ray local` do it"
        ) from error


def disconnect() -> None:
    """Be connected to no Ray any more."""
    import ray

    ray.shutdown()


def start_controller(record: DeploymentRecord) -> Any:
    """The controller of a new deployment; what an unfinished `down` has left of an old one is ended first.

    Raises:
        ConfigError: there is one of that name.
    """
    import ray

    from rankd.deploy.controller_actor import ControllerActor
    from rankd.deploy.ray_fleet import CONTROLLER, NAMESPACE, RayFleet

    name = record.deployment.name
    if name in deployments():
        raise ConfigError(
            f"deployment '{name}' is there already; change it with `rankd deploy apply` or `scale`, or end "
            "it with `rankd deploy down`"
        )
    RayFleet(name, record.deployment.watch).end_all()
    options = {"name": CONTROLLER, "namespace": NAMESPACE + name, "lifetime": "detached"}
    actor = ray.remote(ControllerActor).options(**options, max_restarts=-1, max_concurrency=8, num_cpus=0)
    return actor.remote(record)


def deployments() -> list[str]:
    """The names of those that have a controller."""
    from ray.util import list_named_actors

    from rankd.deploy.ray_fleet import CONTROLLER, NAMESPACE

    found = [one["namespace"] for one in list_named_actors(all_namespaces=True) if one["name"] == CONTROLLER]
    return sorted(one.removeprefix(NAMESPACE) for one in found if one.startswith(NAMESPACE))


def find_controller(name: str) -> tuple[str, Any]:
    """A deployment's name and its controller; without a name of the only one there is.

    Raises:
        NotFound: there is none of that name. ConfigError: no name, and several deployments.
    """
    import ray

    from rankd.deploy.ray_fleet import CONTROLLER, NAMESPACE

    names = deployments()
    if not name and len(names) > 1:
        raise ConfigError(f"there are the deployments {', '.join(names)}; name one")
    wanted = name or (names[0] if names else "")
    if wanted not in names:
        raise NotFound(
            f"no deployment '{wanted}' here; there is: {', '.join(names) or 'none'}.{nearest(wanted, names)}"
        )
    return wanted, ray.get_actor(CONTROLLER, namespace=NAMESPACE + wanted)


def end_controller(name: str, actor: Any) -> None:
    """End a controller, and what it has not ended yet itself."""
    import ray

    ray.kill(actor, no_restart=True)
    end_left(name)


def end_left(name: str) -> bool:
    """End what is left of a deployment that has no controller; whether there was anything."""
    from rankd.deploy.deployment import Watching
    from rankd.deploy.ray_fleet import RayFleet

    return RayFleet(name, Watching()).end_all()


def answer(reference: Any) -> Any:
    """What an actor answers.

    Raises:
        RankdError: what it raised. Unavailable: it failed otherwise.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RankdError):
            raise error.cause from None
        raise
    except RayError as error:
        raise Unavailable(f"Ray lost the controller: {error}; see `rankd deploy status`") from error
