"""The page is one sound file that says what the tally says, whatever is in the collection."""

import html.parser
import re

import pytest

from dicmh_ray.archive import compact_archive, open_snapshot
from dicmh_ray.pipeline import Tally
from dicmh_ray.pipeline.archive_facts import tally_of
from dicmh_ray.pipeline.chart import (
    COLUMNS_LEAST,
    Series,
    bins_shown,
    clipped,
    histogram_figure,
)
from dicmh_ray.pipeline.encode import FAILURE_CAUSES
from dicmh_ray.pipeline.histogram import Histogram, Scale
from dicmh_ray.pipeline.page import MEANING, PageFacts, Thumbnail, render_page
from dicmh_ray.ray_plugin import compress
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar, write_tars

HOSTILE = "<script>alert(1)</script>&\"'"
VOID = {"meta", "img", "br"}
OPEN_ENDED = {"th", "td", "tr", "li", "p"}


class Checker(html.parser.HTMLParser):
    """Every element that must be closed is, and in order; nothing is loaded."""

    def __init__(self):
        super().__init__()
        self.stack, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        while self.stack[-1] != tag:
            assert self.stack.pop() in OPEN_ENDED
        self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    checker = Checker()
    checker.feed(page)
    assert not [tag for tag in checker.stack if tag not in OPEN_ENDED]
    assert "script" not in checker.seen
    assert not re.search(r"https?://|url\(|@import", page)
    return " ".join(" ".join(checker.text).split())


@pytest.fixture
def snapshot(tmp_path):
    odd = {"junk<b>": b"junk", "flat": bmp(picture(1, step=1)), "one": bmp(picture(2))}
    sources = [*write_tars(tmp_path), write_tar(tmp_path / "odd.tar", odd)]
    compress(sources, str(tmp_path / "a"), codec=FakeCodec, runtime="local", failure_budget=1.0)
    return open_snapshot(str(tmp_path / "a"))


def facts(**fields):
    given = {"archive": "a", "is_complete": True, "codec_id": "ab" * 32, "tally": Tally()}
    return PageFacts(**(given | fields))


def test_a_page_of_an_archive_says_what_its_tally_says(snapshot):
    tally = tally_of(snapshot)
    text = check(render_page(facts(tally=tally, units=(4, 4))))
    assert f"Images {tally.images} " in text
    assert "unreadable failure 1" in text
    assert "junk<b>" in text, "escaped, not dropped"
    assert "complete" in text
    assert "Lowest PSNR" in text


def test_what_comes_from_the_collection_is_text_and_nothing_else():
    tally = Tally(images=1)
    tally.causes[HOSTILE] = 1
    page = render_page(
        facts(
            archive=HOSTILE,
            tally=tally,
            error=HOSTILE,
            parameters={"policy": HOSTILE},
            thumbnails={HOSTILE: [Thumbnail(HOSTILE, "data:,")]},
        )
    )
    assert "<script" not in page
    assert HOSTILE in check(page)


def test_a_page_of_nothing_is_a_page():
    text = check(render_page(facts(is_complete=False)))
    assert "unfinished" in text
    assert "nothing was counted" in text
    assert "There is none." in text


def test_a_compacted_archive_has_the_same_tally(snapshot):
    before = tally_of(snapshot)
    compact_archive(snapshot.uri)
    after = open_snapshot(snapshot.uri)
    assert len(after.commits) < len(snapshot.commits)
    found = tally_of(after)
    for name, histogram in found.summary.histograms.items():
        assert histogram.bins == before.summary.histograms[name].bins
    assert found.causes == before.causes
    assert [image.key for image in found.summary.worst[:3]] == [
        image.key for image in before.summary.worst[:3]
    ]


def test_every_failure_has_a_sentence():
    assert set(MEANING) >= FAILURE_CAUSES


def test_columns_are_as_high_as_their_counts():
    columns = [(0.0, 1.0, 5), (1.0, 2.0, 0), (2.0, 3.0, 10)]
    series = [Series(look="ok", name="x", columns=columns)]
    heights = [
        float(found)
        for found in re.findall(
            r'<rect class=ok [^>]*height="([\d.]+)"',
            histogram_figure("t", "u", series, label=str, median=1.5),
        )
    ]
    assert heights[1] == pytest.approx(2 * heights[0])
    assert clipped(columns, 1.0) == [(0.0, 1.0, 5), (1.0, 2.0, 10)]


def test_an_axis_of_few_bins_is_widened_and_one_of_many_is_not():
    for values in ([33.5], [33.5, 36.5], [*range(20, 50)]):
        histogram = Histogram(scale=Scale(1.0))
        for value in values:
            histogram.add(value)
        shown = bins_shown(histogram)
        span = max(histogram.bins) + 1 - min(histogram.bins)
        assert len(shown) == max(COLUMNS_LEAST, span)
        assert set(shown) >= set(histogram.bins)
    assert len(bins_shown(Histogram(scale=Scale(1.0)))) == 0
