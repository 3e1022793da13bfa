"""One local cluster of two CPUs for all tests here; ``RAY_TEST_ADDRESS`` names another to use."""

import logging
import os

import pytest

# Before ray is imported, as in dicmh_ray.ray_plugin.cluster.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray runs workers at niceness 15: on a busy machine the tests would wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")

ray = pytest.importorskip("ray")

from dicmh_ray.ray_plugin.cluster import start_local_ray


@pytest.fixture(scope="session")
def cluster():
    """The address of a running Ray that this process is connected to."""
    address = os.environ.get("RAY_TEST_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        start_local_ray(2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
