"""Ceph's S3 gateway on this machine alone: a monitor, a store in memory, the gateway.

    .ci/fetch_ceph build/ceph
    python jobs/s3_server.py --ceph build/ceph/root

It checks signatures and digests and has the latency of a network service, which servers written
for tests do not. Ready in some 20 s, 0.4 GB of memory. Nothing is installed: ``prefix`` is where
Debian's packages ``radosgw ceph-mon ceph-osd ceph-common`` were unpacked, or ``/``.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACCESS_KEY, SECRET_KEY = "canary-ceph-access", "canary-ceph-secret"
"""The one user's; no secret to anybody, and words that tests search for."""

_START_S = 120
_STOP_S = 10
_MEMORY_BYTES = 2**31
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
mon initial members = a
public network = 127.0.0.0/8
keyring = {folder}/keyring
auth allow insecure global id reclaim = false
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
osd max object name len = 256
osd max object namespace len = 64
memstore device bytes = {memory_bytes}
plugin dir = {lib}
erasure code dir = {lib}/ceph/erasure-code
osd class dir = {lib}/rados-classes
run dir = {folder}
pid file = {folder}/$type.$id.pid
admin socket = {folder}/$type.$id.asok
log file = {folder}/$type.$id.log
crash dir = {folder}
ms bind msgr2 = false
[mon.a]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
osd op num shards = 2
osd op num threads per shard = 1
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {folder}/rgw
rgw thread pool size = 64
rgw dns name = 127.0.0.1
rgw enable usage log = false
"""


class CephError(RuntimeError):
    """The server could not be started; the message has what it said."""


def find_ceph(*places: Path) -> Path | None:
    """The first folder in which the programs lie, ``/`` after those that are given."""
    for place in (*places, Path("/")):
        if all((place / "usr/bin" / name).exists() for name in ("radosgw", "ceph-mon", "ceph-osd")):
            return place.absolute()
    return None


def storage_options(endpoint: str, **changes: Any) -> dict[str, Any]:
    """What opens a store there."""
    return {
        "key": ACCESS_KEY,
        "secret": SECRET_KEY,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
        **changes,
    }


@contextlib.contextmanager
def ceph_gateway(prefix: Path) -> Iterator[str]:
    """Run the server; yields its address.

    Raises:
        CephError: it does not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="dicmh-ceph-"))
    ceph = _Ceph(prefix, folder)
    try:
        ceph.start()
        yield f"http://127.0.0.1:{ceph.port}"
    finally:
        ceph.stop()
        shutil.rmtree(folder, ignore_errors=True)


class _Ceph:
    def __init__(self, prefix: Path, folder: Path) -> None:
        self._folder = folder
        self._bin = prefix / "usr/bin"
        lib = prefix / "usr/lib/x86_64-linux-gnu"
        self.port, mon_port = _free_ports(2)
        self._environment = {
            **os.environ,
            "CEPH_CONF": str(folder / "ceph.conf"),
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(prefix / "usr/lib/python3/dist-packages"),
        }
        if prefix != Path("/"):
            paths = [lib, lib / "ceph", prefix / "lib/x86_64-linux-gnu"]
            self._environment["LD_LIBRARY_PATH"] = ":".join(map(str, paths))
        self._fsid = str(uuid.uuid4())
        self._mon_address = f"[v1:127.0.0.1:{mon_port}]"
        (folder / "ceph.conf").write_text(
            _CONFIG.format(
                fsid=self._fsid,
                mon_port=mon_port,
                port=self.port,
                folder=folder,
                lib=lib,
                memory_bytes=_MEMORY_BYTES,
            )
        )
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        self._servers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Bring the three up, one after the other."""
        self._make_keys()
        monmap = ["--create", "--clobber", "--fsid", self._fsid, "--addv", "a", self._mon_address]
        self._run("monmaptool", *monmap, "monmap")
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        self._serve("ceph-mon", "-i", "a")
        # All that needs the admin's Python program is asked of the monitor in one session each.
        self._wait_for("the monitor", lambda: self._ceph("status") is not None)
        self._ceph("auth", "import", "-i", "keyring", must=True)
        osd_id = str(uuid.uuid4())
        self._ceph("osd", "new", osd_id, must=True)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self._ceph("osd", "crush", "add", "0", "1.0", "host=h", "root=default", must=True)
        self._serve("ceph-osd", "-i", "0")
        self._wait_for("the object store", lambda: "1 up" in (self._ceph("osd", "stat") or ""))
        keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", "user", "create", "--uid=t", "--display-name=t", *keys)
        self._serve("radosgw", "-n", "client.rgw.a")
        self._wait_for("the gateway", self._answers)

    def stop(self) -> None:
        """End everything that was started."""
        for server in reversed(self._servers):
            server.send_signal(signal.SIGKILL)  # nothing there is to be kept
        for server in self._servers:
            server.wait(_STOP_S)

    def _make_keys(self) -> None:
        users = {
            "mon.": ["mon"],
            "client.admin": ["mon", "osd", "mds", "mgr"],
            "client.rgw.a": ["mon", "osd", "mgr"],
            "osd.0": ["mon", "osd", "mgr"],
        }
        for number, (user, services) in enumerate(users.items()):
            caps = [word for name in services for word in ("--cap", name, "allow *")]
            create = [] if number else ["--create-keyring"]
            self._run("ceph-authtool", *create, "keyring", "--gen-key", "-n", user, *caps)

    def _ceph(self, *arguments: str, must: bool = False) -> str | None:
        try:
            return self._run("ceph", "--connect-timeout", "10", *arguments)
        except CephError:
            if must:
                raise
            return None

    def _run(self, program: str, *arguments: str) -> str:
        try:
            done = subprocess.run(
                [self._bin / program, *arguments],
                cwd=self._folder,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_START_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise CephError(f"{program}: {exc}") from exc
        if done.returncode:
            raise CephError(f"{program} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _serve(self, program: str, *arguments: str) -> None:
        with (self._folder / f"{program}.out").open("wb") as output:
            self._servers.append(
                subprocess.Popen(
                    [self._bin / program, "--foreground", *arguments],
                    cwd=self._folder,
                    env=self._environment,
                    stdout=output,
                    stderr=output,
                )
            )

    def _wait_for(self, what: str, is_ready: Any) -> None:
        deadline = time.monotonic() + _START_S
        while not is_ready():
            dead = [server.args for server in self._servers if server.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = [f"{p.name}: {p.read_text()[-500:]}" for p in self._folder.glob("*.out")]
                raise CephError(f"{what} does not answer; ended: {dead}; {logs}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
