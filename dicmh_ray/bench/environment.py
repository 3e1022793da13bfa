"""What a number was measured on: a benchmark without it says nothing."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import features

PACKAGES = (
    "dicmh_ray",
    "numpy",
    "pillow",
    "pillow-jxl-plugin",
    "torch",
    "constriction",
    "compressai",
    "bjontegaard",
    "onnxruntime",
)
PILLOW_LIBRARIES = ("libjpeg_turbo", "webp", "avif")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine, the versions, the day and the command of a measurement."""

    cpu: str
    num_cores: int
    """Logical cores this process may use."""

    versions: Mapping[str, str] = field(default_factory=dict)
    date: str
    """UTC, ISO 8601, to the second."""

    command: str
    """What to type to repeat it."""

    def lines(self) -> tuple[str, ...]:
        """For people."""
        listed = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"Hardware: {self.cpu}, {self.num_cores} cores",
            f"Versions: {listed}",
            f"Date: {self.date}",
            f"Command: `{self.command}`",
        )


def describe_environment(command: str = "", *, now: datetime | None = None) -> Environment:
    """This process's environment; loads none of the packages it names."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    for name in PILLOW_LIBRARIES:
        versions[name] = features.version(name) or "not built in"
    return Environment(
        cpu=_cpu_model(),
        num_cores=_num_cores(),
        versions=versions,
        date=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
        command=command,
    )


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
