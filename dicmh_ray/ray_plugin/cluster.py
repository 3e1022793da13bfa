"""A connection to Ray, and what its machines have room for.

The first module here that imports ray: it sets what ray reads from the environment when it is
imported.
"""

import dataclasses
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# No usage reports, and a cluster that only its owner can talk to.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# A local Ray lets its driver in when as many workers have started as there are CPUs; if one of them
# is killed on the way, never. Without them it starts sooner, and what is needed later.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

import ray

from dicmh_ray.errors import RayUnavailableError
from dicmh_ray.pipeline import EncodeOptions
from dicmh_ray.ray_plugin.options import RayOptions

_log = logging.getLogger(__name__)


@contextmanager
def connected(options: RayOptions) -> Iterator[bool]:
    """A connection to Ray: the process's own, a running cluster's, or a local one of our own.

    Yields whether it is a local one that ends with the context.

    Raises:
        RayUnavailableError: the cluster does not answer, or the local one does not start.
    """
    if ray.is_initialized():
        yield False
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as exc:
            ray.shutdown()
            raise RayUnavailableError(address, _in_one_line(exc)) from exc
    else:
        start_local_ray(options.local_cpus)
    try:
        yield not address
    finally:
        ray.shutdown()


def start_local_ray(num_cpus: int | None = None) -> None:
    """Start a Ray of this machine alone; ``ray.shutdown`` stops it.

    Ray gives its own processes 30 s to appear. A machine that is busy, as those that compress are,
    can need longer; another attempt then finds its files in memory.

    Raises:
        RayUnavailableError: it did not start three times, or for another reason than time.
    """
    for attempts_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as exc:  # the class that Ray raises here
            ray.shutdown()
            is_slow = "timed out during startup" in str(exc)
            if attempts_left == 0 or not is_slow:
                reason = _in_one_line(exc)
                if is_slow:
                    reason = f"its processes did not start in time, the machine is busy ({reason})"
                raise RayUnavailableError("this machine", reason) from exc
            _log.warning("Ray did not start in time, trying again")
        else:
            return


def _in_one_line(exc: Exception) -> str:
    """The class and the first line of what Ray says: the others are advice and paths."""
    text = str(exc).strip()
    return f"{type(exc).__name__}: {text.splitlines()[0]}" if text else type(exc).__name__


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One node of the cluster."""

    node_id: str
    """As Ray names it, hex digits."""

    cpus: float
    gpus: float


def machines() -> list[Machine]:
    """The nodes that are alive."""
    return [
        Machine(
            node_id=node["NodeID"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def current_node_id() -> str:
    """Of the process that calls it."""
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def draining_nodes() -> frozenset[str]:
    """Nodes that are to be taken away soon: spot instances with notice, pods told to stop.

    Ray shows this to Ray Train only, through its private state; it has no public way. Where the
    private one is missing, as through ``ray://``, no node drains, and a unit is found lost when its
    worker is.
    """
    try:
        found: Mapping[str, int] = ray._private.state.state.get_draining_nodes()
    except Exception:  # noqa: BLE001  whatever another version of Ray raises: it is only a notice
        return frozenset()
    return frozenset(found)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActorSize:
    """What one actor claims."""

    cpus: float
    gpus: float

    def fitting(self, nodes: Collection[Machine]) -> int:
        """How many there is room for, nothing else running."""
        return sum(self._fitting(node) for node in nodes)

    def start(self, cls: type, *args: Any) -> Any:
        """One more actor; Ray starts its process when there is room for it."""
        remote: Any = ray.remote(cls).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0, max_task_retries=0
        )
        return remote.remote(*args)

    def _fitting(self, node: Machine) -> int:
        if self.gpus >= 1:
            return int(node.gpus // self.gpus)
        if self.gpus > 0:
            # A share is of one GPU: 0.4 fits twice, and four of them never have three of 0.75.
            return int(node.gpus) * int(1 / self.gpus + 1e-9)
        return int(node.cpus // self.cpus) if self.cpus else 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a job lies on a cluster."""

    worker: ActorSize
    """Of each that encodes."""

    reader: ActorSize | None
    """Of each that reads for one of them; None without readers."""

    max_readers: int

    on_gpu: bool

    @classmethod
    def of(cls, options: RayOptions, device: str, threads: int | None, num_units: int) -> "Layout":
        """The layout that suits the machines that are there.

        Args:
            options: the caller's wishes.
            device: of the codec; one that begins with ``cuda`` wants GPUs before there are any.
            threads: of the codec on a CPU; None lets workers share the cores of the cluster.
            num_units: that wait: with fewer units than cores, each worker gets several.
        """
        nodes = machines()
        on_gpu = device.startswith("cuda") or (
            not device.startswith("cpu") and any(node.gpus for node in nodes)
        )
        reader = ActorSize(cpus=options.reader_cpus, gpus=0)
        spare = [node for node in nodes if not node.gpus] if on_gpu else nodes
        if options.readers == "never" or (options.readers == "auto" and not on_gpu):
            max_readers = 0
        elif options.readers == "auto":
            max_readers = reader.fitting(spare)
        else:
            max_readers = max(1, reader.fitting(spare) if on_gpu else reader.fitting(nodes) // 2)
        if on_gpu:
            # No CPU is claimed: loading pictures uses what is there, and a claim can starve others.
            worker = ActorSize(cpus=0, gpus=options.gpus_per_worker)
        else:
            worker = ActorSize(cpus=_cpus_of_worker(options, threads, num_units, nodes), gpus=0)
        return cls(
            worker=worker,
            reader=reader if max_readers else None,
            max_readers=max_readers,
            on_gpu=on_gpu,
        )

    def fit(self, given: EncodeOptions) -> EncodeOptions:
        """The options that suit these workers, where the caller left them open."""
        threads = None if self.on_gpu else int(self.worker.cpus)
        return dataclasses.replace(
            given,
            threads=given.threads if given.threads is not None else threads,
            batch_pixels=given.batch_pixels or (2**24 if self.on_gpu else 2**20),
            load_threads=given.load_threads
            if given.load_threads is not None
            else (4 if self.on_gpu else 1),
        )


def _cpus_of_worker(
    options: RayOptions, threads: int | None, num_units: int, nodes: Collection[Machine]
) -> int:
    """One, or with fewer workers than cores so many that all cores have work."""
    largest = max((int(node.cpus) for node in nodes), default=1)
    if threads is not None:
        return max(1, min(threads, largest))
    bounds = (options.workers, options.max_concurrency, num_units)
    workers = min(bound for bound in bounds if bound is not None)
    cores = sum(int(node.cpus) for node in nodes)
    return max(1, min(cores // workers, largest))
