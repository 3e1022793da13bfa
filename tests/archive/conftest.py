"""The stores that the behaviour suite runs on: a folder, memory, and two S3 servers.

Besides, a folder without hard links, as on exFAT: it has no conditional put.
"""

import contextlib
import errno
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from dicmh_ray.archive import create_archive, open_store, retrying
from dicmh_ray.archive.retrying import RetryPolicy
from dicmh_ray.testing import ceph
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


def needs_ceph(item):
    """Whether a test of this folder is one on Ceph."""
    if item.path.parent != Path(__file__).parent:
        return False  # parameters of other tests may be arrays, which do not compare
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "ceph" in parameters or "ceph_options" in item.fixturenames


def pytest_collection_modifyitems(items):
    """Tests on Ceph go last of those in this folder: it starts while the others run."""
    places = [n for n, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[n] for n in places), key=needs_ceph)
    for n, item in zip(places, ordered, strict=True):
        items[n] = item


@pytest.fixture(scope="session", autouse=True)
def ceph_starting(request):
    """A Ceph gateway's address, later; None where its programs are not, or no test needs it."""
    prefix = ceph.find_ceph(Path(__file__).parents[2] / "build/ceph/root")
    if prefix is None or not any(needs_ceph(item) for item in request.session.items):
        yield None
        return
    with contextlib.ExitStack() as running, ThreadPoolExecutor(1) as thread:
        yield thread.submit(running.enter_context, ceph.ceph_gateway(prefix))


@pytest.fixture(scope="session")
def ceph_endpoint(ceph_starting):
    """Address of a Ceph gateway; `.ci/fetch_ceph build/ceph` brings its programs."""
    if ceph_starting is None:
        pytest.skip("no Ceph gateway here: run .ci/fetch_ceph build/ceph")
    return ceph_starting.result()


class Place:
    """Where one test's archive goes, and what opens it."""

    def __init__(self, uri, options=None):
        self.uri, self.options = uri, options or {}

    def store(self):
        return open_store(self.uri, self.options)


def new_bucket(options):
    """A bucket of its own on a server."""
    name = f"bucket-{uuid.uuid4().hex}"
    # The file system's mkdir sends a LocationConstraint, which this region refuses.
    open_store(f"s3://{name}", options)._fs.call_s3("create_bucket", Bucket=name)
    return name


@pytest.fixture
def moto_options(s3_endpoint, monkeypatch):
    """What opens a store on moto."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return {
        "key": KEY,
        "secret": SECRET,
        "endpoint_url": s3_endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }


@pytest.fixture
def ceph_options(ceph_endpoint, monkeypatch):
    """What opens a store on Ceph."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return ceph.storage_options(ceph_endpoint)


@pytest.fixture
def no_hard_links(monkeypatch):
    """Every disk is one without hard links."""

    def link(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", link)


CONDITIONAL = ("local", "memory", "s3", "ceph")
on_every_store = pytest.mark.parametrize("place", [*CONDITIONAL, "unlinked"], indirect=True)
"""Also on one without conditional puts."""


@pytest.fixture(params=CONDITIONAL)
def place(request, tmp_path):
    """A new empty address on each kind of store."""
    if request.param == "unlinked":
        request.getfixturevalue("no_hard_links")
    if request.param in ("local", "unlinked"):
        return Place(str(tmp_path / "archive"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}/archive")
    kind = {"s3": "moto_options", "ceph": "ceph_options"}[request.param]
    options = request.getfixturevalue(kind)
    return Place(f"s3://{new_bucket(options)}/archive", options)


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
