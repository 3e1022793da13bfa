"""Kubernetes objects of a job: KubeRay's RayJob or RayCluster, and what stands around it.

    JobOptions ──> accounts, network policies, disruption budget of the head ─┐
               └─> RayJob (the others) or RayCluster (interactive) ─────┴─> manifests by file

``k8s/base`` holds exactly what this module makes of plain options; a test compares them. What is
said here about KubeRay and Kueue was read in the sources of KubeRay 1.7 and Kueue 0.19.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from dicmh_ray.cli.job_options import JobOptions, PodSize, Replicas
from dicmh_ray.cli.yaml_text import Noted

RAY_VERSION = "2.60.0"
"""That of requirements/constraints.txt, from which the images are made."""

SCRIPTS = {
    "compress": "compress_collection.py",
    "verify": "verify_archive.py",
    "analyze": "analyze_collection.py",
    "decode": "decode_views.py",
}
"""In jobs/, by the kind of job."""

JOBS_FOLDER = "/opt/dicmh/jobs"
"""Where k8s/docker/Dockerfile puts the scripts."""

USER_ID = 1000
"""The user of the images."""

OBJECT_STORE_BYTES = 2 * 2**30
SHARED_MEMORY = "2304Mi"
"""The object store and a reserve: Ray falls back to the disk where /dev/shm is smaller."""

GRACE_S = 120
"""The longest notice a big cloud gives before it takes a spot machine away."""

DRAIN_S = 90
"""Of it, for what a worker has begun; the rest is for Ray to leave."""

SPOT_LABELS: Mapping[str, str] = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""How clouds and node provisioners mark machines that they may take away."""

SPOT_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
"""Taints that clouds put on them by themselves; ``value`` is that of the label."""


def entrypoint(options: JobOptions) -> str:
    """The command of the job, as KubeRay passes it on.

    KubeRay pastes it into the script of the submitter's container; there the kubelet replaces
    ``$(NAME)`` and halves ``$$``, then bash takes off one layer of quotes. ``ray job submit`` puts
    them back for the shell of the head. So: quoted once, and every dollar sign doubled.
    """
    words = ["python", f"{JOBS_FOLDER}/{SCRIPTS[options.job]}", *options.sources, options.archive]
    if options.target is not None:
        words.append(options.target)
    if options.task is not None:
        words += ["--task", options.task]
    if options.job != "verify":
        words += ["--ray-address", "auto"]
        if options.is_elastic:
            words += ["--workers", str(_most_actors(options))]
    if options.job == "decode" and options.gpu_workers.maximum:
        words += ["--num-gpus", "1"]
    return shlex.join([*words, *options.arguments]).replace("$", "$$")


def _most_actors(options: JobOptions) -> int:
    """Actors when everything is there. Those that wait are what makes Ray ask for more machines."""
    if options.gpu_workers.maximum:
        return options.gpu_workers.maximum
    return options.cpu_workers.maximum * options.cpu_worker.cpus


def manifests(options: JobOptions) -> dict[str, list[dict[str, Any]]]:
    """The objects by file name, in the order in which they are applied."""
    files: dict[str, list[dict[str, Any]]] = {}
    if options.service_account is None:
        files["service-accounts.yaml"] = _service_accounts(options)
    files["network-policies.yaml"] = _network_policies(options)
    if options.job != "verify":
        files["pod-disruption-budget.yaml"] = [_disruption_budget(options)]
    if options.job == "interactive":
        files["ray-cluster.yaml"] = [_ray_cluster(options)]
    else:
        files["ray-job.yaml"] = [_ray_job(options)]
    return files


def kustomization(options: JobOptions) -> dict[str, Any]:
    """What ``kubectl apply -k`` reads in the folder of the files."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(manifests(options)),
    }


def _metadata(options: JobOptions, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": options.namespace, "labels": options.labels}


def _head_account(options: JobOptions) -> str:
    return options.service_account or f"{options.name}-head"


def _worker_account(options: JobOptions) -> str:
    return options.service_account or f"{options.name}-worker"


def _service_accounts(options: JobOptions) -> list[dict[str, Any]]:
    accounts: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": _metadata(options, _worker_account(options)),
            "automountServiceAccountToken": Noted(False, "Workers never talk to Kubernetes."),
        }
    ]
    head: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(options, _head_account(options)),
        "automountServiceAccountToken": Noted(
            False,
            "The pod asks for the token where the autoscaler needs it. KubeRay binds this account\n"
            "to a Role of its own: get, list, watch, patch pods; get, patch the RayCluster.",
        ),
    }
    return [head, *accounts]


def _network_policies(options: JobOptions) -> list[dict[str, Any]]:
    everything = {"matchLabels": options.labels}
    nodes = {"matchLabels": {**options.labels, "ray.io/is-ray-node": "yes"}}
    head = {"matchLabels": {**options.labels, "ray.io/node-type": "head"}}
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    store = [{"protocol": "TCP", "port": options.store_port}]
    egress: list[dict[str, Any]] = [{"ports": store}]
    if options.service_account is not None:
        egress.append(_metadata_service())

    def policy(ending: str, spec: dict[str, Any]) -> dict[str, Any]:
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": _metadata(options, f"{options.name}-{ending}"),
            "spec": spec,
        }

    operator = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}
        }
    }
    policies = [
        policy("deny", {"podSelector": everything, "policyTypes": ["Ingress", "Egress"]}),
        policy(
            "ray",
            {
                "podSelector": Noted(
                    everything,
                    "Ray's processes listen on ports they choose: all, among this job's own pods.",
                ),
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [{"podSelector": everything}]}],
                "egress": [{"to": [{"podSelector": everything}]}, {"ports": dns}],
            },
        ),
        policy(
            "store",
            {
                "podSelector": Noted(
                    nodes,
                    "The object store, whose addresses change. A site that knows them, or has an\n"
                    "egress gateway, should say so here.",
                ),
                "policyTypes": ["Egress"],
                "egress": egress,
            },
        ),
        policy(
            "operator",
            {
                "podSelector": Noted(head, "KubeRay asks the dashboard how the job is."),
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [operator], "ports": [{"protocol": "TCP", "port": 8265}]}],
            },
        ),
    ]
    if options.is_elastic:
        api_server = [{"protocol": "TCP", "port": port} for port in (443, 6443)]
        policies.append(
            policy(
                "autoscaler",
                {
                    "podSelector": Noted(
                        head, "The autoscaler, beside the head, talks to the API server."
                    ),
                    "policyTypes": ["Egress"],
                    "egress": [{"ports": api_server}],
                },
            )
        )
    return policies


def _metadata_service() -> dict[str, Any]:
    """Where clouds hand out the credentials of a workload identity."""
    addresses = ("169.254.169.254/32", "169.254.169.252/32", "169.254.170.23/32")
    return {
        "to": [{"ipBlock": {"cidr": address}} for address in addresses],
        "ports": [{"protocol": "TCP", "port": port} for port in (80, 988)],
    }


def _disruption_budget(options: JobOptions) -> dict[str, Any]:
    selector = {**options.labels, "ray.io/node-type": "head"}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(options, f"{options.name}-head"),
        "spec": {
            "minAvailable": Noted(
                1,
                "Losing the head costs a new cluster; losing workers costs their unfinished units.\n"
                "To drain its node all the same, delete this budget: the job resumes.\n"
                "(Only minAvailable counts for pods whose owner cannot be scaled.)",
            ),
            "selector": {"matchLabels": selector},
        },
    }


def _ray_job(options: JobOptions) -> dict[str, Any]:
    metadata = _metadata(options, options.name)
    if options.queue is not None:
        metadata["labels"] = _queued(options)
        if options.is_elastic:
            metadata["annotations"] = _ELASTIC
    spec: dict[str, Any] = {
        "entrypoint": entrypoint(options),
        "suspend": Noted(
            options.queue is not None,
            "Kueue starts and stops a queued job by this field. Without a queue, true stops it:\n"
            "the cluster goes, what is committed stays, false resumes.",
        ),
        "backoffLimit": Noted(
            options.retries,
            "A retry is a new cluster with the same command: it goes on behind the last commit.",
        ),
        "activeDeadlineSeconds": options.deadline_hours * 3600,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": Noted(600, "Time to look at the dashboard."),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": 4},
        "submitterPodTemplate": _submitter(options),
        "rayClusterSpec": _cluster_spec(options),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _ray_cluster(options: JobOptions) -> dict[str, Any]:
    metadata = _metadata(options, options.name)
    spec = _cluster_spec(options)
    if options.queue is not None:
        metadata["labels"] = _queued(options)
        if options.is_elastic:
            metadata["annotations"] = _ELASTIC
        spec = {"suspend": Noted(True, "Kueue starts it."), **spec}
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}


_ELASTIC = {"kueue.x-k8s.io/elastic-job": "true"}
"""Kueue takes part in Ray's scaling: feature gate ElasticJobsViaWorkloadSlices, on since 0.18."""


def _queued(options: JobOptions) -> dict[str, str]:
    labels = {**options.labels, "kueue.x-k8s.io/queue-name": options.queue or ""}
    if options.priority is not None:
        labels["kueue.x-k8s.io/priority-class"] = options.priority
    return labels


_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}

_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _submitter(options: JobOptions) -> dict[str, Any]:
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": PodSize(cpus=1, memory="1Gi").resources(),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "metadata": {"labels": options.labels},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": _worker_account(options),
            "automountServiceAccountToken": False,
            "securityContext": _POD_SECURITY,
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        },
    }


def _cluster_spec(options: JobOptions) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "authOptions": Noted(
            {"mode": "token"},
            "KubeRay makes a token for each cluster; nobody without it can run code there.",
        ),
    }
    if options.is_elastic:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 120,
            "resources": PodSize(cpus=1, memory="1Gi").resources(),
            "securityContext": _CONTAINER_SECURITY,
            "env": [{"name": "HOME", "value": "/tmp"}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    spec["headGroupSpec"] = _head_group(options)
    groups = []
    if options.gpu_workers.maximum:
        groups.append(_worker_group(options, "encode-gpu", options.gpu_workers, gpus=1))
    if options.cpu_workers.maximum:
        groups.append(_worker_group(options, "io-cpu", options.cpu_workers, gpus=0))
    if groups:
        spec["workerGroupSpecs"] = groups
    return spec


def _head_group(options: JobOptions) -> dict[str, Any]:
    container = _ray_container(options, "ray-head", options.head, drain_s=0)
    container["ports"] = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
        {"name": "metrics", "containerPort": 8080},
    ]
    pod = _ray_pod(options, container, account=_head_account(options))
    pod["automountServiceAccountToken"] = options.is_elastic
    pod["terminationGracePeriodSeconds"] = 30
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    return {
        "rayStartParams": {
            "num-cpus": Noted("0", "The driver runs here; encoding must not."),
            "dashboard-host": "0.0.0.0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
        "template": {
            "metadata": {"labels": options.labels, "annotations": annotations},
            "spec": pod,
        },
    }


def _worker_group(
    options: JobOptions, name: str, replicas: Replicas, *, gpus: int
) -> dict[str, Any]:
    size = options.gpu_worker if gpus else options.cpu_worker
    container = _ray_container(options, "ray-worker", size, drain_s=DRAIN_S, gpus=gpus)
    pod = _ray_pod(options, container, account=_worker_account(options))
    pod["automountServiceAccountToken"] = False
    pod["terminationGracePeriodSeconds"] = Noted(
        GRACE_S,
        f"On notice the node takes no new work and has {DRAIN_S} s for what it has begun. Units that\n"
        "are not committed by then run again elsewhere.",
    )
    tolerations: list[dict[str, Any]] = []
    if gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if options.spot != "never":
        tolerations += [
            {"key": key, "operator": "Equal", "value": SPOT_LABELS[key], "effect": "NoSchedule"}
            for key in SPOT_TAINTS
        ]
        pod["affinity"] = {"nodeAffinity": _spot_affinity(options.spot)}
    if tolerations:
        pod["tolerations"] = tolerations
    return {
        "groupName": name,
        "replicas": replicas.minimum,
        "minReplicas": replicas.minimum,
        "maxReplicas": replicas.maximum,
        "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
        "template": {"metadata": {"labels": options.labels}, "spec": pod},
    }


def _spot_affinity(spot: str) -> dict[str, Any]:
    """Any one of the marks will do: terms are alternatives."""
    terms = [
        {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
        for key, value in SPOT_LABELS.items()
    ]
    if spot == "require":
        return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    return {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "preference": term} for term in terms
        ]
    }


def _ray_container(
    options: JobOptions, name: str, size: PodSize, *, drain_s: int, gpus: int = 0
) -> dict[str, Any]:
    env = {
        "HOME": "/tmp",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(drain_s),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    container: dict[str, Any] = {
        "name": name,
        "image": options.image,
        "env": [{"name": key, "value": value} for key, value in env.items()],
    }
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return {
        **container,
        "resources": size.resources(gpus),
        "securityContext": _CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def _ray_pod(options: JobOptions, container: dict[str, Any], *, account: str) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "serviceAccountName": account,
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
            {
                "name": "shm",
                "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY},
            },
        ],
    }
