"""How a benchmark ends: one JSON object on one line, or tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rankd.bench.report import Report


def show_report(report: Report, as_json: bool) -> None:
    """On standard output."""
    from rankd.bench.report import print_report

    if as_json:
        click.echo(report.line())
    else:
        print_report(report)
