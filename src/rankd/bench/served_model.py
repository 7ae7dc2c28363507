"""`rankd serve` as a contestant: a process of its own on a free port, and what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from rankd.bench.load import HEAD_END
from rankd.bench.server_process import ServerProcess


class ServedModel(ServerProcess):
    """A model repository being served. `command` is what `python -m` runs, with the repository behind it; `variables`
    are its own, of which it reads RANKD_*."""

    def __init__(
        self,
        root: Path,
        command: Sequence[str] = ("rankd", "serve"),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__((*command, str(root)), {"RANKD_PORT": "0", **variables})

    def is_ready(self) -> bool:
        """Whether it says so; it names its port first."""
        found = re.search(r"listening on http://([\d.]+):(\d+)", self.log_text())
        if found is None:
            return False
        self.host, self.port = found[1], int(found[2])
        try:
            return self.exchange(_get("/health/ready")).status == 200
        except OSError:
            return False

    def engine_statistics(self, model: str) -> tuple[int, float]:
        """How many requests a model has answered, and the milliseconds that its engine has spent on them in all."""
        answer = self.exchange(_get(f"/v2/models/{model}/stats"))
        (about,) = msgspec.json.decode(answer.body)["model_stats"]
        spent: dict[str, Any] = about["inference_stats"]["compute_infer"]
        return spent["count"], spent["ns"] / 1e6

    def metrics_text(self) -> str:
        """What /metrics says."""
        return self.exchange(_get("/metrics")).body.decode()

    def state_origins(self, model: str) -> dict[str, float]:
        """Requests by where their user's state came from, as /metrics counts them."""
        return {
            sample.labels["origin"]: sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == "rankd_states_total" and sample.labels["model"] == model
        }

    def counter(self, name: str, **labels: str) -> float:
        """A figure of /metrics, summed over all labels but those that are given."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: rankd".encode() + HEAD_END
