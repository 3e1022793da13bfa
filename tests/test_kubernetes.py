"""Manifests: valid by the official schemas, drawn from one source, quoted right, free of secrets.

No cluster and no kustomize are needed: a small resolver below does what the overlays use. Where
``kubectl`` is installed, its kustomize must agree with it.
"""

import copy
import functools
import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dicmh_ray.archive import verify as verify_module
from dicmh_ray.cli import app
from dicmh_ray.cli.job_options import JobOptions, PodSize, Replicas
from dicmh_ray.cli.kubernetes import rendered
from dicmh_ray.cli.manifests import (
    DRAIN_S,
    GRACE_S,
    JOBS_FOLDER,
    RAY_VERSION,
    SCRIPTS,
    USER_ID,
    entrypoint,
    manifests,
)
from dicmh_ray.cli.yaml_text import Noted, without_notes, yaml_documents
from dicmh_ray.errors import ManifestError
from dicmh_ray.pipeline.stopping import GRACE_S as DRIVER_GRACE_S
from jobs import analyze_collection, compress_collection, decode_views, verify_archive
from tests.kubernetes_schemas import (
    faults_by_controllers,
    faults_by_schema,
    faults_of_core_kind,
    read_crds,
    read_documents,
)

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


# ---------------------------------------------------------------- kustomize, as far as it is used


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


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=name_of)
def test_a_kustomization_names_files_that_exist(folder):
    kustomization = read_kustomization(folder)
    for name in [*kustomization.get("resources", ()), *kustomization.get("components", ())]:
        path = folder / name
        assert path.is_file() or (path / "kustomization.yaml").is_file(), name
    for patch in kustomization.get("patches", ()):
        assert (folder / patch["path"]).is_file()


def test_every_file_of_k8s_belongs_to_a_kustomization():
    named = {folder / "kustomization.yaml" for folder in KUSTOMIZATIONS}
    for folder in KUSTOMIZATIONS:
        kustomization = read_kustomization(folder)
        named |= {(folder / name).resolve() for name in kustomization.get("resources", ())}
        named |= {folder / patch["path"] for patch in kustomization.get("patches", ())}
    assert set(K8S.rglob("*.yaml")) == {path for path in named if path.is_file()}


@pytest.mark.parametrize("folder", BUILDABLE, ids=name_of)
def test_the_resolver_and_kubectl_build_the_same(folder):
    found = by_name(build(folder))
    kubectl = shutil.which("kubectl")
    if kubectl:
        result = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True
        )
        assert by_name(read_documents(result.stdout)) == found


# ------------------------------------------------------------------- one source for all manifests


@pytest.mark.parametrize("name", BASES)
def test_the_base_is_what_render_writes_to_the_byte(name, tmp_path):
    invoke("-o", tmp_path / "out", *BASES[name])
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written == {path.name: path.read_text() for path in (K8S / "base" / name).iterdir()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_gives_what_the_same_flags_give(name):
    expected = read_documents(invoke(*OVERLAYS[name]).stdout)
    found = build(K8S / "overlays" / name)
    for one in found + expected:
        if one["kind"] == "RayJob":
            # The order of a script's options is nobody's business; that of words in quotes is.
            one["spec"]["entrypoint"] = sorted(shlex.split(one["spec"]["entrypoint"]))
    assert by_name(found) == by_name(expected)


def test_a_rendered_folder_builds_to_the_rendered_stream(tmp_path):
    flags = BASES["compress"]
    invoke(*flags, "-o", tmp_path)
    assert by_name(build(tmp_path)) == by_name(read_documents(invoke(*flags).stdout))


# ------------------------------------------------------------------------------------- validation


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


def faults(one, crds=None):
    core = faults_of_core_kind(one)
    if core is not None:
        return core
    by_schema = [] if crds is None else faults_by_schema(one, crds)
    return by_schema or faults_by_controllers(one)  # which rely on what schemas promise


@pytest.fixture(scope="session")
def crds(dicmh_data):
    folder = dicmh_data / "k8s-crds"
    if not folder.is_dir():
        pytest.skip("DICMH_DATA has no k8s-crds")
    return read_crds(folder)


@pytest.mark.parametrize("folder", BUILDABLE, ids=name_of)
def test_a_manifest_obeys_the_official_schemas(folder, crds):
    for one in build(folder):
        assert faults(one, crds) == [], one["kind"]


def test_every_rendering_obeys_the_official_schemas(crds):
    seen = set()
    for _, found in every_rendering():
        for one in found:
            text = json.dumps(one, sort_keys=True)
            if text not in seen:
                seen.add(text)
                assert faults(one, crds) == [], text
    assert len(seen) > 25


def test_every_rendering_obeys_the_rules_that_need_no_schema():
    for _, found in every_rendering():
        for one in found:
            assert faults(one) == []


def ray_job():
    (job,) = [one for one in build(K8S / "overlays/queued-spot") if one["kind"] == "RayJob"]
    return job


BREAKS = {
    "an unknown field": ("/spec/backofLimit", 3),
    "an unknown field far inside": (
        "/spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/imagePullPolcy",
        "Always",
    ),
    "a wrong type": ("/spec/backoffLimit", "three"),
    "a truth value as text": ("/spec/suspend", "true"),
    "a number where text belongs": (
        "/spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus",
        0,
    ),
    "a list where a mapping belongs": ("/spec/rayClusterSpec/autoscalerOptions", []),
    "a value outside its list": ("/spec/rayClusterSpec/autoscalerOptions/version", "v3"),
    "an old version": ("/apiVersion", "ray.io/v1alpha1"),
    "a missing field": ("/spec/rayClusterSpec/workerGroupSpecs/0/groupName", None),
    "a label that is none": ("/metadata/labels/kueue.x-k8s.io~1queue-name", "not a queue"),
    "fewer than the fewest": ("/spec/rayClusterSpec/workerGroupSpecs/0/maxReplicas", 0),
    "a queued job that keeps its cluster": ("/spec/shutdownAfterJobFinishes", False),
    "autoscaling that Kueue does not know of": ("/metadata/annotations", {}),
    "a rule of CEL": ("/spec/managedBy", "somebody"),
    "no new field of an API server": ("/metadata/lables", {}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_job_is_refused(name, crds):
    path, value = BREAKS[name]
    job = ray_job()
    assert faults(job, crds) == []
    *way, last = [step.replace("~1", "/") for step in path.split("/")[1:]]
    parent = job
    for step in way:
        parent = parent[int(step)] if isinstance(parent, list) else parent[step]
    if value is None:
        del parent[last]
    else:
        parent[last] = value
    assert len(faults(job, crds)) >= 1


def test_a_broken_queue_is_refused(crds):
    found = build(K8S / "kueue")
    (queue,) = [one for one in found if one["kind"] == "ClusterQueue"]
    flavor = queue["spec"]["resourceGroups"][0]["flavors"][0]
    flavor["resources"].pop()
    assert any("size" in fault or "covered" in fault.lower() for fault in faults(queue, crds))
    flavor["resources"].append({"name": "nvidia.com/gpu", "nominalQuota": 0, "borrowingLimit": 1})
    assert faults(queue, crds) != []


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("NetworkPolicy", lambda one: one["spec"].update(podSelecter={})),
        ("NetworkPolicy", lambda one: one["spec"].update(policyTypes=["ingress"])),
        ("PodDisruptionBudget", lambda one: one["spec"].update(minAvailable="1")),
        ("ServiceAccount", lambda one: one.update(secrets=[])),
        ("ServiceAccount", lambda one: one["metadata"].update(name="Not_A_Name")),
    ],
)
def test_a_broken_core_object_is_refused(kind, spoil):
    one = next(one for one in objects(options()) if one["kind"] == kind)
    assert faults(one) == []
    spoil(one)
    assert faults(one) != []


def test_a_key_given_twice_is_refused():
    with pytest.raises(AssertionError, match="twice"):
        read_documents("a: 1\na: 2\n")


# ------------------------------------------------------------------------- what the manifests say


def pods(one):
    """(role, pod template) of a job or cluster."""
    spec = one["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster.get("workerGroupSpecs", ()):
        yield "worker", group["template"]


def ray_objects():
    for job_options, found in every_rendering():
        yield job_options, found[-1]


def test_no_pod_may_do_more_than_it_must():
    for job_options, one in ray_objects():
        cluster = one["spec"].get("rayClusterSpec", one["spec"])
        secured = [cluster["autoscalerOptions"]] if "autoscalerOptions" in cluster else []
        for role, template in pods(one):
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == USER_ID
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            needs_token = role == "head" and job_options.is_elastic
            assert pod["automountServiceAccountToken"] is needs_token
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
            assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])
            secured += pod["containers"]
        for container in secured:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_shared_memory_holds_the_object_store_and_fits_the_pod():
    for _, one in ray_objects():
        cluster = one["spec"].get("rayClusterSpec", one["spec"])
        for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())]:
            pod = group["template"]["spec"]
            (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
            assert shm["medium"] == "Memory"
            size = int(shm["sizeLimit"].removesuffix("Mi")) * 2**20
            assert int(group["rayStartParams"]["object-store-memory"]) < size
            memory = pod["containers"][0]["resources"]["limits"]["memory"]
            assert size < int(memory.removesuffix("Gi")) * 2**30
            mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
            assert mounts["shm"] == "/dev/shm"


def test_workers_have_time_to_leave_and_the_head_does_not_encode():
    for _, one in ray_objects():
        cluster = one["spec"].get("rayClusterSpec", one["spec"])
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for role, template in pods(one):
            if role != "submitter":
                env = {e["name"]: e["value"] for e in template["spec"]["containers"][0]["env"]}
                drain = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
                grace = template["spec"]["terminationGracePeriodSeconds"]
                assert drain == (DRAIN_S if role == "worker" else 0)
                assert drain < grace <= GRACE_S
                # What the engine gives a unit that runs, and some seconds to leave.
                assert grace >= DRIVER_GRACE_S + 5
                assert role == "head" or drain >= DRIVER_GRACE_S


def test_spot_machines_get_workers_and_nothing_else():
    for job_options, one in ray_objects():
        for role, template in pods(one):
            keys = {t["key"] for t in template["spec"].get("tolerations", ())}
            is_drawn = "affinity" in template["spec"]
            assert is_drawn == (role == "worker" and job_options.spot != "never")
            assert ("cloud.google.com/gke-spot" in keys) == is_drawn


def test_policies_and_budget_select_the_pods_they_are_for():
    for job_options, found in every_rendering():
        policies = {
            one["metadata"]["name"].removeprefix("photos-"): one
            for one in found
            if one["kind"] == "NetworkPolicy"
        }
        labels = {"head": {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}}
        labels["worker"] = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
        labels["submitter"] = {}
        for role, template in pods(found[-1]):
            carried = {**template["metadata"]["labels"], **labels[role]}.items()
            meets = {
                name
                for name, one in policies.items()
                if one["spec"]["podSelector"]["matchLabels"].items() <= carried
            }
            assert {"deny", "ray"} <= meets
            assert ("store" in meets) == (role != "submitter")
            assert ("operator" in meets) == (role == "head")
            assert ("autoscaler" in meets) == (role == "head" and job_options.is_elastic)
        deny = policies["deny"]["spec"]
        assert "ingress" not in deny
        assert "egress" not in deny
        budgets = [one for one in found if one["kind"] == "PodDisruptionBudget"]
        assert len(budgets) == (job_options.job != "verify")


def test_the_metadata_service_is_reachable_only_where_it_gives_the_credentials():
    for identity in (None, "cloud-identity"):
        text = json.dumps(objects(options(service_account=identity)))
        assert ("169.254.169.254/32" in text) == (identity is not None)


def test_accounts_that_pods_name_are_made_or_given():
    for job_options, one in ray_objects():
        made = {
            o["metadata"]["name"] for o in objects(job_options) if o["kind"] == "ServiceAccount"
        }
        named = {template["spec"]["serviceAccountName"] for _, template in pods(one)}
        given_one = job_options.service_account
        assert named == ({given_one} if given_one else made)


def test_store_credentials_come_by_reference_to_ray_and_to_nothing_else():
    for job_options, one in ray_objects():
        for role, template in pods(one):
            (container,) = template["spec"]["containers"]
            expected = job_options.secret is not None and role != "submitter"
            assert container.get("envFrom", []) == (
                [{"secretRef": {"name": "store"}}] if expected else []
            )
            assert {env["name"] for env in container["env"]} <= {
                "HOME",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
                "RAY_USAGE_STATS_ENABLED",
            }


def test_no_manifest_holds_a_secret():
    for folder in BUILDABLE:
        for one in build(folder):
            assert one["kind"] != "Secret"
    pattern = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret_?key)\s*[:=]")
    for path in [p for p in K8S.rglob("*") if p.is_file()]:
        assert not pattern.search(path.read_text()), path


def test_queued_jobs_wait_and_others_start():
    for job_options, one in ray_objects():
        labels = one["metadata"]["labels"]
        assert ("kueue.x-k8s.io/queue-name" in labels) == (job_options.queue is not None)
        assert bool(one["spec"].get("suspend")) == (job_options.queue is not None)


def test_a_job_cleans_up_ends_and_resumes():
    for job_options, one in ray_objects():
        if one["kind"] == "RayJob":
            spec = one["spec"]
            assert spec["shutdownAfterJobFinishes"] is True
            assert spec["ttlSecondsAfterFinished"] > 0
            assert spec["backoffLimit"] == job_options.retries
            assert spec["activeDeadlineSeconds"] == job_options.deadline_hours * 3600


# ------------------------------------------------------------------------------------- entrypoint


def as_the_script_sees_it(command, env):
    """Arguments after KubeRay's submitter (kubelet, bash), ``ray job submit`` and the head's shell."""

    def expand(match):  # the kubelet, in args of containers
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    command = re.sub(r"\$\$|\$\(([^)]*)\)", expand, command)
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    submitted = subprocess.run(
        ["/bin/bash", "-ce", "--", f"{show} {command} ;"],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    joined = shlex.join(json.loads(submitted.stdout))
    run = subprocess.run(
        f"{show} {joined}", shell=True, capture_output=True, text=True, check=True, env=env
    )
    return json.loads(run.stdout)


NASTY = [
    "s3://bucket/{000..099}.tar",
    "s3://bucket/it's here/*.tar",
    's3://bucket/"quoted"/a.tar',
    "s3://bucket/$(rm -rf x)/`id`.tar",
    "s3://bucket/$HOME/$$/$(RAY_AUTH_TOKEN)/$$(HOME).tar",
    "s3://bucket/a;b&&c|d>e<f#g!h~i\\j",
    "s3://bucket/ü/日本/🙂.tar",
    "s3://bucket/a: b #c - d, [e] {f} %g @h",
    "s3://bucket/a=b?c",
]


@pytest.mark.parametrize("source", NASTY)
def test_an_address_reaches_the_script_as_it_was_given(source):
    job_options = options(sources=[source], archive=source, arguments=["--tag-field", "a $b 'c'"])
    (job,) = [one for one in objects(job_options) if one["kind"] == "RayJob"]
    env = {"HOME": "/root", "RAY_AUTH_TOKEN": "leaked", "PATH": "/usr/bin:/bin"}
    env["PYTHONIOENCODING"] = "utf-8"
    env["LC_ALL"] = "C.UTF-8"
    words = as_the_script_sees_it(job["spec"]["entrypoint"], env)
    assert words[:2] == ["python", f"{JOBS_FOLDER}/compress_collection.py"]
    parsed = compress_collection.parse(words[2:])
    assert parsed.sources == [source]
    assert parsed.archive == source
    assert parsed.tag_field == ["a $b 'c'"]
    assert parsed.ray_address == "auto"
    assert parsed.workers == 4


def test_the_scripts_of_the_image_take_what_is_rendered():
    parsed = parsed_as_job(entrypoint(options(job="verify", arguments=["--subset", "1/8"])))
    assert (parsed.archive, parsed.subset) == ("s3://bucket/archive", "1/8")
    net = ["--net", "s3://nets/a.onnx", "--states", "2"]
    parsed = parsed_as_job(entrypoint(options(job="analyze", arguments=net)))
    assert (parsed.archive, parsed.task, parsed.net) == (
        "s3://bucket/archive", "classify", "s3://nets/a.onnx"
    )  # fmt: skip
    assert (parsed.ray_address, parsed.workers, parsed.runtime) == ("auto", 4, "ray")
    parsed = parsed_as_job(entrypoint(options(job="decode", arguments=["--view", "thumbnail"])))
    assert (parsed.archive, parsed.output) == ("s3://bucket/archive", "s3://bucket/out")
    assert (parsed.ray_address, parsed.num_gpus, parsed.runtime) == ("auto", 1, "ray")
    found = [one for folder in BUILDABLE for one in build(folder)]
    found += [one for _, rendering in every_rendering() for one in rendering]
    entrypoints = {one["spec"]["entrypoint"] for one in found if one["kind"] == "RayJob"}
    assert {parsed_as_job(one).archive.partition("://")[0] for one in entrypoints} == {"s3"}


def parsed_as_job(command):
    """What the script makes of its words; argparse ends the test where it does not know one."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    kind = {script: kind for kind, script in SCRIPTS.items()}[
        script.removeprefix(f"{JOBS_FOLDER}/")
    ]
    return JOBS[kind].parse(words)


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers"),
    [("1:8", "0:4", "8"), ("4:4", "0:0", None), ("0:0", "2:8", "64"), ("0:0", "3:3", None)],
)
def test_an_elastic_job_asks_for_all_it_may_have(gpus, cpus, workers):
    words = shlex.split(
        entrypoint(
            options(gpu_workers=Replicas.parse("", gpus), cpu_workers=Replicas.parse("", cpus))
        )
    )
    assert (words[words.index("--workers") + 1] if "--workers" in words else None) == workers


# --------------------------------------------------------------------------------------- refusals

REFUSED = {
    "a name in capitals": {"name": "Photos"},
    "a name with an underscore": {"name": "my_photos"},
    "a name that starts with a digit": {"name": "2photos"},
    "a name that ends with a dash": {"name": "photos-"},
    "a name of 48": {"name": "a" * 48},
    "no name": {"name": ""},
    "a name with a line feed": {"name": "photos\n"},
    "a namespace with a dot": {"namespace": "a.b"},
    "a namespace of 64": {"namespace": "a" * 64},
    "an operator namespace": {"operator_namespace": "Kube"},
    "a queue with a slash": {"queue": "a/b"},
    "a queue too long for a label": {"queue": "a" * 64},
    "a secret with a space": {"secret": "my secret"},
    "a secret with a value": {"secret": "AWS_SECRET_ACCESS_KEY=abc"},
    "an account": {"service_account": "-a"},
    "a priority without a queue": {"priority": "bulk"},
    "an image without a tag": {"image": "registry.example/dicmh"},
    "an image with the tag latest": {"image": "registry.example/dicmh:latest"},
    "an image with a port and no tag": {"image": "registry.example:5000/dicmh"},
    "an image with a digest that is none": {"image": "registry.example/dicmh@sha256:abc"},
    "an image with a space": {"image": "registry.example/dicmh:1 0"},
    "no source": {"sources": []},
    "a relative source": {"sources": ["photos/"]},
    "a source on this machine": {"sources": ["/home/me/photos"]},
    "a file URL": {"sources": ["file:///photos"]},
    "an option as source": {"sources": ["--resume"]},
    "a relative archive": {"archive": "archive/"},
    "an archive that is no URL": {"archive": "s3://"},
    "a broken URL": {"archive": "s3://[bucket/a"},
    "a line feed in a source": {"sources": ["s3://a/b\nc"]},
    "a zero byte": {"sources": ["s3://a/b\0c"]},
    "half a character": {"sources": ["s3://a/\udcff"]},
    "no GPU at the start": {"gpu_workers": Replicas(minimum=0, maximum=4)},
    "no worker at all": {"gpu_workers": Replicas()},
    "workers that verify": {"job": "verify", "gpu_workers": Replicas(minimum=1, maximum=1)},
    "sources to verify": {"job": "verify", "sources": ["s3://a/b"]},
    "sources to analyze": {"job": "analyze", "sources": ["s3://a/b"]},
    "analyze without a task": {"job": "analyze", "task": None},
    "a task that is none": {"job": "analyze", "task": "--where"},
    "a task to compress": {"task": "classify"},
    "readers that analyze": {"job": "analyze", "cpu_workers": Replicas(minimum=1, maximum=1)},
    "decode to nowhere": {"job": "decode", "target": None},
    "decode to this machine": {"job": "decode", "target": "pictures/"},
    "a target to verify": {"job": "verify", "target": "s3://a/b"},
    "decode that grows": {"job": "decode", "gpu_workers": Replicas(minimum=1, maximum=2)},
    "a script for an interactive cluster": {"job": "interactive", "archive": "s3://a/b"},
    "an interactive cluster of a head": {"job": "interactive", "gpu_workers": Replicas()},
    "a port": {"store_port": 0},
    "retries": {"retries": -1},
    "hours": {"deadline_hours": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name(name):
    assert objects(options())
    with pytest.raises(ManifestError, match="wanted"):
        options(**REFUSED[name])


CREDENTIALS = [
    {"archive": "s3://AKIAEXAMPLE:hunter2@bucket/a"},
    {"sources": ["https://hunter2@host/a.tar"]},
    {"sources": ["https://host/a.tar?X-Amz-Signature=hunter2"]},
    {"sources": ["https://account.example/a.tar?sv=1&sig=hunter2"]},
    {"archive": "abfs://user:hunter2@account/a"},
    {"arguments": ["--storage-option", "secret=hunter2"]},
    {"arguments": ["aws_access_key_id=hunter2"]},
    {"arguments": ["--token=hunter2"]},
]


@pytest.mark.parametrize("changes", CREDENTIALS)
def test_a_credential_is_refused_and_not_repeated(changes):
    with pytest.raises(ManifestError, match="Secret") as caught:
        options(**changes)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.args)


def test_an_azure_container_is_no_credential():
    address = "abfss://container@account.dfs.core.windows.net/photos"
    assert options(archive=address).archive == address


@pytest.mark.parametrize("text", ["", "a", "-1", "3:", ":3", "5:2", "1:2:3", "1.5", "²", "1 : 2"])
def test_a_range_of_workers_that_is_none_is_refused(text):
    with pytest.raises(ManifestError, match="--gpu-workers is"):
        Replicas.parse("--gpu-workers", text)


def test_fewest_and_most_workers_are_read():
    assert Replicas.parse("", "3") == Replicas(minimum=3, maximum=3)
    assert Replicas.parse("", "0:12") == Replicas(minimum=0, maximum=12)
    with pytest.raises(ManifestError):
        Replicas(minimum=2, maximum=1)


@pytest.mark.parametrize("memory", ["16", "16GB", "16 Gi", "0Gi", "1.5Gi", "-1Gi", "16Gi\n"])
def test_memory_without_a_unit_of_kubernetes_is_refused(memory):
    with pytest.raises(ManifestError, match="memory"):
        PodSize(cpus=1, memory=memory)
    with pytest.raises(ManifestError, match="cpus"):
        PodSize(cpus=0, memory="1Gi")


def test_a_refusal_is_one_line_and_a_usage_error():
    flags = [*BASES["compress"], "--gpu-workers", "4:1"]
    result = invoke(*flags, code=2)
    assert result.stdout == ""
    assert result.stderr == "error: --gpu-workers is '4:1', wanted MIN <= MAX\n"
    result = invoke("--image", "a:1", "--archive", "s3://a/b?token=hunter2", code=2)
    assert "hunter2" not in result.output


# ------------------------------------------------------------------------------------------- YAML

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(SCALARS | st.dictionaries(st.text(), inner, max_size=3), max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.builds(lambda value: value, inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_what_a_parser_reads(document):
    text = yaml_documents([document, document])
    assert list(yaml.safe_load_all(text)) == [document, document]


@pytest.mark.parametrize(
    "word",
    [
        *("yes", "No", "ON", "off", "true", "NULL", "~", "y", "n", "", " a", "a ", "1e3", "0x1f"),
        *("1_0", "12:30:45", "2026-11-21", ".inf", "-", "- a", "a: b", "a #b", "#a", "&a", "*a"),
        *("!a", "%a", "@a", "`a", "{a}", "[a]", "|", ">", "'a'", '"a"', "a\tb", "a\nb", "<<", "="),
        *("?", "a:"),
    ],
)
def test_words_that_parsers_take_for_something_else_are_quoted(word):
    text = yaml_documents([{word: word, "list": [word, {word: [word]}]}])
    assert yaml.safe_load(text) == {word: word, "list": [word, {word: [word]}]}
    assert word == "" or f'"{word[0]}'.replace('""', '"\\"') in text


def test_notes_become_comments_above_their_key():
    document = {"a": Noted({"b": Noted(1, "one\nline more")}, "first"), "c": [{"d": Noted(2, "x")}]}
    text = yaml_documents([document])
    assert text == "# first\na:\n  # one\n  # line more\n  b: 1\nc:\n  # x\n  - d: 2\n"
    assert yaml.safe_load(text) == without_notes(document)


def test_what_yaml_text_cannot_say_is_an_error():
    for value in (1.5, b"a", {1, 2}):
        with pytest.raises(TypeError):
            yaml_documents([{"a": value}])
    with pytest.raises(TypeError):
        yaml_documents([{"a": [["b"]]}])


def test_rendered_files_are_read_back_as_they_were_meant():
    for job_options in (options(), options(job="verify"), options(job="interactive")):
        for name, file in manifests(job_options).items():
            assert read_documents(rendered(job_options)[name]) == [without_notes(o) for o in file]


# ------------------------------------------------------------------------------------------ image


def dockerfile():
    text = (K8S / "docker/Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_ray_of_the_manifests_is_the_ray_of_the_image():
    constraints = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    assert f"ray=={RAY_VERSION}" in constraints


def test_the_image_has_both_variants_a_pinned_base_and_a_numeric_user():
    lines = dockerfile()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    names = [stage[3] for stage in stages]
    assert names[-2:] == ["cpu", "cuda"]
    (base,) = [line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON_IMAGE=")]
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", base)
    assert all(stage[1] in ("${PYTHON_IMAGE}", *names) for stage in stages)
    assert f"USER {USER_ID}:{USER_ID}" in lines
    installs = [line for line in lines if "pip install" in line]
    assert all("requirements/constraints.txt" in line or "--no-deps" in line for line in installs)
    assert not any(re.search(r"(?i)secret|token|password", line) for line in lines)


def test_the_image_holds_the_scripts_where_the_manifests_look_for_them():
    ignored = (K8S / "docker/Dockerfile.dockerignore").read_text().splitlines()
    copies = [line.split()[1:] for line in dockerfile() if line.startswith("COPY ")]
    for *sources, target in copies:
        if sources[0].startswith("--from"):
            continue
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
        if sources[0].startswith("jobs/"):
            assert target == f"{JOBS_FOLDER}/"
            assert {Path(source).name for source in sources} == {*SCRIPTS.values()}


# --------------------------------------------------------------------------------- verify_archive


def test_the_verify_job_prints_a_report_and_ends_with_its_code(monkeypatch, capsys):
    reports = {
        "s3://a/sound": verify_module.VerifyReport(uri="s3://a/sound", rows=3, is_complete=True),
        "s3://a/gone": verify_module.VerifyReport(uri="s3://a/gone", unchecked="no archive"),
    }
    seen = []

    def verify(uri, *, subset):
        seen.append((uri, subset))
        return reports[uri]

    monkeypatch.setattr(verify_archive, "verify_archive", verify)
    for uri, code in (("s3://a/sound", 0), ("s3://a/gone", 2)):
        monkeypatch.setattr(sys, "argv", ["verify_archive.py", uri, "--subset", "2/3"])
        assert verify_archive.main() == code
        assert json.loads(capsys.readouterr().out)["exit_code"] == code
    assert seen == [("s3://a/sound", "2/3"), ("s3://a/gone", "2/3")]


def test_the_verify_job_says_what_it_cannot_check(monkeypatch, capsys, tmp_path):
    for arguments in ([str(tmp_path / "nothing")], [str(tmp_path), "--subset", "9/3"]):
        monkeypatch.setattr(sys, "argv", ["verify_archive.py", *arguments])
        assert verify_archive.main() == 2
    capsys.readouterr()
