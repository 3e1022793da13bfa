"""Help in sections: a command of many options is read by what one wants, not by the alphabet."""

from typing import Any

from typer.core import TyperArgument, TyperCommand


class SectionedCommand(TyperCommand):
    """A command whose options stand under the headings they were declared with.

    The heading is ``rich_help_panel``, which typer itself shows in its slower help only.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then the sections in the order of their first options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            heading = getattr(param, "rich_help_panel", None) or "Options"
            if isinstance(param, TyperArgument):
                heading = "Arguments"
            sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
