"""The ``dicmh`` program, which its commands join."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command

app = typer.Typer(
    name="dicmh",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich help takes three times as long to appear
    pretty_exceptions_enable=False,
    help="Learned image archives: compress a collection once, read it back lazily.",
)

bench_app = typer.Typer(no_args_is_help=True, help="Measure the codec.")
app.add_typer(bench_app, name="bench")
k8s_app = typer.Typer(no_args_is_help=True, help="Run jobs on Kubernetes.")
app.add_typer(k8s_app, name="k8s")


@app.callback()
def configure(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, to standard error.")
    ] = False,
) -> None:
    """Set up logging for every command."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def values_of(command: str, arguments: Sequence[str]) -> SimpleNamespace:
    """The values of a command's options, checked and not run.

    Raises:
        click.UsageError: the command has no such option, or an option no such value.
    """
    program = get_command(app)
    if not isinstance(program, TyperGroup):
        raise TypeError(f"the program is a {type(program).__name__}, wanted a group of commands")
    context = program.commands[command].make_context(command, list(arguments))
    return SimpleNamespace(**context.params)
