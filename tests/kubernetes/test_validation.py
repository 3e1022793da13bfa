"""Manifests are valid by the official schemas; broken ones are not."""

import json

import pytest

from tests.kubernetes.rendering import (
    BUILDABLE,
    K8S,
    build,
    every_rendering,
    name_of,
    objects,
    options,
)
from tests.kubernetes.schemas import (
    faults_by_controllers,
    faults_by_schema,
    faults_of_core_kind,
    read_crds,
    read_documents,
)


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
