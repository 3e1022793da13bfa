"""Run a real S3 server on this machine until it is interrupted, and say how to reach it.

    .ci/fetch_ceph build/ceph
    python jobs/s3_server.py --ceph build/ceph/root

Ceph's gateway with its data in memory: for the tests, for measurements, for trying things out. Debian
packages, unpacked and not installed. Prints an endpoint and a key pair as shell variables.
"""

import argparse
import signal
import sys
from pathlib import Path

from dicmh_ray.testing.ceph import ACCESS_KEY, SECRET_KEY, ceph_gateway, find_ceph


def main() -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="A real S3 server in memory, on loopback.")
    parser.add_argument("--ceph", type=Path, default=Path("build/ceph/root"), help="its programs")
    options = parser.parse_args()
    prefix = find_ceph(options.ceph)
    if prefix is None:
        print(f"no Ceph programs in {options.ceph}: run .ci/fetch_ceph build/ceph", file=sys.stderr)
        return 1
    with ceph_gateway(prefix) as endpoint:
        print(f"export AWS_ENDPOINT_URL={endpoint}")
        print(f"export AWS_ACCESS_KEY_ID={ACCESS_KEY} AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
        print("export AWS_REGION=us-east-1", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


if __name__ == "__main__":
    sys.exit(main())
