"""What is rendered, and kustomize as far as the overlays use it.

No cluster and no kustomize are needed: the resolver below does what they would.
"""

import copy
import functools
import itertools
import random
from pathlib import Path

from typer.testing import CliRunner

from dicmh_ray.cli import app
from dicmh_ray.cli.job_options import JobOptions, Replicas
from dicmh_ray.cli.manifests import manifests
from dicmh_ray.cli.yaml_text import without_notes, yaml_documents
from jobs import analyze_collection, compress_collection, decode_views, verify_archive
from tests.kubernetes.schemas import read_documents

ROOT = Path(verify_archive.__file__).parents[1]
K8S = ROOT / "k8s"

JOBS = {
    "compress": compress_collection,
    "verify": verify_archive,
    "analyze": analyze_collection,
    "decode": decode_views,
}

IMAGE = "registry.example/dicmh"
BASES = {
    "compress": [
        *("--image", f"{IMAGE}:0.1.0-cuda"),
        *("--source", "s3://example-photos/{000000..000099}.tar"),
        *("--archive", "s3://example-archives/photos"),
        *("--gpu-workers", "1:8", "--cpu-workers", "0:4", "--secret", "dicmh-store"),
    ],
    "verify": [
        *("--job", "verify", "--image", f"{IMAGE}:0.1.0-cpu"),
        *("--archive", "s3://example-archives/photos", "--secret", "dicmh-store"),
        *("--head-cpus", "4", "--retries", "1", "--hours", "24"),
    ],
    "analyze": [
        *("--job", "analyze", "--image", f"{IMAGE}:0.1.0-cpu"),
        *("--archive", "s3://example-archives/photos", "--task", "classify"),
        *("--cpu-workers", "1:8", "--secret", "dicmh-store"),
        *("--", "--net", "s3://example-nets/classifier.onnx"),
    ],
    "decode": [
        *("--job", "decode", "--image", f"{IMAGE}:0.1.0-cpu"),
        *("--archive", "s3://example-archives/photos", "--target", "s3://example-pictures/photos"),
        *("--cpu-workers", "4", "--secret", "dicmh-store"),
    ],
    "interactive": [
        *("--job", "interactive", "--image", f"{IMAGE}:0.1.0-cuda"),
        *("--gpu-workers", "0:2", "--cpu-workers", "1:4", "--secret", "dicmh-store"),
    ],
}
"""The flags that make k8s/base, as in docs/kubernetes.md."""

OVERLAYS = {
    "queued-spot": [
        *("--image", "registry.example/photos/dicmh:0.1.0-cuda"),
        *("--source", "s3://photos/2026/{000000..049999}.tar"),
        *("--archive", "s3://archives/photos-2026", "--namespace", "photos"),
        *("--gpu-workers", "1:16", "--cpu-workers", "0:4", "--secret", "dicmh-store"),
        *("--queue", "photos", "--priority", "bulk", "--spot", "prefer"),
        *("--", "--tag-field", "cls"),
    ],
    "cpu-only": [
        *("--image", f"{IMAGE}:0.1.0-cpu"),
        *("--source", "s3://example-photos/{000000..000099}.tar"),
        *("--archive", "s3://example-archives/photos", "--namespace", "photos"),
        *("--cpu-workers", "2:16", "--secret", "dicmh-store"),
    ],
}
"""The flags that give what each overlay gives."""

KUSTOMIZATIONS = sorted(path.parent for path in K8S.rglob("kustomization.yaml"))
BUILDABLE = [folder for folder in KUSTOMIZATIONS if "components" not in folder.parts]


def name_of(folder):
    return folder.relative_to(K8S).as_posix()


def options(**changes):
    """A sound compress job."""
    job = {
        "job": "compress",
        "name": "photos",
        "namespace": "team",
        "image": f"{IMAGE}:1.0-cuda",
        "archive": "s3://bucket/archive",
        "sources": ["s3://bucket/{000..099}.tar"],
        "gpu_workers": Replicas(minimum=1, maximum=4),
    }
    if changes.get("job", "compress") != "compress":
        job["sources"] = []
    if changes.get("job") == "verify":
        job["gpu_workers"] = Replicas()
    if changes.get("job") == "analyze":
        job["task"] = "classify"
    if changes.get("job") == "decode":
        job |= {"target": "s3://bucket/out", "gpu_workers": Replicas(minimum=2, maximum=2)}
    if changes.get("job") == "interactive":
        job["archive"] = ""
    return JobOptions(**{**job, **changes})


def objects(job_options):
    """What is rendered, as a parser reads it."""
    files = manifests(job_options)
    return [one for file in files.values() for one in read_documents(yaml_documents(file))]


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["k8s", "render", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def by_name(found):
    """Objects by what identifies them."""
    out = {
        (one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]): one
        for one in found
    }
    assert len(out) == len(found), "an object is given twice"
    return out


def build(folder):
    """The objects of a kustomization: resources, components, JSON patches, images, namespace."""
    found = []
    for resource in read_kustomization(folder).get("resources", ()):
        path = folder / resource
        assert path.exists(), f"{name_of(folder)} names {resource}"
        found += build(path.resolve()) if path.is_dir() else read_documents(path.read_text())
    for component in read_kustomization(folder).get("components", ()):
        transform(folder / component, found, "Component")
    transform(folder, found, "Kustomization")
    return found


def read_kustomization(folder):
    (kustomization,) = read_documents((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "namespace"}
    assert set(kustomization) <= known
    return kustomization


def transform(folder, found, kind):
    kustomization = read_kustomization(folder)
    version = {"Component": "v1alpha1", "Kustomization": "v1beta1"}[kind]
    assert kustomization["apiVersion"] == f"kustomize.config.k8s.io/{version}"
    assert kustomization["kind"] == kind
    for patch in kustomization.get("patches", ()):
        (operations,) = read_documents((folder / patch["path"]).read_text())
        targets = [one for one in found if is_target(one, patch["target"])]
        assert targets, f"a patch of {name_of(folder)} meets nothing"
        for target in targets:
            for operation in operations:
                apply(target, operation)
    for image in kustomization.get("images", ()):
        for container in containers(found):
            name, _, tag = container["image"].rpartition(":")
            if name == image["name"]:
                name = image.get("newName", name)
                container["image"] = f"{name}:{image.get('newTag', tag)}"
    if "namespace" in kustomization:
        for one in found:
            one["metadata"]["namespace"] = kustomization["namespace"]


def is_target(one, target):
    group, _, version = one["apiVersion"].rpartition("/")
    facts = {"group": group, "version": version, "kind": one["kind"], **one["metadata"]}
    return all(facts[key] == value for key, value in target.items())


def apply(document, operation):
    """One operation of RFC 6902."""
    *way, last = [
        step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")[1:]
    ]
    parent = document
    for step in way:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    op, value = operation["op"], copy.deepcopy(operation.get("value"))
    if isinstance(parent, list):
        assert op in ("test", "remove") or (op, last) == ("add", "-")
        if op == "add":
            parent.append(value)
        elif op == "remove":
            del parent[int(last)]
        else:
            assert parent[int(last)] == value
    elif op == "add":
        parent[last] = value
    elif op == "replace":
        assert last in parent, operation
        parent[last] = value
    elif op == "test":
        assert parent[last] == value, operation
    else:
        raise AssertionError(op)


def containers(found):
    """Every container, wherever it is."""
    if isinstance(found, list):
        for one in found:
            yield from containers(one)
    elif isinstance(found, dict):
        for key, value in found.items():
            if key in ("containers", "initContainers"):
                yield from value
            yield from containers(value)


@functools.cache
def every_rendering():
    """(options, objects) of every kind of job, size and queue, the other choices by chance."""
    kinds = ["compress", "verify", "interactive", "analyze", "decode"]
    sizes = [("1:4", "0:2"), ("2:2", "0:0"), ("0:0", "2:8"), ("0:0", "3:3")]
    chance = random.Random(1)
    renderings = []
    for job, (gpus, cpus), queue in itertools.product(kinds, sizes, (None, "batch")):
        if job == "verify":
            gpus = cpus = "0"
        if job in ("analyze", "decode") and gpus != "0:0":
            cpus = "0"
        if job == "decode":
            gpus, cpus = gpus[-1], cpus[-1]
        spot = chance.choice(["never", "prefer", "require"])
        secret, account = chance.choice([None, "store"]), chance.choice([None, "cloud-identity"])
        job_options = options(
            job=job,
            gpu_workers=Replicas.parse("", gpus),
            cpu_workers=Replicas.parse("", cpus),
            queue=queue,
            priority="bulk" if queue else None,
            spot=spot,
            secret=secret,
            service_account=account,
        )
        files = manifests(job_options).values()
        renderings.append((job_options, [without_notes(one) for file in files for one in file]))
    return renderings
