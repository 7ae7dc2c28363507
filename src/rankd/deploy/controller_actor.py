"""The controller as a Ray actor: it answers the command line, and follows what happens in between.

Ray starts it again when it fails; then it goes on from the record that was kept, and ends what an unfinished change
has left.
"""

from __future__ import annotations

import logging
import threading
import time

from rankd.deploy.controller import Controller
from rankd.deploy.deployment_record import DeploymentRecord
from rankd.deploy.deployment_status import DeploymentStatus
from rankd.deploy.ray_fleet import RayFleet
from rankd.errors import RankdError
from rankd.plan.plan_file import PlanFile

FOLLOW_S = 1.0
"""Between two looks at what is in the record and what runs."""

log = logging.getLogger("rankd")


class ControllerActor:
    """Made with the record of a new deployment; a kept one goes before it."""

    def __init__(self, first: DeploymentRecord) -> None:
        fleet = RayFleet(first.deployment.name, first.deployment.watch)
        record = fleet.load() or first
        fleet.save(record)
        self._controller = Controller(record, fleet)
        threading.Thread(target=self._follow, name="controller-follow", daemon=True).start()

    def up(self) -> None:
        """See `Controller.up`."""
        self._controller.up()

    def apply(self, plan: PlanFile) -> None:
        """See `Controller.apply`."""
        self._controller.apply(plan)

    def scale(self, replicas: int | None, servers: int | None) -> None:
        """See `Controller.scale`."""
        self._controller.scale(replicas, servers)

    def drain(self, names: tuple[str, ...], node: str) -> None:
        """See `Controller.drain`."""
        self._controller.drain(names, node)

    def down(self) -> None:
        """See `Controller.down`."""
        self._controller.down()

    def status(self) -> DeploymentStatus:
        """See `Controller.status`."""
        return self._controller.status()

    def _follow(self) -> None:
        while True:
            time.sleep(FOLLOW_S)
            try:
                self._controller.follow()
            except RankdError as error:  # no room, for example; tried again at the next look
                log.warning("%s", error)
            except Exception:  # the edge of the thread: it goes on as long as the actor does
                log.exception("the deployment could not be followed")
