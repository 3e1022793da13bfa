"""What the manifests say: rights, memory, disruption, credentials, queues."""

import json
import re

from dicmh_ray.cli.manifests import DRAIN_S, GRACE_S, USER_ID
from dicmh_ray.pipeline.stopping import GRACE_S as DRIVER_GRACE_S
from tests.kubernetes.rendering import BUILDABLE, K8S, build, every_rendering, objects, options


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
