"""jobs/evaluate_rd.py: the same figures from workers on Ray as from this process."""

import json
import sys

import pytest
from PIL import Image

pytest.importorskip("ray")
pytest.importorskip("bjontegaard")

from dicmh_ray.bench import BenchOptions, evaluate_rd
from dicmh_ray.ray_plugin import RayOptions
from jobs import evaluate_rd as job
from tests.bench.tiny import QUICK, CodecWithMsSsim, a_picture

pytestmark = pytest.mark.ray


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(a_picture(seed=n)).save(folder / f"{n}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return str(folder)


def figures(report):
    return {
        (one.method, one.setting, one.image): (one.num_bytes, dict(one.metrics))
        for one in report.measurements
    }


def test_workers_measure_what_one_process_measures(cluster, pictures):
    options = BenchOptions(peers=QUICK, threads=1)
    shared = job.evaluate_on_ray(
        [pictures], CodecWithMsSsim, nets=None, options=options, ray_options=RayOptions(workers=2)
    )
    alone = evaluate_rd([pictures], CodecWithMsSsim(), options=options)
    assert figures(shared) == figures(alone)
    assert (shared.num_images, shared.pictures) == (3, "set")
    assert [name for name, _ in shared.skipped] == ["broken.png"]
    assert [(one.test, one.percent) for one in shared.bd_rates] == [
        (one.test, one.percent) for one in alone.bd_rates
    ]


def test_the_job_writes_its_report_and_ends_with_its_code(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job.Options, "make_codec", lambda self: CodecWithMsSsim())
    monkeypatch.setattr(job.Options, "bench", lambda self: BenchOptions(peers=QUICK))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate_rd.py", *arguments])
        return job.main()

    assert main(pictures, "--local", "-o", str(tmp_path / "report")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == 3
    assert {point["method"] for point in told["points"]} >= {"dicmh"}
    assert list((tmp_path / "report").iterdir())
    assert main(str(tmp_path / "nothing"), "--local", "-o", str(tmp_path / "no")) == 1
