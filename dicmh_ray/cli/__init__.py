"""The command line: parse, call, print.

This module knows only typer, so that ``dicmh --help`` is there at once; each command imports its
body when it is called. Exit codes: 0 done · 1 an error, told in one line · 2 usage · 3 too many
images failed · 130 interrupted. ``verify`` has its own: 0 sound · 1 damaged · 2 not checked.
Results go to standard output, progress and messages to standard error.
"""

from dicmh_ray.cli import commands
from dicmh_ray.cli.program import app

__all__ = ["app", "commands", "main"]


def main() -> None:
    """Entry point of the ``dicmh`` program."""
    app()
