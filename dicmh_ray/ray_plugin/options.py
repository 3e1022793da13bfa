"""How a job uses a Ray cluster. Apart from ``run`` so that it is there without ray."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RayOptions:
    """Which cluster, and how much of it."""

    address: str | None = None
    """Of a running cluster (``auto``, ``ray://host:10001``). None joins the Ray of this process or
    of ``RAY_ADDRESS`` where there is one; else a local Ray is started and stopped again."""

    workers: int | None = None
    """Actors; None means one for each GPU of the cluster, or for each CPU where it has none."""

    gpus_per_worker: float = 1.0
    """On clusters with GPUs. Below 1, several workers share one."""

    local_cpus: int | None = None
    """CPUs of a local Ray that is started here; None means all."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}, wanted at least 1")
        if not self.gpus_per_worker > 0:
            raise ValueError(f"gpus_per_worker is {self.gpus_per_worker}, wanted more than 0")
