"""Bodies of ``dicmh history``, ``compact`` and ``gc``."""

from collections.abc import Sequence
from datetime import UTC, datetime

from dicmh_ray.archive import GcOptions, collect_garbage, compact_archive, read_history
from dicmh_ray.cli.output import (
    bytes_text,
    print_facts,
    print_json,
    print_table,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)

_COLUMNS = ("version", "made", "by", "units", "parts", "rows", "bytes", "plan", "kept")


def run_history(archive: str, storage: Sequence[str], *, as_json: bool) -> None:
    """Print the versions, and the jobs under way."""
    with told_in_one_line():
        history = read_history(archive, storage_options=storage_options(storage, archive))
    if as_json:
        print_json(history.to_dict())
        return
    rows = []
    for facts in history.versions:
        version = facts.version
        made = datetime.fromtimestamp(facts.created_at, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        rows.append(
            (
                str(version.archive_version),
                made,
                version.operation,
                str(version.units),
                str(version.parts),
                str(version.rows),
                bytes_text(version.num_bytes),
                version.plan_id[:16],
                "yes" if facts.is_kept else "no",
            )
        )
    print_table(_COLUMNS, rows)
    for job in history.open_jobs:
        say(
            f"not published: {job.operation} {job.plan_id[:16]}, "
            f"{job.committed} of {job.units} units are committed"
        )


def run_compact(
    archive: str, storage: Sequence[str], *, target_bytes: int, dry_run: bool, as_json: bool
) -> None:
    """Compact, and print what that changed."""
    with told_in_one_line():
        report = compact_archive(
            archive,
            target_bytes=target_bytes,
            dry_run=dry_run,
            progress=lambda done, total: tell(f"{done} of {total} groups"),
            storage_options=storage_options(storage, archive),
        )
    if as_json:
        print_json(report.to_dict())
        return
    facts = [
        ("groups", f"{report.groups}, {bytes_text(report.bytes_rewritten)}"),
        ("units", f"{report.units_before} -> {report.units_after}"),
        ("parts", f"{report.parts_before} -> {report.parts_after}"),
        ("archive version", str(report.version)),
    ]
    if dry_run:
        title = f"{report.uri} (would be compacted)"
    elif report.is_superseded:
        title = f"{report.uri} (another compaction was faster; this one changed nothing)"
    else:
        title = f"{report.uri} ({'compacted' if report.groups else 'nothing to compact'})"
    print_facts(title, facts)


def run_gc(
    archive: str,
    storage: Sequence[str],
    *,
    keep_versions: int,
    keep_s: float,
    grace_s: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Collect garbage, and print what it was."""
    with usage_checked():
        options = GcOptions(keep_versions=keep_versions, keep_s=keep_s, grace_s=grace_s)
    with told_in_one_line():
        report = collect_garbage(
            archive,
            options=options,
            dry_run=dry_run,
            storage_options=storage_options(storage, archive),
        )
    if as_json:
        print_json(report.to_dict())
        return
    verb = "would delete" if dry_run else "deleted"
    for stored in report.deleted:
        say(f"{verb}\t{bytes_text(stored.num_bytes)}\t{stored.name}")
    for stored in report.spared:
        say(f"too young\t{bytes_text(stored.num_bytes)}\t{stored.name}")
    facts = [
        ("versions kept", ", ".join(map(str, report.kept_versions)) or "none yet"),
        ("versions given up", ", ".join(map(str, report.given_up)) or "none"),
        (verb, f"{len(report.deleted)} objects, {bytes_text(report.num_bytes)}"),
    ]
    print_facts(report.uri, facts)
