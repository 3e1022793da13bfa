"""Files of the official program become an archive, and files again: what stays, what is told."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dicmh_ray import open_archive
from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.cli import app
from dicmh_ray.codec import load_codec
from dicmh_ray.codec.icmh import icmh_codec
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.icmh_codec import IcmhCodec
from dicmh_ray.codec.icmh.official import OfficialStream, parse_official, write_official
from dicmh_ray.codec.icmh.transcode import Latents, latents_of_official, official_of_latents
from dicmh_ray.errors import (
    EncodeError,
    InvalidHeaderError,
    SourceFormatError,
    SourceNotFoundError,
    TagsError,
)
from dicmh_ray.pipeline import official as pipeline
from dicmh_ray.pipeline.official import ImportOptions, Size, plan_import, read_sizes
from dicmh_ray.tags import Vocabulary
from tests.codec.icmh.small_latent_coder import reference_coder, reference_tensors
from tests.codec.icmh.tiny_codec import WORDS, photograph, write_tiny_checkpoint

SIZES = {"one": (100, 60), "two.v2": (64, 64), "sub/three": (150, 130)}
"""Of the official files: width and height."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codec(tiny_checkpoint: Path) -> IcmhCodec:
    loaded = load_codec(tiny_checkpoint, device="cpu")
    assert isinstance(loaded, IcmhCodec)
    return loaded


@pytest.fixture(scope="module")
def streams(codec: IcmhCodec) -> dict[str, bytes]:
    """Our streams of three pictures: with tags, and the last without."""
    tags = {"one": ("cat", "tree"), "two.v2": ("dog",), "sub/three": ()}
    return {
        name: codec.encode([photograph(height, width)], tags=[tags[name]], exif_orientations=[1])[0]
        for name, (width, height) in SIZES.items()
    }


@pytest.fixture(scope="module")
def official(codec: IcmhCodec, streams: dict[str, bytes]) -> dict[str, bytes]:
    """The same as official files."""
    return {name: codec.export_official(data) for name, data in streams.items()}


@pytest.fixture
def folder(official: dict[str, bytes], tmp_path: Path) -> Path:
    """The official files, and what else lies in such folders."""
    root = tmp_path / "bitstreams"
    (root / "sub").mkdir(parents=True)
    for name, data in official.items():
        (root / name).write_bytes(data)
    (root / "one.png").write_bytes(b"a picture")
    (root / "log.txt").write_text("bpp 0.1")
    (root / ".hidden").write_text("")
    return root


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    return write_sizes(tmp_path / "sizes.csv", SIZES)


def write_sizes(path: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    lines = [f"{name},{width},{height}\n" for name, (width, height) in sizes.items()]
    path.write_text("file,width,height\n" + "".join(lines))
    return path


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture
def imported(folder: Path, sizes: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An archive of the files."""
    archive = tmp_path / "archive"
    options = ("--checkpoint", tiny_checkpoint, "--sizes", sizes, "--device", "cpu")
    run("import-official", folder, archive, *options)
    return archive


def rows_of(archive: Path) -> dict[str, dict[str, object]]:
    columns = "key,status,error,tags,width,height,bpp,tier,psnr,num_states,original_sha256,"
    columns += "original_bytes,original_format,metadata"
    lines = run("ls", archive, "--json", "--columns", columns).splitlines()
    return {row["key"]: row for row in map(json.loads, lines)}


def test_there_and_back_gives_both_files_byte_for_byte(
    codec: IcmhCodec, streams: dict[str, bytes], official: dict[str, bytes]
) -> None:
    for name, (width, height) in SIZES.items():
        stream = parse_official(official[name])
        ours = codec.import_official(stream, width=width, height=height)
        assert ours == streams[name]
        assert codec.export_official(ours) == official[name]


def test_a_file_of_the_original_modules_comes_back_byte_for_byte(reference: Path) -> None:
    data = bytes.fromhex(json.loads((reference / "stream.json").read_text())["stream"])
    coder = reference_coder(reference)
    coder.update_tables()
    tensors = reference_tensors(reference)
    exact = ExactEntropyModel.fit(coder, [(tensors["x"], tensors["ref"])])
    stream = parse_official(data)
    latents = latents_of_official(stream, coder)
    coded = exact.encode(*latents)
    carried = Latents(coded.y_hat, coded.z_hat)
    assert np.abs(carried.y_MIJ - latents.y_MIJ).max() > 0, "the means are not the same"
    again = official_of_latents(carried, coder, tag_ids=stream.tag_ids)
    assert write_official(again) == data


def test_across_tiles_y_moves_by_half_a_step_at_most_and_the_file_still_comes_back(
    codec: IcmhCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = codec.encode([photograph(200, 330)], tags=[()], exif_orientations=[1])[0]
    stream = parse_official(codec.export_official(data))
    monkeypatch.setattr(icmh_codec, "TILE", 2)
    ours = codec.import_official(stream, width=330, height=200)
    assert ours != data
    again = parse_official(codec.export_official(ours))
    assert again == stream
    given = latents_of_official(stream, codec._official_coder())
    kept = codec._decode_latents(ours, None)[1]
    assert 0.1 < np.abs(kept.y_MIJ - given.y_MIJ).max() <= 0.51
    assert np.abs(kept.z_NKL - given.z_NKL).max() < 0.01


def test_latents_need_no_picture(codec: IcmhCodec) -> None:
    image = photograph(40, 70)
    data = codec.encode_latents(
        codec._analyse(image), width=70, height=40, tags=["dog"], exif_orientation=3
    )
    assert data == codec.encode([image], tags=[("dog",)], exif_orientations=[3])[0]


def test_latents_that_no_stream_holds_are_refused(codec: IcmhCodec) -> None:
    latents = codec._analyse(photograph(40, 70))
    with pytest.raises(ValueError, match=r"\(1, 2\) cells for 70x70"):
        codec.encode_latents(latents, width=70, height=70)
    for array in latents:
        kept = array.flat[3]
        for value, fault in ((1e6, "beyond the symbols"), (np.nan, "not finite")):
            array.flat[3] = value
            with pytest.raises(EncodeError, match=fault):
                codec.encode_latents(latents, width=70, height=40)
        array.flat[3] = kept


def test_a_size_that_pads_to_another_is_named(codec: IcmhCodec, official: dict[str, bytes]) -> None:
    stream = parse_official(official["one"])
    with pytest.raises(InvalidHeaderError, match=r"\(1, 2\), wanted \(2, 2\) for 100x65"):
        codec.import_official(stream, width=100, height=65)


@pytest.mark.parametrize(
    ("tag_ids", "fault"), [((3,), "word number 3"), ((1, 1), "twice"), ((4584,), r"0\.\.2")]
)
def test_tags_that_the_vocabulary_does_not_have_are_named(
    codec: IcmhCodec, official: dict[str, bytes], tag_ids: tuple[int, ...], fault: str
) -> None:
    stream = dataclasses.replace(parse_official(official["one"]), tag_ids=tag_ids)
    with pytest.raises(TagsError, match=fault):
        codec.import_official(stream, width=100, height=60)


def test_tags_that_have_no_number_are_all_named(
    codec: IcmhCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(20, 20)
    (data,) = codec.encode([image], tags=[("dog", "a zoo", "red")], exif_orientations=[1])
    with pytest.raises(TagsError, match=r"official list: 'a zoo', 'red'$"):
        codec.export_official(data)
    words = (*WORDS, *(f"word {n}" for n in range(4582)), "beyond")
    monkeypatch.setattr(codec, "_vocabulary", Vocabulary(words))
    (data,) = codec.encode([image], tags=[("beyond", "word 4581")], exif_orientations=[1])
    with pytest.raises(TagsError, match=r"official list: 'beyond'$"):
        codec.export_official(data)


def test_a_codec_without_a_vocabulary_carries_files_without_tags(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, has_human_view=False, words=())
    plain = load_codec(tmp_path, device="cpu")
    assert isinstance(plain, IcmhCodec)
    (data,) = plain.encode([photograph(20, 20)], tags=[()], exif_orientations=[1])
    file = plain.export_official(data)
    stream = parse_official(file)
    assert plain.import_official(stream, width=20, height=20) == data
    with pytest.raises(TagsError, match="has no vocabulary"):
        plain.import_official(dataclasses.replace(stream, tag_ids=(0,)), width=20, height=20)
    (data,) = plain.encode([photograph(20, 20)], tags=[("cat",)], exif_orientations=[1])
    with pytest.raises(TagsError, match="'cat'"):
        plain.export_official(data)


def test_a_tag_part_of_no_tags_is_not_written_again(
    codec: IcmhCodec, official: dict[str, bytes]
) -> None:
    stream = dataclasses.replace(parse_official(official["sub/three"]), tag_ids=())
    data = codec.import_official(stream, width=150, height=130)
    assert codec.export_official(data) == official["sub/three"]
    assert len(write_official(stream)) == len(official["sub/three"]) + 12


def test_an_archive_of_official_files_opens_and_verifies(
    imported: Path, official: dict[str, bytes], streams: dict[str, bytes], codec: IcmhCodec
) -> None:
    assert "sound" in run("verify", imported, "--decode", "--device", "cpu")
    rows = rows_of(imported)
    assert set(rows) == set(SIZES)
    assert {name: row["tags"] for name, row in rows.items()} == {
        "one": ["cat", "tree"],
        "two.v2": ["dog"],
        "sub/three": [],
    }
    row = rows["one"]
    stream = parse_official(official["one"])
    assert row["bpp"] == pytest.approx(8 * len(streams["one"]) / 6000)
    assert json.loads(str(row["metadata"]))["official"] == {
        "y_bytes": len(stream.y_string),
        "z_bytes": len(stream.z_string),
        "num_tags": 2,
        "is_padded_size": False,
    }
    assert row["original_bytes"] == len(official["one"])
    assert [row[name] for name in ("status", "error", "tier", "psnr", "original_format")] == [
        "ok",
        None,
        "none",
        None,
        "diff-icmh",
    ]
    archive = open_archive(str(imported), device="cpu")
    for name, (width, height) in SIZES.items():
        view = archive[name]
        assert (view.width, view.height) == (width, height)
        assert view.original == b""
        assert view.bitstream() == streams[name]
        np.testing.assert_array_equal(view.pixels(), codec.decode([streams[name]])[0])
    info = json.loads(run("info", imported, "--json"))
    assert (info["ok"], info["complete"], info["mean_psnr"]) == (3, True, None)


def test_an_archive_of_official_files_becomes_the_same_files(
    imported: Path, official: dict[str, bytes], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out, table = tmp_path / "out", tmp_path / "out.csv"
    lines = run("export-official", imported, "-o", out, "--sizes", table, "--device", "cpu")
    paths = dict(line.split("\t") for line in lines.splitlines())
    assert {name: Path(path).read_bytes() for name, path in paths.items()} == official
    found = {Path(path).name: SIZES[name] for name, path in paths.items()}
    assert found.items() <= read_sizes(table).items()
    again = tmp_path / "again"
    options = ("--checkpoint", tiny_checkpoint, "--sizes", table, "--device", "cpu")
    run("import-official", out, again, *options)
    assert {row["original_sha256"] for row in rows_of(again).values()} == {
        row["original_sha256"] for row in rows_of(imported).values()
    }


def test_a_filter_chooses_what_is_exported(imported: Path, tmp_path: Path) -> None:
    where = ("--where", "'dog' in tags")
    out = run("export-official", imported, "-o", tmp_path / "out", *where, "--device", "cpu")
    assert out == f"two.v2\t{tmp_path / 'out' / 'two.v2'}\n"


def test_a_second_run_has_nothing_to_do(
    imported: Path, folder: Path, sizes: Path, tiny_checkpoint: Path
) -> None:
    before = {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}
    options = ("--checkpoint", tiny_checkpoint, "--sizes", sizes, "--device", "cpu", "--json")
    report = json.loads(run("import-official", folder, imported, *options))
    assert (report["units_resumed"], report["units_done"], report["manifest"]) == (1, 0, 1)
    assert before == {path: path.read_bytes() for path in imported.rglob("*") if path.is_file()}


def test_a_killed_import_goes_on_where_it_stopped(
    folder: Path,
    sizes: Path,
    tiny_checkpoint: Path,
    codec: IcmhCodec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "FILES_PER_UNIT", 1)
    archive = tmp_path / "archive"
    job, todo, _ = plan_import(
        [str(folder)],
        str(archive),
        checkpoint=tiny_checkpoint,
        options=ImportOptions(sizes=read_sizes(sizes)),
    )
    pickle.loads(pickle.dumps(job)).run_unit(todo[1], codec)
    options = ("--checkpoint", tiny_checkpoint, "--sizes", sizes, "--device", "cpu", "--json")
    report = json.loads(run("import-official", folder, archive, *options))
    assert (report["units_total"], report["units_resumed"], report["units_done"]) == (3, 1, 2)
    assert set(rows_of(archive)) == set(SIZES)
    assert "sound" in run("verify", archive)


def test_other_sizes_are_another_plan(
    imported: Path, folder: Path, sizes: Path, tiny_checkpoint: Path
) -> None:
    write_sizes(sizes, {**SIZES, "one": (99, 60)})
    options = ("--checkpoint", tiny_checkpoint, "--sizes", sizes, "--device", "cpu")
    assert "belongs to plan" in run("import-official", folder, imported, *options, code=1)


def test_files_that_are_of_no_use_become_rows_that_say_why(
    folder: Path, official: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    whole = parse_official(official["sub/three"])
    flipped = bytearray(whole.y_string)
    flipped[len(flipped) // 2] ^= 0x10
    damaged: dict[str, bytes] = {
        "cut": official["one"][:30],
        "empty": b"",
        "flipped": write_official(dataclasses.replace(whole, y_string=bytes(flipped))),
        "shorter": write_official(dataclasses.replace(whole, y_string=whole.y_string[:-4])),
        "noise": np.random.default_rng(0).bytes(500),
        "of-no-size": official["one"],
        "of-another-size": official["one"],
        "tagged": write_official(dataclasses.replace(whole, tag_ids=(7,))),
    }
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    named = {name: (150, 130) for name in damaged if name != "of-no-size"}
    table = write_sizes(tmp_path / "sizes.csv", SIZES | named)
    archive = tmp_path / "archive"
    options = ("--checkpoint", tiny_checkpoint, "--sizes", table, "--device", "cpu")
    told = run("import-official", folder, archive, *options, code=3)
    assert "8 of 11 images failed" in told
    rows = rows_of(archive)
    assert {name for name, row in rows.items() if row["status"] == "ok"} == set(SIZES)
    errors = {name: str(rows[name]["error"]) for name in damaged}
    assert {name: text.partition(":")[0] for name, text in errors.items()} == {
        "cut": "unreadable",
        "empty": "unreadable",
        "flipped": "undecodable",
        "shorter": "undecodable",
        "noise": "unreadable",
        "of-no-size": "wrong-size",
        "of-another-size": "wrong-size",
        "tagged": "tag-failed",
    }
    assert all(rows[name]["status"] == "failed" for name in damaged)
    assert "(1, 2), wanted (3, 3) for 150x130" in errors["of-another-size"]
    assert "padded it is 128x64" in errors["of-no-size"]
    assert "sound" in run("verify", archive)
    report = json.loads(run("info", archive, "--json"))
    counts = {"tag-failed": 1, "undecodable": 2, "unreadable": 3, "wrong-size": 2}
    assert report["causes"] == counts
    found = run("export-official", archive, "-o", tmp_path / "out", "--device", "cpu", code=1)
    assert found.count("error: ") == len(damaged)
    assert {path.name.partition("-")[0] for path in (tmp_path / "out").iterdir()} == {
        "one",
        "two.v2",
        "sub_three",
    }


def test_the_bytes_of_the_files_are_kept_on_request(
    folder: Path, official: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (folder / "cut").write_bytes(official["one"][:30])
    archive = tmp_path / "archive"
    options = ("--checkpoint", tiny_checkpoint, "--padded", "--device", "cpu")
    run("import-official", folder, archive, *options, "--keep-original", "--failure-budget", "1")
    opened = open_archive(str(archive), device="cpu")
    kept = {view.key: view.original for view in opened}
    assert kept == official | {"cut": official["one"][:30]}
    assert opened["cut"].status == "kept_original"
    assert opened["one"].status == "ok"
    assert opened["one"].metadata["official"]["is_padded_size"]
    assert opened["one"].pixels().shape == (64, 128, 3)
    assert "sound" in run("verify", archive)


def test_a_look_at_the_files_writes_nothing(
    folder: Path, official: dict[str, bytes], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stream = dataclasses.replace(parse_official(official["one"]), tag_ids=(2, 5))
    (folder / "tagged").write_bytes(write_official(stream))
    (folder / "cut").write_bytes(official["one"][:30])
    options = ("--checkpoint", tiny_checkpoint, "--padded", "--dry-run")
    found = json.loads(run("import-official", folder, tmp_path / "a", *options, "--json"))
    rows = {row["file"]: row for row in found}
    assert not (tmp_path / "a").exists()
    assert set(rows) == {*SIZES, "tagged", "cut"}
    assert rows["one"] == {
        "file": "one",
        "width": 128,
        "height": 64,
        "padded": [128, 64],
        "tags": 2,
        "error": None,
    }
    assert rows["tagged"]["error"] == "tag-failed: word number 5, the checkpoint has 3 words"
    assert rows["cut"]["error"].startswith("unreadable: ")
    lines = run("import-official", folder, tmp_path / "a", *options).splitlines()
    assert "sub/three\t192\t192\t192x192\t-\t-" in lines
    assert lines[-1] == "5 files, 2 of them of no use"


@pytest.mark.parametrize("options", [(), ("--padded", "--sizes", "sizes.csv")])
def test_the_size_is_said_in_one_way(
    folder: Path, sizes: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sizes.parent)
    told = run("import-official", folder, "a", "--checkpoint", "any", *options, code=2)
    assert "--padded" in told
    assert not Path("a").exists()


def test_only_a_codec_of_this_kind_takes_official_files(folder: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", "default", "--padded")
    told = run("import-official", folder, tmp_path / "a", *options, code=1)
    assert "need a checkpoint of diff-icmh" in told
    assert not (tmp_path / "a").exists()


def test_sources_that_hold_no_official_file_are_refused(folder: Path) -> None:
    options = pipeline.SourceOptions()
    (folder / "shard.tar").write_bytes(b"")
    with pytest.raises(SourceFormatError, match="tar file"):
        pipeline.plan_files([str(folder / "shard.tar")], options)
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"")
    for source in (folder / "pictures", folder / "missing"):
        with pytest.raises(SourceNotFoundError):
            pipeline.plan_files([str(source)], options)


def test_sizes_are_found_by_key_by_name_and_without_the_extension(tmp_path: Path) -> None:
    table = tmp_path / "sizes.csv"
    table.write_bytes(
        b"\xef\xbb\xbfheight,file,width\r\n60,one.png,100\r\n64,sub/two,65\r\n1,a.b,1\r\n1,a.c,2\r\n"
    )
    options = ImportOptions(sizes=read_sizes(table))
    stream = OfficialStream(z_shape=(1, 2), y_string=bytes(8), z_string=bytes(8), tag_ids=None)
    assert options.size_of("one", stream) == Size(100, 60)
    assert options.size_of("a/one.png", stream) == Size(100, 60)
    assert options.size_of("sub/two", stream) == Size(65, 64)
    assert options.size_of("two", stream) is None
    assert options.size_of("a", stream) is None, "of two sizes"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,width\na,1\n", "no column 'height'"),
        ("", "no column 'file'"),
        ("file,width,height\na,1\n", "line 2: no size"),
        ("file,width,height\na,1,2\nb,one,2\n", "line 3: no size"),
        ("file,width,height\na,0,2\n", "line 2: no picture is 0x2"),
        ("file,width,height\na,65536,2\n", "no picture"),
        ("file,width,height\na,1,2\na,1,3\n", "line 3: 'a' has another size"),
        ("file,width,height\n,1,2\n", "line 2: ''"),
    ],
)
def test_a_table_of_sizes_that_is_none_names_its_line(
    tmp_path: Path, text: str, fault: str
) -> None:
    (tmp_path / "sizes.csv").write_text(text)
    with pytest.raises(SourceFormatError, match=fault):
        read_sizes(tmp_path / "sizes.csv")


def test_tags_of_an_imported_stream_need_the_vocabulary(
    codec: IcmhCodec, streams: dict[str, bytes]
) -> None:
    vocabulary = Vocabulary(WORDS)
    assert parse_bitstream(streams["one"], vocabulary=vocabulary).tags == ("cat", "tree")
    assert codec._vocabulary == vocabulary
