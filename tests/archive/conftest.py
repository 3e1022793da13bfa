"""The three stores that the behaviour suite runs on."""

import uuid

import pytest
from moto.server import ThreadedMotoServer

from dicmh_ray.archive import create_archive, open_store, retrying
from dicmh_ray.archive.retrying import RetryPolicy
from tests.archive.rows import CODEC_FILES, mixed_rows, plan_of

KEY, SECRET = "canary-access-key", "canary-secret-key"


QUICK = RetryPolicy(tries=4, base_s=0.002)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Stores that wait for milliseconds where they would wait for seconds."""
    monkeypatch.setattr(retrying, "DEFAULT_RETRY", QUICK)


@pytest.fixture(scope="session")
def s3_endpoint():
    """Address of a moto server in this process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Place:
    """Where one test's archive goes, and what opens it."""

    def __init__(self, uri, options=None):
        self.uri, self.options = uri, options or {}

    def store(self):
        return open_store(self.uri, self.options)


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path, monkeypatch):
    """A new empty address on each kind of store."""
    name = uuid.uuid4().hex
    if request.param == "local":
        return Place(str(tmp_path / "archive"))
    if request.param == "memory":
        return Place(f"memory://{name}/archive")
    endpoint = request.getfixturevalue("s3_endpoint")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    options = {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }
    place = Place(f"s3://bucket-{name}/archive", options)
    # The file system's mkdir sends a LocationConstraint, which this region refuses.
    place.store()._fs.call_s3("create_bucket", Bucket=f"bucket-{name}")
    return place


@pytest.fixture
def small_archive(tmp_path):
    """Address of a complete local archive of two units and seven rows."""
    uri = str(tmp_path / "small")
    writer = create_archive(
        uri, plan=plan_of("000000", "000001", target=0.5), codec_files=CODEC_FILES
    )
    writer.commit_unit("000000", mixed_rows(0, 4))
    writer.commit_unit("000001", mixed_rows(4, 3))
    writer.finalize()
    return uri
