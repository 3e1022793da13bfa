"""A codec whose decodes can be counted from outside, whatever process makes them."""

import os
from functools import partial
from pathlib import Path

from tests.fake_codec import FakeCodec


class CountingCodec(FakeCodec):
    """Writes a line for each picture it decodes: its process and the number of bytes."""

    def __init__(self, log):
        super().__init__()
        self._log = log

    def decode(self, bitstreams, *, states=None, view="machine"):
        self._note(bitstreams)
        return super().decode(bitstreams, states=states, view=view)

    def decode_latent(self, bitstreams, *, states=None):
        self._note(bitstreams)
        return super().decode_latent(bitstreams, states=states)

    def _note(self, bitstreams):
        lines = "".join(f"{os.getpid()} {len(data)}\n" for data in bitstreams)
        descriptor = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)


def counting(folder):
    """A picklable maker of such codecs, and what tells how many pictures each process decoded."""
    log = Path(folder) / "decodes"

    def counts():
        found = {}
        for line in log.read_text().splitlines() if log.exists() else ():
            process = int(line.split()[0])
            found[process] = found.get(process, 0) + 1
        return found

    return partial(CountingCodec, str(log)), counts
