"""jobs/train_codec.py: which training its options start, and what it prints."""

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("compressai")

from dicmh_ray.errors import SourceNotFoundError
from jobs import train_codec


@pytest.fixture
def started(monkeypatch):
    """What was called, with which arguments."""
    calls = []

    def note(name):
        def train(photographs, output, **options):
            calls.append((name, options))
            if photographs == ["nothing"]:
                raise SourceNotFoundError("nothing")
            return SimpleNamespace(codec_id="ab" * 32)

        return train

    monkeypatch.setattr(train_codec, "train_checkpoint", note("layered"))
    monkeypatch.setattr(train_codec, "train_icmh_checkpoint", note("icmh"))
    training = pytest.importorskip("dicmh_ray.ray_plugin.training")
    monkeypatch.setattr(training, "train_icmh_on_ray", note("ray"))
    return calls


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_codec.py", *arguments])
    return train_codec.main()


def test_a_preset_starts_its_own_training(started, monkeypatch, capsys):
    assert run(monkeypatch, "a", "-o", "run", "--minutes", "3") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"checkpoint": "run/checkpoint", "codec_id": "ab" * 32}
    assert run(monkeypatch, "a", "-o", "run", "--preset", "diff-icmh-tiny", "--rate", "8") == 0
    ray = ("--preset", "diff-icmh-tiny", "--workers", "2", "--gpu", "--ray-address", "auto")
    assert run(monkeypatch, "a", "-o", "run", "--steps", "7", *ray) == 0
    (first, one), (second, two), (third, three) = started
    assert (first, second, third) == ("layered", "icmh", "ray")
    assert (one["options"].minutes, two["options"].rate, three["options"].steps) == (3, 8, 7)
    assert (three["workers"], three["use_gpu"], three["address"]) == (2, True, "auto")


def test_an_error_is_told_by_the_exit_code(started, monkeypatch):
    assert run(monkeypatch, "nothing", "-o", "run") == 1


@pytest.mark.parametrize(
    "words", [("--workers", "2"), ("--rate", "8"), ("--gpu",), ("--preset", "none")]
)
def test_what_does_not_go_together_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_codec.parse(["a", "-o", "run", *words])
    assert capsys.readouterr().err
