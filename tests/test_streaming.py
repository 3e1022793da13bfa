"""Decoding ahead of the codec within bytes, batches of similar shapes, and the notice to stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.archive import open_snapshot
from dicmh_ray.errors import JobStoppedError
from dicmh_ray.pipeline import EncodeOptions, EncodePolicy, encode_images
from dicmh_ray.pipeline import loading as loading_module
from dicmh_ray.pipeline.batching import SHAPE_STEP, similar_batches, windows
from dicmh_ray.pipeline.loading import LoadedImage, load_images
from dicmh_ray.pipeline.stopping import StopNotice, listening_for_stop
from dicmh_ray.ray_plugin import compress
from dicmh_ray.source import Pixels, SourceImage, stated_pixels
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tars

REPOSITORY = Path(__file__).parents[1]
MAX_PIXELS = 10**8


def source(key, data):
    return SourceImage(key=key, data=data, source_uri="memory://images")


def loaded(height, width):
    pixels = Pixels(
        image=np.zeros((height, width, 3), np.uint8),
        exif_orientation=1,
        exif=None,
        icc=None,
        format="BMP",
        is_grey=True,
    )
    return LoadedImage("key", source("key", b""), pixels, None)


class Gauge:
    """Counts decoded bytes between the start of a decode and the consumer's next request."""

    def __init__(self, monkeypatch, *, seconds=0.0):
        self.now = self.most = 0
        self._seconds = seconds
        self._lock = threading.Lock()
        self._load = loading_module.load_pixels
        monkeypatch.setattr(loading_module, "load_pixels", self._watched)

    def _watched(self, data, *, max_pixels):
        pixels = self._load(data, max_pixels=max_pixels)
        self.add(pixels.image.nbytes)
        time.sleep(self._seconds)
        return pixels

    def add(self, num_bytes):
        with self._lock:
            self.now += num_bytes
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("threads", [1, 3])
def test_pictures_decoded_ahead_stay_within_the_budget_whatever_their_sizes(monkeypatch, threads):
    rng = np.random.default_rng(3)
    shapes = [(int(rng.integers(1, 60)), int(rng.integers(1, 60))) for _ in range(60)]
    gauge = Gauge(monkeypatch, seconds=0.001)
    images = [source(str(i), bmp(np.zeros((*s, 3), np.uint8))) for i, s in enumerate(shapes)]
    budget = 2 * 60 * 60 * 10 + 3 * loading_module.IMAGE_BYTES
    keys = []
    for image in load_images(images, threads=threads, ahead_bytes=budget, max_pixels=MAX_PIXELS):
        keys.append(image.key)
        time.sleep(0.002)
        gauge.add(-image.pixels.image.nbytes)
    assert keys == [str(i) for i in range(60)]
    assert gauge.now == 0
    assert gauge.most <= budget
    assert gauge.most > max(3 * h * w for h, w in shapes), "nothing was decoded ahead"


def test_a_picture_larger_than_the_budget_is_decoded_alone(monkeypatch):
    gauge = Gauge(monkeypatch)
    images = [source(str(i), bmp(np.zeros((100, 100, 3), np.uint8))) for i in range(5)]
    for image in load_images(images, threads=4, ahead_bytes=1, max_pixels=MAX_PIXELS):
        time.sleep(0.01)
        gauge.add(-image.pixels.image.nbytes)
    assert gauge.most == 3 * 100 * 100


def test_a_source_is_not_read_further_than_the_budget_reaches():
    read = []

    def images():
        for i in range(100):
            read.append(i)
            yield source(str(i), bmp(np.zeros((50, 50, 3), np.uint8)))

    stream = load_images(images(), threads=2, ahead_bytes=60_000, max_pixels=MAX_PIXELS)
    next(stream)
    time.sleep(0.3)
    assert len(read) < 12
    stream.close()
    assert len(read) < 12
    assert not [t for t in threading.enumerate() if t.name.startswith("dicmh-")]


def test_an_error_of_the_source_arrives_after_the_images_before_it():
    def images():
        yield source("a", bmp(picture(1)))
        raise OSError("the store went away")

    stream = load_images(images(), threads=2, ahead_bytes=10**6, max_pixels=MAX_PIXELS)
    assert next(stream).key == "a"
    with pytest.raises(OSError, match="went away"):
        next(stream)
    assert not [t for t in threading.enumerate() if t.name.startswith("dicmh-")]


def test_the_stated_size_of_a_file_is_its_header_and_nothing_else():
    data = bmp(picture(1, height=20, width=30))
    assert stated_pixels(data) == stated_pixels(data[:100]) == 600
    assert stated_pixels(b"") == stated_pixels(b"no image") == 0


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(deadline=None, max_examples=50)
@given(st.lists(shapes, max_size=30), st.integers(1, 60_000))
def test_batches_hold_each_picture_once_and_no_more_pixels_than_they_may(sizes, batch_pixels):
    images = [loaded(*size) for size in sizes]
    batches = list(similar_batches(images, batch_pixels))
    assert sorted(i for batch in batches for i in batch) == list(range(len(images)))
    for batch in batches:
        assert len(batch) == 1 or sum(images[i].num_pixels for i in batch) <= batch_pixels
    cut = list(windows(images, max_pixels=4 * batch_pixels))
    assert [image for window in cut for image in window] == images
    for window in cut:
        held = sum(image.num_pixels for image in window)
        assert len(window) == 1 or held <= 4 * batch_pixels


def test_pictures_of_two_shapes_that_alternate_are_batched_by_shape():
    images = [loaded(*((64, 128) if i % 2 else (128, 64))) for i in range(8)]
    batches = list(similar_batches(images, 4 * 64 * 128))
    assert sorted(batches) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert SHAPE_STEP == 64


class Recorder(FakeCodec):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def encode(self, images, **options):
        self.shapes.append([image.shape[:2] for image in images])
        return super().encode(images, **options)


@pytest.mark.parametrize("load_threads", [0, 1, 4])
def test_rows_of_mixed_sizes_come_in_order_from_batches_of_one_shape(load_threads):
    sizes = [(24, 32), (96, 64), (200, 200)]
    images = [
        source(str(i), bmp(picture(i, height=sizes[i % 3][0], width=sizes[i % 3][1])))
        for i in range(12)
    ]
    codec = Recorder()
    options = EncodeOptions(batch_pixels=4 * 96 * 64, load_threads=load_threads)
    rows = list(encode_images(images, codec, EncodePolicy(states=3), options=options))
    assert [row.key for row in rows] == [str(i) for i in range(12)]
    assert [(row.height, row.width) for row in rows] == [sizes[i % 3] for i in range(12)]
    large = [batch for batch in codec.shapes if (200, 200) in batch]
    assert all(batch == [(200, 200)] for batch in large), "above the bound: alone"
    plain = EncodeOptions(batch_pixels=1, load_threads=0)
    assert rows == list(encode_images(images, FakeCodec(), EncodePolicy(states=3), options=plain))


def test_a_notice_lets_the_time_run_from_the_first_one():
    notice = StopNotice(grace_s=0.05)
    assert not notice.is_given
    notice.check(3)
    notice.give()
    assert notice.is_given
    notice.check(3)
    time.sleep(0.06)
    notice.give()
    with pytest.raises(JobStoppedError) as caught:
        notice.check(3)
    assert caught.value.units_left == 3


def test_sigterm_gives_the_notice_once_and_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with listening_for_stop() as notice:
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_given
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def stop_at_first_row(grace_s):
    """A codec that gets SIGTERM while it encodes its first picture."""

    class Stopped(FakeCodec):
        def encode(self, images, **options):
            if not self.num_encoded:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(images, **options)

    return Stopped


def test_a_local_job_that_is_told_to_stop_ends_its_unit_and_says_what_is_left(tmp_path):
    tars = write_tars(tmp_path)
    codec = stop_at_first_row(20)()
    with pytest.raises(JobStoppedError, match="2 units left"):
        compress(tars, str(tmp_path / "a"), codec=lambda: codec, runtime="local")
    assert len(open_snapshot(str(tmp_path / "a")).commits) == 1
    report = compress(tars, str(tmp_path / "a"), codec=FakeCodec, runtime="local")
    assert (report.units_resumed, report.units_done, report.manifest) == (1, 2, 1)


def test_a_second_signal_ends_the_process_and_nothing_is_half_published(tmp_path):
    tars = write_tars(tmp_path)
    script = (
        "import os, signal, sys\n"
        "from dicmh_ray.ray_plugin import compress\n"
        "from tests.fake_codec import FakeCodec\n"
        "class Stopped(FakeCodec):\n"
        "    def encode(self, images, **options):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return super().encode(images, **options)\n"
        "codec = Stopped()\n"
        "compress(sys.argv[2:], sys.argv[1], codec=lambda: codec, runtime='local')\n"
    )
    # The first batch gives the notice; the pictures of one unit make one batch, so the unit is
    # committed, and the job ends before there is a second signal: batches of one picture, then.
    script = script.replace(
        "runtime='local')", "runtime='local', encode_options=EncodeOptions(batch_pixels=1))"
    ).replace(
        "import compress\n", "import compress\nfrom dicmh_ray.pipeline import EncodeOptions\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a"), *tars]
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not open_snapshot(str(tmp_path / "a")).commits
    report = compress(tars, str(tmp_path / "a"), codec=FakeCodec, runtime="local")
    assert (report.units_resumed, report.manifest) == (0, 1)
