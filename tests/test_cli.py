"""The program as a user meets it: what it prints, what it writes, how it ends. No torch, no ray."""

import io
import json
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from dicmh_ray.cli import app
from dicmh_ray.cli.output import told_in_one_line
from dicmh_ray.cli.progress import JobDisplay, time_text
from dicmh_ray.errors import DicmhError, FailureBudgetError
from dicmh_ray.pipeline import Checkpoint, JobReport
from dicmh_ray.pipeline import monitor as monitor_module
from dicmh_ray.views import codecs
from dicmh_ray.views.names import FileNames
from tests.fake_codec import FakeCodec
from tests.small_collections import bmp, picture, write_tar, write_tars


class AddressError(DicmhError, ValueError):
    """One of those that are ValueErrors, too."""


@pytest.fixture
def run(monkeypatch):
    """Runs the program with FakeCodec as the default checkpoint."""
    monkeypatch.setattr(
        Checkpoint,
        "open",
        classmethod(lambda cls, _: cls(codec_id="ab" * 32, files={}, factory=FakeCodec)),
    )
    monkeypatch.setattr(codecs, "load_codec", lambda *_, **__: FakeCodec())
    monkeypatch.setattr(codecs, "_loaded_codecs", {})
    monkeypatch.setattr(monitor_module, "BUDGET_GRACE_IMAGES", 4)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def archive(run, tmp_path):
    tars = write_tars(tmp_path)
    folder = tmp_path / "archive"
    run("compress", *tars, folder, "--runtime", "local", "--tag-field", "cls")
    return folder


def test_compress_then_info_then_verify(run, archive):
    facts = json.loads(run("info", archive, "--json").stdout)
    assert facts["complete"]
    assert facts["codec_id"] == "ab" * 32
    names = ("rows", "ok", "kept_original", "failed")
    assert [facts[name] for name in names] == [18, 18, 0, 0]
    assert facts["bytes_in"] > 0
    assert facts["bytes_out"] > 0
    assert facts["mean_bpp"] > 0
    assert facts["causes"] == {}
    shown = run("info", archive).stdout
    assert "3 of 3 committed" in shown
    assert "(complete)" in shown
    assert run("verify", archive).stdout.startswith("sound: ")
    assert run("verify", archive, "--decode").stdout.startswith("sound: ")
    assert json.loads(run("verify", archive, "--json").stdout)["exit_code"] == 0


def test_compress_reports_as_json_and_a_second_run_has_nothing_to_do(run, tmp_path):
    tars = write_tars(tmp_path)
    command = ("compress", *tars, tmp_path / "a", "--runtime", "local", "--json")
    report = json.loads(run(*command).stdout)
    assert (report["images"], report["units_done"], report["manifest"]) == (18, 3, 1)
    report = json.loads(run(*command).stdout)
    assert (report["images"], report["units_resumed"]) == (0, 3)


def test_a_dry_run_lists_units_and_writes_nothing(run, tmp_path):
    tars = write_tars(tmp_path)
    command = ("compress", *tars, tmp_path / "a", "--dry-run", "--sample", 0)
    assert "3 units, " in run(*command).stdout
    listed = json.loads(run(*command, "--json").stdout)
    assert len(listed["units"]) == 3
    assert listed["committed"] == 0
    assert "forecast" not in listed
    assert not (tmp_path / "a").exists()


def test_a_dry_run_foresees_size_time_and_money(run, tmp_path):
    tars = write_tars(tmp_path)
    command = ("compress", *tars, tmp_path / "a", "--dry-run", "--sample", 9, "--workers", 2)
    prices = ("--price-per-hour", 1.5, "--price-per-gb-month", 0.02)
    shown = run(*command, *prices).stdout
    assert "forecast from 9 images of 3 units (seed 0)" in shown
    header = next(line for line in shown.splitlines() if line.startswith("states\t"))
    assert header.endswith("hours\tcompute price\tstorage a month")
    assert [line.split("\t")[0] for line in shown.splitlines()[-5:-1]] == [
        "1",
        "2",
        "3",
        "as asked",
    ]
    found = json.loads(run(*command, "--json").stdout)["forecast"]
    assert found["workers"] == 2
    assert found["asked"]["compute_price"] is None
    assert not (tmp_path / "a").exists()
    run("compress", *tars, tmp_path / "a", "--runtime", "local")
    assert "no image to look at" in run(*command).stderr


@pytest.mark.parametrize(
    "options", [(), ("--states", 1), ("--tag-field", "cls", "--max-bytes", 9000)]
)
def test_a_dry_run_counts_what_the_job_would_not_do_again(run, tmp_path, options):
    tars, archive = write_tars(tmp_path), tmp_path / "a"
    job = ("compress", *tars, archive, *options)
    real = (*job, "--runtime", "local", "--json")

    def committed():
        return json.loads(run(*job, "--dry-run", "--sample", 0, "--json").stdout)["committed"]

    run(*real)
    assert committed() == 3
    run("compact", archive)
    run("gc", archive, "--keep-days", 0, "--keep-versions", 1)
    assert committed() == 3
    assert json.loads(run(*real).stdout)["units_resumed"] == 3


def test_a_dry_run_counts_the_units_of_an_unfinished_job(run, tmp_path):
    tars, archive = write_tars(tmp_path), tmp_path / "a"
    dry = ("--dry-run", "--sample", 0)
    run("compress", *tars[:2], archive, "--runtime", "local")
    added = ("compress", *tars, archive, "--append")
    assert "1 units, " in run(*added, *dry).stdout
    run(*added, "--runtime", "local")
    (archive / "manifest" / "000002.json").unlink()  # as if it had been killed before that
    assert "; 1 are committed already" in run(*added, *dry).stdout
    (archive / "manifest" / "000001.json").unlink()
    next((archive / "commit").glob("*.json")).unlink()
    assert "; 1 are committed already" in run("compress", *tars[:2], archive, *dry).stdout


@pytest.mark.parametrize(
    ("number", "options"),
    [(2, ()), (3, ("--states", 1)), (3, ("--no-resume",)), (4, ("--append", "--no-resume"))],
)
def test_a_dry_run_is_refused_where_the_job_would_be(run, tmp_path, number, options):
    tars, archive = write_tars(tmp_path, tars=4), tmp_path / "a"
    run("compress", *tars[:3], archive, "--runtime", "local")
    if "--append" in options:
        run("compress", *tars, archive, "--append", "--runtime", "local")
        (archive / "manifest" / "000002.json").unlink()
    job = ("compress", *tars[:number], archive, *options)
    told = run(*job, "--dry-run", code=1).stderr
    assert told.startswith("error: ")
    assert told == run(*job, "--runtime", "local", code=1).stderr


def test_max_bytes_limits_the_streams_of_a_job(run, tmp_path):
    tars = write_tars(tmp_path, tars=1)
    options = ("--runtime", "local", "--max-bytes", 300, "--min-psnr", 0, "--min-tile-psnr", 0)
    report = json.loads(run("compress", *tars, tmp_path / "a", *options, "--json").stdout)
    assert report["histograms"]["states"]["bins"][0]["from"] == 1
    assert report["over_max_bytes"] < report["ok"] == 6
    assert run("compress", *tars, tmp_path / "a", "--runtime", "local", code=1).stderr


def test_a_job_logs_events_keeps_metrics_and_leaves_a_page(run, tmp_path):
    tars = write_tars(tmp_path)
    log, metrics, page = tmp_path / "log.jsonl", tmp_path / "job.prom", tmp_path / "report.html"
    options = ("--log-json", log, "--metrics-file", metrics, "--report", page)
    run("compress", *tars, tmp_path / "a", "--runtime", "local", *options)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert (events[0], events[-1], len(events)) == ("job_started", "job_ended", 5)
    assert 'dicmh_images_total{archive="' in metrics.read_text()
    assert page.read_text().startswith("<!doctype html>")
    assert page.read_text().count("data:image/jpeg;base64,") == 9
    assert "This run" in page.read_text()


def test_events_on_standard_error_are_all_that_is_there(run, tmp_path):
    tars = write_tars(tmp_path)
    result = run("compress", *tars, tmp_path / "a", "--runtime", "local", "--log-json", "-")
    events = [json.loads(line)["event"] for line in result.stderr.splitlines()]
    assert events[-1] == "job_ended"


@pytest.mark.parametrize("option", ["--log-json", "--metrics-file", "--report"])
def test_a_url_is_refused_where_a_job_keeps_a_file(run, tmp_path, option):
    command = ("compress", *write_tars(tmp_path), tmp_path / "a", "--runtime", "local")
    assert "bucket/file is a URL" in run(*command, option, "s3://bucket/file", code=2).output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["no-folder/job.prom", "folder"])
def test_metrics_that_cannot_be_written_end_a_job_before_it_begins(run, tmp_path, name):
    (tmp_path / "folder").mkdir()
    command = ("compress", *write_tars(tmp_path), tmp_path / "a", "--runtime", "local")
    assert "error: " in run(*command, "--metrics-file", tmp_path / name, code=1).stderr
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "a").exists()


def test_a_job_that_fails_leaves_its_page_too(run, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a": b"junk", "b": bmp(picture(1))})
    page = tmp_path / "report.html"
    options = ("--runtime", "local", "--failure-budget", 0, "--report", page)
    run("compress", tar, tmp_path / "a", *options, code=3)
    assert "FailureBudgetError: 1 of 2 images failed" in page.read_text()


def test_a_report_is_made_of_an_archive_alone(run, archive, tmp_path):
    page, facts = tmp_path / "report.html", tmp_path / "report.json"
    assert "18 images of 3 units" in run("report", archive, "-o", page).stdout
    assert page.read_text().count("data:image/jpeg;base64,") == 9
    run("report", archive, "-o", page, "--no-thumbnails")
    assert "data:image" not in page.read_text()
    run("report", archive, "-o", facts)
    found = json.loads(facts.read_text())
    assert (found["rows"], found["complete"]) == (18, True)
    assert found["histograms"]["psnr"]["count"] == 18


def test_too_many_failures_end_with_code_3_and_the_report(run, tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"a": b"junk", "b": bmp(picture(1))})
    command = ("compress", tar, tmp_path / "a", "--runtime", "local", "--failure-budget")
    result = run(*command, "0.4", code=3)
    assert "error: 1 of 2 images failed, the budget is 0.4" in result.stderr
    assert "unreadable" in result.stdout
    run("compress", tar, tmp_path / "b", "--runtime", "local", "--failure-budget", "1")


def test_damage_ends_verify_with_code_1_and_names_the_object(run, archive):
    part = next((archive / "data").iterdir())
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    result = run("verify", archive, code=1)
    assert part.name in result.stdout


@pytest.mark.parametrize("command", [("info",), ("ls",), ("decode", "key")])
def test_a_missing_archive_is_one_line_and_code_1(run, tmp_path, command):
    name, *rest = command
    result = run(name, tmp_path / "nothing", *rest, code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no archive at")


def test_a_missing_archive_cannot_be_verified(run, tmp_path):
    run("verify", tmp_path / "nothing", code=2)


@pytest.mark.parametrize(
    "options",
    [
        ("--states", "0"),
        ("--states", "2", "--target-bpp", "1"),
        ("--failure-budget", "many"),
        ("--failure-budget", "1.5"),
        ("--runtime", "cloud"),
        ("--keep-original", "sometimes"),
        ("--storage-option", "novalue"),
        ("--min-workers", "3", "--workers", "2"),
        ("--gpus-per-worker", "1.5"),
        ("--runtime", "local", "--readers", "always"),
    ],
    ids=" ".join,
)
def test_options_without_meaning_are_usage_errors(run, tmp_path, options):
    run("compress", *write_tars(tmp_path, tars=1), tmp_path / "a", *options, code=2)


def test_a_source_that_is_not_there_is_told_in_one_line(run, tmp_path):
    result = run("compress", tmp_path / "no.tar", tmp_path / "a", "--runtime", "local", code=1)
    assert "error: no file matches" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        AddressError("refusing://x cannot be opened"),
        DicmhError("a reason\n  of two lines"),
        ImportError("Please install gcsfs to access Google Storage"),
        ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("command", "code"),
    [("info", 1), ("ls", 1), ("verify", 2), ("history", 1), ("decode", 1), ("compress", 1)],
)
def test_what_cannot_be_opened_is_told_in_one_line(run, tmp_path, error, command, code):
    class Refusing(fsspec.AbstractFileSystem):
        def __init__(self, **_):
            raise error

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    sources = write_tars(tmp_path, tars=1) if command == "compress" else []
    rest = {"decode": ("--where", "True"), "compress": ("--runtime", "local")}.get(command, ())
    result = run(command, *sources, "refusing://x/archive", *rest, code=code)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_a_broken_installation_keeps_its_traceback():
    with pytest.raises(ImportError), told_in_one_line():
        raise ImportError("cannot import name 'x' from 'y'", name="y")


def test_pictures_are_not_written_into_a_folder_that_is_named_like_a_url(
    run, archive, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = ("decode", archive, "--where", "True", "-o", "s3://bucket/out")
    assert "--into folder" in run(*command, code=2).stderr
    assert sorted(tmp_path.iterdir()) == before


def test_ls_filters_selects_and_limits(run, archive):
    lines = run("ls", archive, "--columns", "key,width,tags").stdout.splitlines()
    assert lines[0] == "key\twidth\ttags"
    assert len(lines) == 19
    result = run("ls", archive, "--limit", "2", "--json", "--columns", "key,exif,metadata")
    assert [set(json.loads(line)) for line in result.stdout.splitlines()] == [
        {"key", "exif", "metadata"}
    ] * 2
    assert "there are more" in result.stderr
    result = run("ls", archive, "--where", "metadata.cls == 1", "--limit", "0", "--json")
    assert len(result.stdout.splitlines()) == 6


@pytest.mark.parametrize("columns", ["base", "colour"])
def test_ls_refuses_blobs_and_unknown_columns(run, archive, columns):
    run("ls", archive, "--columns", columns, code=2)


def test_a_filter_that_makes_no_sense_is_told_in_one_line(run, archive):
    result = run("ls", archive, "--where", "width +", code=1)
    assert result.stderr.startswith("error: filter 'width +'")


def written(result):
    return dict(line.split("\t") for line in result.stdout.splitlines())


def test_decode_writes_pictures_latents_and_arrays(run, archive, tmp_path):
    key = next(iter(json.loads(run("ls", archive, "--json", "--limit", "1").stdout).values()))
    command = ("decode", archive, key, "-o", tmp_path / "out")
    with Image.open(written(run(*command))[key]) as opened:
        assert opened.size == (32, 24)
        assert "decoded by dicmh_ray, tier faithful" in opened.info["Comment"]
    with Image.open(written(run(*command, "--format", "jpg"))[key]) as opened:
        assert opened.format == "JPEG"
    with Image.open(written(run(*command, "--view", "human"))[key]) as opened:
        assert "detail generated by a diffusion model" in opened.info["Comment"]
    array = np.load(written(run(*command, "--format", "npy", "--states", "99"))[key])
    assert (array.dtype, array.shape) == (np.uint8, (24, 32, 3))
    latent = np.load(written(run(*command, "--view", "latent"))[key])
    assert (latent.dtype, latent.shape) == (np.float16, (3, 24, 32))


def test_decode_takes_a_filter_and_writes_each_image_once(run, archive, tmp_path):
    result = run("decode", archive, "--where", "metadata.cls == 1", "-o", tmp_path / "out")
    assert len(written(result)) == 6
    result = run("decode", archive, "--where", "True", "-o", tmp_path / "all", "--states", "1")
    assert len(set(written(result).values())) == 18


def test_decode_names_what_it_could_not_write_and_writes_the_rest(run, archive, tmp_path):
    key = next(iter(json.loads(run("ls", archive, "--json", "--limit", "1").stdout).values()))
    result = run("decode", archive, "nobody", key, "-o", tmp_path / "out", code=1)
    assert key in written(result)
    assert "no row with key 'nobody'" in result.stderr
    run("decode", archive, key, "--view", "original", code=1)
    run("decode", archive, code=2)


def test_kept_originals_come_back_byte_for_byte(run, tmp_path):
    data = bmp(picture(1, step=1))
    tar = write_tar(tmp_path / "x.tar", {"../a b": data})
    run("compress", tar, tmp_path / "a", "--runtime", "local", "--states", "1")
    result = run(
        "decode", tmp_path / "a", "--where", "True", "--view", "original", "-o", tmp_path / "out"
    )
    (path,) = written(result).values()
    with open(path, "rb") as file:
        assert file.read() == data
    assert [entry.suffix for entry in (tmp_path / "out").iterdir()] == [".bmp"]


def test_file_names_are_safe_unique_and_the_same_every_time():
    keys = [
        "a",
        "A",
        "a/b",
        "a_b",
        "../../etc/passwd",
        "",
        ".hidden",
        "x" * 300,
        "ä",
        "a\0b",
        "con",
        "a/b",
        "a/b",
        "a_b-2",
    ]
    names = [FileNames().claim(key, ".png") for key in keys]
    assert names == [FileNames().claim(key, ".png") for key in keys]
    taken = FileNames()
    together = [taken.claim(key, ".png").lower() for key in keys]
    assert len(set(together)) == len(keys)
    for name in together:
        assert not set(name) & set("/\\\0:")
        assert not name.startswith(".")
        assert len(name) < 128


def test_an_interrupted_job_says_how_to_go_on(run, tmp_path, monkeypatch):
    def stop(self, report):
        self.last = report
        raise KeyboardInterrupt

    monkeypatch.setattr(JobDisplay, "__call__", stop)
    tars = write_tars(tmp_path)
    result = run("compress", *tars, tmp_path / "a", "--runtime", "local", code=130)
    assert "the same command goes on" in result.stderr
    assert "interrupted" in result.stderr


def test_errors_of_the_job_keep_their_words():
    assert str(FailureBudgetError(3, 10, 0.1)) == "3 of 10 images failed, the budget is 0.1"


def test_version_names_the_package_and_its_libraries(run):
    facts = json.loads(run("version", "--json").stdout)
    assert {"dicmh_ray", "python", "torch", "ray", "default_codec_id"} <= set(facts)
    assert "pyarrow" in run("version").stdout


@pytest.mark.parametrize(
    "command",
    ["compress", "report", "info", "verify", "decode", "ls", "train", "version", "bench"],
)
def test_every_command_has_help(run, command):
    assert "Usage: " in run(command, "--help").stdout


def test_minutes_of_a_human_view_that_nothing_teaches_are_a_usage_error(run, tmp_path):
    result = run("train", tmp_path, "-o", tmp_path / "run", "--human-minutes", 3, code=2)
    assert "without --teacher" in result.stderr


def test_the_options_of_compress_stand_in_sections(run):
    text = run("compress", "--help").stdout
    headings = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings[0] == "Arguments:"
    assert headings[-1] == "Options:"
    assert text.split("\nOptions:\n")[1].startswith("  --help")
    assert text.index("On Ray:") < text.index("--max-concurrency") < text.index("Resume, append")


def test_help_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from dicmh_ray.cli import app\n"
        "try:\n"
        "    app(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'PIL', 'fsspec'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_times_are_written_for_people():
    seconds = {0.4: "0 s", 59: "59 s", 61: "1 min 1 s", 7260: "2 h 1 min", 190_000: "2 d 4 h"}
    assert {one: time_text(one) for one in seconds} == seconds


def test_a_log_without_a_terminal_gets_one_line_for_each_state_of_the_job():
    text = io.StringIO()
    display = JobDisplay(Console(file=text, width=20, markup=False, highlight=False))
    report = JobReport(archive="a" * 90, runtime="local", codec_id="ab" * 32, units_total=7)
    display(report)
    display(report)  # within ten seconds of the first
    report.manifest = 1
    display(report)
    display(report)
    assert [line.partition(" ·")[0] for line in text.getvalue().splitlines()] == ["0/7 units"] * 2


WRITING_HERE = {
    "report": ["archive"],
    "train": ["photographs"],
    "train-tagger": ["photographs", "--labels", "labels.csv"],
    "k8s render": ["compress", "job.yaml"],
    "bench rd": ["pictures"],
    "bench tasks": ["pictures"],
    "bench all": ["pictures"],
    "convert": ["weights.safetensors"],
    "export-official": ["archive"],
    "fit-head": ["archive"],
}
"""Commands that write to a path of this machine, and the arguments that they cannot do without."""


def commands_below(command, name=""):
    for child, below in getattr(command, "commands", {}).items():
        yield from commands_below(below, f"{name} {child}".strip())
    if not hasattr(command, "commands"):
        yield name, command


def test_only_decode_writes_to_urls():
    found = {
        name
        for name, command in commands_below(typer.main.get_command(app))
        for option in command.params
        if "--output" in option.opts
    }
    assert found - {"decode"} == WRITING_HERE.keys()


@pytest.mark.parametrize("command", WRITING_HERE)
def test_a_url_is_refused_where_a_path_is_written(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*command.split(), *WRITING_HERE[command], "-o", "s3://bucket/out"]
    result = run(*arguments, code=2)
    assert "s3:/bucket/out is a URL, wanted a path on this machine" in " ".join(
        result.output.replace("│", " ").split()
    )
    assert not list(tmp_path.iterdir())
