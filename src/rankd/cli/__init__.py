"""The command line. Each command imports what it needs when it runs, so that `rankd --help` answers at once."""

from __future__ import annotations

import importlib
import sys

import click

from rankd.errors import RankdError

COMMANDS = {
    "demo": "rankd.cli.online",
    "serve": "rankd.cli.online",
    "rank": "rankd.cli.online",
    "train": "rankd.cli.offline",
    "eval": "rankd.cli.offline",
    "compress": "rankd.cli.compression",
    "build": "rankd.cli.offline",
    "features": "rankd.cli.feature_tables",
    "plan": "rankd.cli.planning",
    "shard": "rankd.cli.shards",
    "deploy": "rankd.cli.deploying",
    "bench": "rankd.cli.benchmarks",
}
HELP = {
    "demo": "Serve a small trained model, send it requests, show what comes back.",
    "serve": "Serve a folder of models over HTTP and gRPC.",
    "rank": "Rank candidates for a user, with a model on disk or a server.",
    "train": "Train a ranker on an interaction log.",
    "eval": "Evaluate a trained ranker against baselines on held-out time.",
    "compress": "Make a smaller version of a trained ranker, if it keeps its quality.",
    "build": "Build a servable artifact from a trained ranker.",
    "features": "Fill and inspect a feature store.",
    "plan": "Plan where embedding tables live on shards, and predict what that costs.",
    "shard": "Serve embedding tables of a plan from a process of their own.",
    "deploy": "Run shards and ranking servers on a Ray cluster, and change them while they serve.",
    "bench": "Measure this machine, with the contestants in one run.",
}


class LazyGroup(click.Group):
    """Knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        command: click.Command = module.evaluate if cmd_name == "eval" else getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from HELP alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP[name]) for name in COMMANDS])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rankd")
def rankd() -> None:
    """The online ranking server for recommenders: a user and candidates in, scores out in milliseconds."""


def main() -> None:
    """Run the command line; an error of ours is one line on standard error and exit code 2."""
    try:
        rankd()
    except RankdError as error:
        click.echo(f"rankd: {error}", err=True)
        sys.exit(2)
