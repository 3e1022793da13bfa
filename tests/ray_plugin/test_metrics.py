"""The job's metrics where a cluster's Prometheus finds them."""

import time
import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from dicmh_ray.ray_plugin import compress
from tests.fake_codec import FakeCodec
from tests.small_collections import write_tars

pytestmark = pytest.mark.ray

PATIENCE_S = 60
"""Ray's agent begins to export half a minute after Ray."""


def exported(archive):
    """(name, status) -> value, from the agent of this machine, for one archive."""
    node = next(node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as response:
        text = response.read().decode()
    return {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("archive") == archive
    }


def test_ray_exports_what_a_job_counted(cluster, tmp_path):
    archive = str(tmp_path / "archive")
    report = compress(write_tars(tmp_path), archive, codec=FakeCodec, runtime="ray")
    deadline = time.monotonic() + PATIENCE_S
    found = {}
    wanted = {
        ("ray_dicmh_images_total", "ok"): report.tally.ok,
        ("ray_dicmh_units_committed_total", None): 3,
        ("ray_dicmh_source_bytes_total", None): report.tally.bytes_in,
        ("ray_dicmh_unit_seconds_count", None): 3,
        ("ray_dicmh_units_left", None): 0,
    }
    assert report.tally.ok == 18
    # They arrive one by one, and with the values of some seconds ago.
    while not wanted.items() <= found.items() and time.monotonic() < deadline:
        time.sleep(1)
        found = exported(archive)
    assert {name: found.get(name) for name in wanted} == wanted
