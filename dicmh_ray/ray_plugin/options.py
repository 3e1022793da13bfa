"""How a job uses a Ray cluster. Apart from ``run`` so that it is there without ray."""

from dataclasses import dataclass
from typing import Literal

from dicmh_ray.pipeline.stopping import GRACE_S

Readers = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Which cluster, and how much of it."""

    address: str | None = None
    """Of a running cluster (``auto``, ``ray://host:10001``). None joins the Ray of this process or
    of ``RAY_ADDRESS`` where there is one; else a local Ray is started and stopped again."""

    workers: int | None = None
    """The most actors at once. Where the cluster can grow, it is asked to, step by step, up to this.
    None means what fits the machines that it has, also those that come later."""

    min_workers: int | None = None
    """Actors that are asked for at the start, also where the cluster must grow for them; more follow
    while units wait. None means as many as fit the machines that are there."""

    gpus_per_worker: float = 1.0
    """On clusters with GPUs: a whole number, or a share below 1, so that several workers have one
    GPU and one encodes while another writes."""

    max_concurrency: int | None = None
    """Units in flight at once, over the whole job: what source and store must bear. None sets no
    bound besides the workers."""

    readers: Readers = "auto"
    """Whether actors on CPUs read and decode for those that encode. ``auto`` uses them where the
    cluster has GPUs and also machines without; ``always`` and ``never`` force it."""

    reader_cpus: int = 4
    """CPUs, and decoding threads, of a reader."""

    grace_s: float = GRACE_S
    """Told to stop (SIGTERM), how long units that run may still take."""

    local_cpus: int | None = None
    """CPUs of a local Ray that is started here; None means all."""

    def __post_init__(self) -> None:
        for name in ("workers", "min_workers", "max_concurrency", "reader_cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted at least 1")
        if self.workers is not None and (self.min_workers or 0) > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than {self.workers} workers")
        gpus = self.gpus_per_worker
        if not gpus > 0 or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"gpus_per_worker is {gpus}, wanted a share of 1 or a whole number")
        if self.readers not in ("auto", "always", "never"):
            raise ValueError(f"readers is {self.readers!r}, wanted 'auto', 'always' or 'never'")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s is {self.grace_s}, wanted 0 or more")
