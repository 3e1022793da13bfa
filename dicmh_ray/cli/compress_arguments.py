"""What ``dicmh compress`` was told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.cli.output import storage_options
from dicmh_ray.cli.tagger_options import TaggerArguments
from dicmh_ray.ray_plugin import RayOptions
from dicmh_ray.source import SourceOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressArguments:
    """The command line of ``compress``, not yet checked."""

    sources: Sequence[str]
    archive: str
    runtime: Any
    policy: dict[str, Any]
    source: dict[str, Any]
    checkpoint: str
    device: str
    threads: int | None
    ray: dict[str, Any]
    """Fields of :class:`~dicmh_ray.ray_plugin.RayOptions`."""

    resume: bool
    failure_budget: str
    storage_options: Sequence[str]
    tagger: TaggerArguments | None = None
    append: bool = False
    log_json: str | None = None
    metrics_file: Path | None = None
    report: Path | None = None
    sample: int = 0
    price_per_hour: float | None = None
    price_per_gb_month: float | None = None

    def ray_options(self) -> RayOptions:
        """How Ray is used. Raises ValueError for options without meaning, also where Ray is not used."""
        options = RayOptions(**self.ray)
        if self.runtime == "local" and options != RayOptions():
            given = [
                name for name, value in self.ray.items() if value != getattr(RayOptions(), name)
            ]
            raise ValueError(f"{', '.join(given)}: for --runtime ray, not for local")
        return options

    def source_options(self) -> SourceOptions:
        """How sources are read."""
        source = {**self.source, "tag_fields": tuple(self.source["tag_fields"])}
        remote = storage_options(self.storage_options, *self.sources)
        return SourceOptions(**source, storage_options=remote)
