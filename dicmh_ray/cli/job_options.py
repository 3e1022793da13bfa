"""What ``dicmh k8s render`` is told, checked here, since a cluster says it late or never.

Names follow RFC 1123 as Kubernetes reads it; addresses are those a pod can reach; nothing that looks
like a credential passes, for manifests are kept, mailed and committed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from dicmh_ray.errors import ManifestError

MAX_NAME = {"compress": 47, "verify": 47, "analyze": 47, "decode": 47, "interactive": 53}
"""KubeRay refuses longer ones: it appends to them what names pods and services."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_MEMORY = re.compile(r"[1-9][0-9]{0,5}(Mi|Gi)\Z")
_IMAGE = re.compile(
    r"(?P<name>[a-z0-9]([a-z0-9._/-]|:[0-9]+/)*[a-z0-9])"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@sha256:(?P<digest>[0-9a-f]{64}))?\Z"
)
_TASK = re.compile(r"[a-z][a-z0-9-]*\Z|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
_CREDENTIAL = re.compile(
    r"(secret|token|passw|credential|signature|access.?key|[?&]sig)[^=]*=", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """How many pods a group of workers may have."""

    minimum: int = 0
    maximum: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum:
            raise ManifestError("workers", f"{self.minimum}:{self.maximum}", "0 <= MIN <= MAX")

    @classmethod
    def parse(cls, name: str, text: str) -> "Replicas":
        """``"2:8"`` or ``"4"``, which is ``"4:4"``."""
        match = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text, re.ASCII)
        if match is None:
            raise ManifestError(name, text, "N or MIN:MAX")
        minimum, maximum = int(match[1]), int(match[2] or match[1])
        if minimum > maximum:
            raise ManifestError(name, text, "MIN <= MAX")
        return cls(minimum=minimum, maximum=maximum)

    @property
    def is_elastic(self) -> bool:
        """Whether there is anything to scale."""
        return self.minimum < self.maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class PodSize:
    """CPUs and memory of a Ray container: what it asks for and what it is held to."""

    cpus: int
    memory: str
    """As Kubernetes writes it: ``16Gi``, ``900Mi``."""

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ManifestError("cpus", self.cpus, "at least 1")
        if not _MEMORY.match(self.memory):
            raise ManifestError("memory", self.memory, "a number and Mi or Gi")

    def resources(self, gpus: int = 0) -> dict[str, Any]:
        """Requests and limits, equal: such pods are the last to be evicted, and OOM is theirs."""
        amounts: dict[str, Any] = {"cpu": self.cpus, "memory": self.memory}
        if gpus:
            amounts["nvidia.com/gpu"] = gpus
        return {"requests": amounts, "limits": amounts}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobOptions:
    """A job and where it runs.

    Raises:
        ManifestError: the message says which value, and what is wanted.
    """

    job: Literal["compress", "verify", "analyze", "decode", "interactive"]
    name: str
    """Of the job and, with endings, of everything that goes with it."""

    namespace: str
    image: str
    """With a tag other than ``latest``, or better a digest."""

    archive: str = ""
    sources: Sequence[str] = ()
    """Of compress."""

    task: str | None = None
    """Of analyze: as ``dicmh analyze`` names it."""

    target: str | None = None
    """Of decode: where the pictures go."""

    arguments: Sequence[str] = ()
    """Further ones of the script in jobs/, as they are."""

    gpu_workers: Replicas = field(default_factory=Replicas)
    """One GPU each."""

    cpu_workers: Replicas = field(default_factory=Replicas)
    head: PodSize = field(default_factory=lambda: PodSize(cpus=2, memory="8Gi"))
    gpu_worker: PodSize = field(default_factory=lambda: PodSize(cpus=6, memory="24Gi"))
    cpu_worker: PodSize = field(default_factory=lambda: PodSize(cpus=8, memory="16Gi"))
    queue: str | None = None
    """LocalQueue of Kueue, in the same namespace."""

    priority: str | None = None
    """WorkloadPriorityClass of Kueue."""

    spot: Literal["never", "prefer", "require"] = "never"
    """Whether workers go to machines that may be taken away; the head never does on purpose."""

    secret: str | None = None
    """Secret whose entries become environment variables, e.g. AWS_ACCESS_KEY_ID."""

    service_account: str | None = None
    """An existing one, bound to an identity of the cloud (workload identity)."""

    operator_namespace: str = "kuberay-system"
    """Where KubeRay runs: it asks the head how the job is."""

    store_port: int = 443
    """TCP port of the object store."""

    retries: int = 3
    """New clusters for a job that failed; each resumes."""

    deadline_hours: int = 72
    """After so long an attempt ends the job as failed; what is committed stays."""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_workers()
        self._check_addresses()

    def _check_names(self) -> None:
        longest = MAX_NAME[self.job]
        _check(
            "name",
            self.name,
            bool(_LABEL.match(self.name)) and self.name[0].isalpha() and len(self.name) <= longest,
            f"lower-case letters, digits and -, a letter first, at most {longest} (RFC 1035)",
        )
        for name, value in (
            ("namespace", self.namespace),
            ("operator namespace", self.operator_namespace),
        ):
            _check(
                name,
                value,
                bool(_LABEL.match(value)) and len(value) <= 63,
                "lower-case letters, digits and -, at most 63 (an RFC 1123 label)",
            )
        for name, optional, longest in (
            ("secret", self.secret, 253),
            ("service account", self.service_account, 253),
            ("queue", self.queue, 63),  # they are values of labels
            ("priority", self.priority, 63),
        ):
            _check(
                name,
                optional,
                optional is None or (len(optional) <= longest and bool(_SUBDOMAIN.match(optional))),
                f"lower-case letters, digits, - and ., at most {longest} (RFC 1123)",
            )
        if self.priority is not None and self.queue is None:
            raise ManifestError("priority", self.priority, "a queue with it: it is Kueue's")
        match = _IMAGE.match(self.image)
        pinned = match is not None and (match["digest"] or match["tag"] not in (None, "latest"))
        _check("image", self.image, bool(pinned), "NAME:TAG (not latest) or NAME@sha256:DIGEST")

    def _check_numbers(self) -> None:
        _check("store port", self.store_port, 0 < self.store_port < 2**16, "1 to 65535")
        _check("retries", self.retries, 0 <= self.retries <= 100, "0 to 100")
        _check("hours", self.deadline_hours, 0 < self.deadline_hours <= 8760, "1 to 8760")

    def _check_workers(self) -> None:
        if self.job == "verify":
            wanted = "none: verification runs on the head, see --head-cpus"
            _check("GPU workers", self.gpu_workers.maximum, not self.gpu_workers.maximum, wanted)
            _check("CPU workers", self.cpu_workers.maximum, not self.cpu_workers.maximum, wanted)
        elif self.job != "interactive":
            # The job asks the cluster at its start whether there are GPUs, and how many CPUs.
            if self.job == "decode":
                wanted = "N:N: it takes the machines that are there when it starts"
                _check("workers", "MIN:MAX", not self.is_elastic, wanted)
            if self.job != "compress" and self.gpu_workers.maximum:
                wanted = "none beside GPUs: only compress has readers"
                _check(
                    "CPU workers", self.cpu_workers.maximum, not self.cpu_workers.maximum, wanted
                )
            if self.gpu_workers.maximum:
                _check("fewest GPU workers", self.gpu_workers.minimum, self._has_gpu, "at least 1")
            else:
                count = self.cpu_workers.minimum
                _check("fewest CPU workers", count, count > 0, "at least 1 where no GPU is")
        else:
            count = self.gpu_workers.maximum + self.cpu_workers.maximum
            _check("workers", count, count > 0, "at least 1 of either kind")

    def _check_addresses(self) -> None:
        if self.job == "interactive":
            for name, given in (
                ("archive", self.archive),
                ("source", self.sources),
                ("arguments", self.arguments),
                ("task", self.task),
                ("target", self.target),
            ):
                _check(name, given, not given, "none: an interactive cluster runs no script")
            return
        _check_address("archive", self.archive)
        if self.job == "compress":
            _check("source", list(self.sources), bool(self.sources), "at least one")
            for source in self.sources:
                _check_address("source", source)
        else:
            wanted = f"none: {self.job} reads the archive"
            _check("source", list(self.sources), not self.sources, wanted)
        is_wanted = self.job == "analyze"
        _check(
            "task", self.task, bool(self.task) == is_wanted, "one for analyze, and for nothing else"
        )
        if self.task:
            _check_text("task", self.task)
            _check(
                "task", self.task, bool(_TASK.match(self.task)), "a name or package.module:Class"
            )
        is_wanted = self.job == "decode"
        wanted = "a URL for decode, and none for anything else"
        _check("target", self.target, bool(self.target) == is_wanted, wanted)
        if self.target:
            _check_address("target", self.target)
        for argument in self.arguments:
            _check_text("argument", argument)

    @property
    def _has_gpu(self) -> bool:
        return self.gpu_workers.minimum > 0

    @property
    def is_elastic(self) -> bool:
        """Whether Ray's autoscaler has something to do."""
        return self.gpu_workers.is_elastic or self.cpu_workers.is_elastic

    @property
    def labels(self) -> dict[str, str]:
        """On every object and pod; what policies select by."""
        return {"app.kubernetes.io/part-of": "dicmh", "app.kubernetes.io/instance": self.name}


def _check(name: str, found: object, is_good: bool, wanted: str) -> None:
    if not is_good:
        raise ManifestError(name, found, wanted)


def _check_text(name: str, text: str) -> None:
    """Text that fits a manifest and carries no credential. The message must not repeat one."""
    if _CREDENTIAL.search(text):
        raise ManifestError(name, "(hidden)", "no credential in it: put it in a Secret")
    _check(name, text, text.isprintable(), "printable characters")


def _check_address(name: str, address: str) -> None:
    _check_text(name, address)
    scheme, mark, rest = address.partition("://")
    has_scheme = bool(mark and rest and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme))
    _check(name, address, has_scheme and scheme not in ("file", "memory"), "a URL: s3://, gs://, …")
    try:
        has_user = "@" in urlsplit(address).netloc
    except ValueError as exc:
        raise ManifestError(name, address, "a URL") from exc
    # Azure's container@account is an address; everything else before an @ is a user.
    if has_user and (scheme not in ("abfs", "abfss") or ":" in urlsplit(address).netloc):
        raise ManifestError(name, "(hidden)", "no user or password in it: put them in a Secret")
