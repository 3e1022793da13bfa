"""Body of ``dicmh compress --dry-run``: the units, and what a sample of their images says."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dicmh_ray.archive import ArchiveWriter, Plan, Snapshot, open_store
from dicmh_ray.archive.append import AppendWriter, check_codec
from dicmh_ray.archive.plan import PLAN_NAME
from dicmh_ray.cli.compress_arguments import CompressArguments
from dicmh_ray.cli.output import (
    bytes_text,
    number_text,
    print_json,
    print_table,
    say,
    storage_options,
    tell,
    told_in_one_line,
    usage_checked,
)
from dicmh_ray.codec import DEFAULT_CHECKPOINT
from dicmh_ray.codec.image_taggers import TaggerSpec, load_image_tagger
from dicmh_ray.errors import PlanConflictError
from dicmh_ray.pipeline import Checkpoint, EncodeOptions, EncodePolicy
from dicmh_ray.pipeline.forecast import GB, Forecast, ForecastOptions, Outcome, Range, forecast
from dicmh_ray.pipeline.job import Planned, plan_work, refuse_begun
from dicmh_ray.source import SourceOptions, Unit

UNITS_SHOWN = 20


def run_dry(
    arguments: CompressArguments,
    policy: EncodePolicy,
    source_options: SourceOptions,
    tagger: TaggerSpec | None,
    *,
    as_json: bool,
) -> None:
    """List the units; with ``--sample``, say what the job would come to. Writes nothing."""
    workers = arguments.ray["workers"]
    if workers is None:
        workers = 1 if arguments.runtime == "local" else os.cpu_count() or 1
    options = None
    with usage_checked():
        if arguments.sample:
            options = ForecastOptions(
                sample=arguments.sample,
                workers=workers,
                price_per_hour=arguments.price_per_hour,
                price_per_gb_month=arguments.price_per_gb_month,
            )
    with told_in_one_line():
        if tagger is not None:
            tagger = tagger.pinned()
        planned, committed = _plan(arguments, policy, source_options, tagger)
        units, found = planned.units, None
        if options is not None:
            todo = [unit for unit in units if unit.name not in committed]
            found = _forecast(
                arguments, policy, source_options, tagger, planned.checkpoint, todo, options
            )
    total = sum(unit.num_bytes for unit in units)
    if as_json:
        plan: dict[str, Any] = {
            "units": [asdict(unit) for unit in units],
            "num_bytes": total,
            "committed": len(committed),
        }
        print_json(plan if found is None else plan | {"forecast": found.to_dict()})
        return
    _print_units(units)
    say(f"{len(units)} units, {bytes_text(total)}; {len(committed)} are committed already")
    if found is not None:
        _print_forecast(found)


def _plan(
    arguments: CompressArguments,
    policy: EncodePolicy,
    source_options: SourceOptions,
    tagger: TaggerSpec | None,
) -> tuple[Planned, set[str]]:
    """The job, refused as it would be, and the names of its units that are done."""
    remote = storage_options(arguments.storage_options, arguments.archive)
    planned = plan_work(
        arguments.sources,
        arguments.archive,
        codec=arguments.checkpoint or DEFAULT_CHECKPOINT,
        policy=policy,
        source_options=source_options,
        tagger=tagger,
        append=arguments.append,
        storage_options=remote,
    )
    if planned.base is None:
        committed = _committed(arguments.archive, planned.plan, remote)
    else:
        committed = _committed_later(planned.base, planned.plan)
    if not arguments.resume:
        refuse_begun(arguments.archive, committed, planned.units)
    return planned, committed


def _committed(archive: str, plan: Plan, remote: Mapping[str, Any]) -> set[str]:
    """Units of an archive's first job that are done. Raises PlanConflictError for another's."""
    store = open_store(archive, remote)
    try:
        found = Plan.from_bytes(store.get(PLAN_NAME))
    except FileNotFoundError:
        return set()
    if found.plan_id != plan.plan_id:
        raise PlanConflictError(store.uri, plan.plan_id, found.plan_id)
    return ArchiveWriter(store, plan).committed_units()


def _committed_later(base: Snapshot, plan: Plan) -> set[str]:
    """Units of an append that are done. Raises AppendError where the codec is another one."""
    if not plan.units:
        return set()
    check_codec(base.uri, base.codec_id, plan)
    return AppendWriter(base.store, plan).committed_units()


def _forecast(
    arguments: CompressArguments,
    policy: EncodePolicy,
    source_options: SourceOptions,
    tagger: TaggerSpec | None,
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    options: ForecastOptions,
) -> Forecast | None:
    threads = arguments.threads
    if threads is None and arguments.runtime == "ray":
        threads = 1  # as workers on CPUs have it
    encode_options = EncodeOptions(device=arguments.device, threads=threads)
    found = None
    if units:
        tell(f"encoding a sample of {options.sample} images ...")
        found = forecast(
            units,
            checkpoint.load(encode_options),
            policy,
            options=options,
            source_options=source_options,
            encode_options=encode_options,
            tagger=None if tagger is None else load_image_tagger(tagger, device=arguments.device),
            checkpoint_bytes=sum(map(len, checkpoint.files.values())),
        )
    if found is None:
        tell("there is no image to look at")
    return found


def _print_units(units: Sequence[Unit]) -> None:
    rows = []
    for unit in units[:UNITS_SHOWN]:
        where = unit.uri if isinstance(unit.uri, str) else f"{len(unit.uri)} files: {unit.uri[0]}"
        if unit.start is not None:
            where += f" row groups {unit.start} to {unit.stop}"
        rows.append((unit.name, unit.kind, where, bytes_text(unit.num_bytes)))
    print_table(("unit", "kind", "source", "bytes"), rows)
    if len(units) > UNITS_SHOWN:
        say(f"... and {len(units) - UNITS_SHOWN} more")


def _print_forecast(found: Forecast) -> None:
    images = found.images
    say(
        f"\nforecast from {found.sampled_images} images of {found.sampled_units} units "
        f"(seed {found.seed}); in brackets 90 % of resamples, by {found.resampled}"
    )
    say(
        f"{images.value:,.0f} images ({images.low:,.0f} to {images.high:,.0f}), "
        f"{found.source_bytes / GB:.3f} GB to do, {found.workers} workers"
    )
    outcomes = (*found.by_states, found.asked)
    columns = [
        "states",
        "bpp",
        "PSNR",
        "below floor",
        "originals",
        "archive GB",
        "saved GB",
        "hours",
    ]
    has_price = found.asked.compute_price is not None
    has_rent = found.asked.storage_price_per_month is not None
    columns += ["compute price"] * has_price + ["storage a month"] * has_rent
    print_table(columns, [_cells(outcome) for outcome in outcomes])
    saved = found.asked.saved_bytes
    share = saved.value / found.source_bytes if found.source_bytes else 0.0
    say(f"as asked: {_range_text(saved, GB)} GB saved, {share:.0%} of the source")
    if found.checkpoint_bytes:
        size = f"{found.checkpoint_bytes / GB:.3g} GB"
        say(f"{size} of the archive is the checkpoint, which every archive holds once")
    for cause, count in found.causes.items():
        say(f"  {cause}: {count} of {found.sampled_images} images")


def _cells(outcome: Outcome) -> list[str]:
    cells = [
        "as asked" if outcome.states is None else str(outcome.states),
        number_text(outcome.bpp, ".3f"),
        number_text(outcome.psnr, ".2f"),
        f"{outcome.below_floor:.0%}",
        f"{outcome.kept_original:.0%}",
        _range_text(outcome.archive_bytes, GB),
        f"{outcome.saved_bytes.value / GB:.3g}",
        _range_text(outcome.hours, 1.0),
    ]
    prices = (outcome.compute_price, outcome.storage_price_per_month)
    return cells + [f"{price:.3g}" for price in prices if price is not None]


def _range_text(found: Range, unit: float) -> str:
    """``1.23 (1.1 to 1.4)``, all with three digits."""
    value, low, high = (f"{number / unit:.3g}" for number in found)
    return f"{value} ({low} to {high})"
