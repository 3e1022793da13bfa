"""What all commands share in talking to a user: two consoles, one way to fail, storage options."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from dicmh_ray.errors import DicmhError, FailureBudgetError, JobStoppedError

EXIT_ERROR, EXIT_USAGE, EXIT_FAILURES, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 2, 3, 130, 143

_log = logging.getLogger(__name__)


def say(line: str) -> None:
    """A result, to standard output, as it is."""
    typer.echo(line)


def tell(line: str) -> None:
    """A message, to standard error."""
    typer.echo(line, err=True)


def tell_error(exc: Exception) -> None:
    """What went wrong, in a line: reasons may quote libraries that write paragraphs."""
    tell(f"error: {' '.join(str(exc).split())}")


@contextmanager
def told_in_one_line(*, error_code: int = EXIT_ERROR) -> Iterator[None]:
    """End the program with a line and an exit code when something expected goes wrong.

    With ``--verbose`` the traceback is logged. Anything unexpected passes: its traceback is the
    most useful thing there is. So does an ImportError that names a module which is there.
    """
    try:
        yield
    except FailureBudgetError as exc:
        tell_error(exc)
        raise typer.Exit(EXIT_FAILURES) from exc
    except JobStoppedError as exc:
        tell(str(exc))
        raise typer.Exit(EXIT_STOPPED) from exc
    except (DicmhError, OSError) as exc:
        _log.info("traceback", exc_info=exc)
        tell_error(exc)
        raise typer.Exit(error_code) from exc
    except ModuleNotFoundError as exc:
        tell(f"error: {exc.name} is not installed; see the extras of dicmh_ray")
        raise typer.Exit(error_code) from exc
    except ImportError as exc:
        if exc.name is not None:
            raise
        # A library's own sentence about what it wants installed; fsspec's about its back ends.
        _log.info("traceback", exc_info=exc)
        tell_error(exc)
        raise typer.Exit(error_code) from exc
    except KeyboardInterrupt as exc:
        tell("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from exc


@contextmanager
def usage_checked() -> Iterator[None]:
    """Turn the ValueError of an option's class into a usage error.

    Our own errors pass, those that are ValueErrors too: they are about the world, not the usage.
    """
    try:
        yield
    except DicmhError:
        raise
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def storage_options(pairs: Sequence[str], *addresses: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as fsspec takes them; values are JSON where they parse, else text.

    Empty when every address is local: the options are for remote stores.
    """
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--storage-option {pair!r}: wanted NAME=VALUE")
        try:
            options[name] = json.loads(text)
        except ValueError:
            options[name] = text
    is_remote = any(
        "://" in address and not address.startswith(("file://", "local://"))
        for address in addresses
    )
    return options if is_remote else {}


def print_json(value: Any) -> None:
    """One JSON document, indented, in ASCII: any terminal and any pipe takes it."""
    say(json.dumps(value, indent=2))


def print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, one a line; never cut."""
    width = max((len(name) for name, _ in facts), default=0)
    say("\n".join([title, *(f"  {name:{width}}  {value}" for name, value in facts)]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere lines with tabs, which other programs can cut."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        for row in (columns, *rows):
            say("\t".join(row))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def bytes_text(count: float) -> str:
    """``1.5 MiB``"""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def number_text(value: float | None, form: str, unit: str = "") -> str:
    """A number that may be missing."""
    return "-" if value is None else f"{value:{form}}{unit}"
