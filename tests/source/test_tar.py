"""Tars of every dialect, webdataset's grouping, hostile members, broken connections."""

import contextlib
import gzip
import io
import json
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicmh_ray.errors import SourceChangedError, SourceFormatError
from dicmh_ray.source import SourceImage, SourceOptions, load_pixels, plan_units, read_unit
from dicmh_ray.source.store import RetryingFile
from tests.source.faults import FaultyFileSystem
from tests.source.pictures import (
    TAR_END,
    jpeg,
    pax_record,
    tar_bytes,
    tar_header,
    tar_member,
)

JPEGS = [jpeg(seed) for seed in range(4)]
FAST = SourceOptions(retry_base_s=0.0001, block_bytes=4096)


@pytest.fixture
def read(tmp_path):
    """Reads tar bytes as the plan's only unit."""

    def read_bytes(data: bytes, name: str = "x.tar", **options: object) -> list[SourceImage]:
        path = tmp_path / name
        path.write_bytes(data)
        settings = SourceOptions(**options)
        (unit,) = plan_units([str(path)], options=settings)
        return list(read_unit(unit, options=settings))

    return read_bytes


@pytest.fixture
def read_until_error(tmp_path):
    """Reads tar bytes; returns the images before the error and its reason."""

    def read_bytes(data: bytes, name: str = "x.tar", **options: object):
        path = tmp_path / name
        path.write_bytes(data)
        settings = SourceOptions(**options)
        (unit,) = plan_units([str(path)], options=settings)
        images: list[SourceImage] = []
        with pytest.raises(SourceFormatError) as caught:
            images.extend(read_unit(unit, options=settings))  # extend keeps what came before
        assert caught.value.source.endswith(name)
        return images, caught.value.reason

    return read_bytes


def keys(images: list[SourceImage]) -> list[str]:
    return [image.key for image in images]


def errors(images: list[SourceImage]) -> dict[str, str | None]:
    return {image.key: image.error and image.error.reason for image in images}


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name",
    ["a.jpg", "dir/sub/a.jpg", "x" * 80 + "/" + "y" * 90 + ".jpg", "日本/ü.jpg", "./a.jpg"],
)
def test_every_dialect_of_tar_gives_names_bytes_and_offsets(read, format, name):
    data = tar_bytes([(name, JPEGS[0]), ("z.jpg", JPEGS[1])], format)
    first, second = read(data)
    assert first.key == name.removesuffix(".jpg").removeprefix("./")
    assert (first.data, second.data) == (JPEGS[0], JPEGS[1])
    for image in (first, second):
        assert data[image.source_offset :].startswith(image.data)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_arrive_capped_and_distinct(read, format):
    names = ["k" * 65_000 + f"{i}.jpg" for i in range(2)]
    images = read(tar_bytes(zip(names, JPEGS, strict=False), format))
    assert len(set(keys(images))) == 2
    for image in images:
        assert len(image.key.encode()) == 1024
        assert image.key.startswith("kkkk")
        assert image.data in JPEGS


def test_v7_headers_and_ustar_prefixes_are_read(read):
    v7 = tar_header(b"old.jpg", len(JPEGS[0]), b"\x00", magic=b"") + tar_body(JPEGS[0])
    ustar = tar_header(b"new.jpg", len(JPEGS[1]), prefix=b"far/away") + tar_body(JPEGS[1])
    gnu = tar_header(b"gnu.jpg", len(JPEGS[2]), magic=b"ustar  \x00", prefix=b"0000")
    images = read(v7 + ustar + gnu + tar_body(JPEGS[2]) + TAR_END)
    assert keys(images) == ["old", "far/away/new", "gnu"]


def tar_body(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def test_base_256_sizes_and_pax_sizes_are_read(read):
    size = len(JPEGS[0])
    base_256 = tar_header(b"a.jpg", size_field=b"\x80" + size.to_bytes(11, "big"))
    pax = tar_member(b"p", pax_record(b"size", b"%d" % size), b"x") + tar_header(b"b.jpg", 0)
    images = read(base_256 + tar_body(JPEGS[0]) + pax + tar_body(JPEGS[0]) + TAR_END)
    assert [image.data for image in images] == [JPEGS[0]] * 2


def test_sidecars_become_metadata(read):
    labels = {"labels": ["Cat ", "dog", "cat"], "caption": "two animals", "score": float("nan")}
    (image,) = read(
        tar_bytes(
            [
                ("a.cls", b"7\n"),
                ("a.JPG", JPEGS[0]),
                ("a.json", json.dumps(labels).encode()),
                ("a.txt", "grüße".encode()),
                ("a.seg.npy", b"\x93NUMPY\x00\xff"),
            ]
        ),
        tag_fields=("json.labels", "cls", "missing"),
    )
    assert image.key == "a"
    assert image.metadata == {
        "labels": ["Cat ", "dog", "cat"],
        "caption": "two animals",
        "score": "nan",
        "cls": 7,
        "txt": "grüße",
        "__base64__": {"seg.npy": "k05VTVBZAP8="},
    }
    assert image.tags == ("Cat", "dog", "cat", "7")
    json.dumps(image.metadata, allow_nan=False)


@pytest.mark.parametrize(
    ("sidecar", "wanted"),
    [
        (b'{"txt": 1}', {"json": {"txt": 1}, "txt": "t"}),
        (b"[1, 2]", {"json": [1, 2], "txt": "t"}),
        (b"{broken", {"json": "{broken", "txt": "t"}),
        (b"[" * 100_000, {"json": "[" * 100_000, "txt": "t"}),
        (b"[" * 40 + b"]" * 40, {"json": "[" * 40 + "]" * 40, "txt": "t"}),
        (b'{"a": "\\ud800"}', {"a": "\\ud800", "txt": "t"}),
        (b"9" * 5000, {"json": "9" * 5000, "txt": "t"}),
        (b"\xff\xfe", {"json": "\\xff\\xfe", "txt": "t"}),
        (b"1e999", {"json": "inf", "txt": "t"}),
    ],
)
def test_json_of_any_shape_is_kept(read, sidecar, wanted):
    (image,) = read(tar_bytes([("a.jpg", JPEGS[0]), ("a.json", sidecar), ("a.txt", b"t")]))
    assert image.metadata == wanted
    json.dumps(image.metadata, allow_nan=False).encode()


def test_metadata_over_the_limit_is_listed_not_lost_in_silence(read):
    members = [("a.jpg", JPEGS[0]), ("a.txt", b"x" * 700), ("a.bin", b"y" * 700), ("a.cls", b"1")]
    (image,) = read(tar_bytes(members), max_metadata_bytes=1000)
    assert image.metadata == {"txt": "x" * 700, "cls": 1, "__dropped__": {"bin": 700}}


def test_every_image_of_a_sample_is_a_row(read):
    images = read(
        tar_bytes(
            [
                ("a.depth.png", JPEGS[1]),
                ("a.jpg", JPEGS[0]),
                ("a.png", JPEGS[2]),
                ("a.txt", b"t"),
                ("b.left.jpg", JPEGS[0]),
                ("b.right.jpg", JPEGS[1]),
                ("b.txt", b"pair"),
            ]
        )
    )
    assert keys(images) == ["a", "a.depth.png", "a.png", "b.left.jpg", "b.right.jpg"]
    assert [dict(image.metadata) for image in images] == [
        {"txt": "t"}, {}, {}, {"txt": "pair"}, {"txt": "pair"},
    ]  # fmt: skip


def test_a_key_that_comes_back_is_another_row(read):
    names = ["a.jpg", "b.jpg", "a.jpg", "b.txt", "a.jpg", "a~2.jpg"]
    images = read(tar_bytes([(name, JPEGS[0] if "jpg" in name else b"t") for name in names]))
    assert keys(images) == ["a", "b", "a~2", "b~2", "a~3", "a~2~2"]
    assert errors(images)["b~2"] == "no image in the sample"


def test_two_members_of_one_name_in_a_row_are_two_rows(read):
    images = read(tar_bytes([("a.jpg", JPEGS[0]), ("a.jpg", JPEGS[1])]))
    assert [(image.key, image.data) for image in images] == [("a", JPEGS[0]), ("a.jpg", JPEGS[1])]


def test_images_without_a_known_extension_are_found_by_their_bytes(read):
    images = read(
        tar_bytes([("photo1", JPEGS[0]), ("b.img", JPEGS[1]), ("LICENSE", b"text"), ("c.bin", b"")])
    )
    assert errors(images) == {
        "photo1": None,
        "b": None,
        "LICENSE": "no image in the sample",
        "c": "no image in the sample",
    }


def test_litter_of_archivers_is_passed_over_and_hidden_images_are_not(read):
    names = ["__index__", "._a.jpg", "d/.DS_Store", "__MACOSX/a.jpg", ".hidden.jpg", "a.jpg"]
    assert keys(read(tar_bytes([(name, JPEGS[0]) for name in names]))) == [".hidden", "a"]


HOSTILE_NAMES = {
    b"../../etc/x.jpg": "../../etc/x",
    b"/abs/y.jpg": "/abs/y",
    b"..\\..\\w.jpg": "..\\..\\w.jpg",  # one base name, whose first dot that counts is the third
    b"caf\xe9.jpg": "caf%E9",
    b"new\nline\x1b[31m.jpg": "new%0Aline%1B[31m",
    b".jpg": ".jpg",
    b"..jpg": "..jpg",
    b"a b'\"$(rm).jpg": "a b'\"$(rm)",
    b"C:\\x.jpg": "C:\\x",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_are_keys_and_never_paths(read, name, tmp_path):
    (image,) = read(tar_member(name, JPEGS[0]) + TAR_END)
    assert image.key == HOSTILE_NAMES[name]
    assert image.error is None
    image.key.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_nul_in_a_pax_path_is_escaped(read):
    record = pax_record(b"path", b"a\x00b/c\xff.jpg")
    (image,) = read(tar_member(b"p", record, b"x") + tar_member(b"short", JPEGS[0]) + TAR_END)
    assert image.key == "a%00b/c%FF"


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (b"1", "tar hard link"),
        (b"2", "tar symbolic link"),
        (b"3", "tar device"),
        (b"4", "tar device"),
        (b"6", "tar fifo"),
    ],
)
def test_links_and_devices_with_an_image_name_are_rows_with_an_error(read, kind, problem):
    data = tar_header(b"a.jpg", 0, kind) + tar_header(b"a.txt", 0, kind)
    images = read(data + tar_header(b"d/", 0, b"5") + tar_member(b"b.jpg", JPEGS[0]) + TAR_END)
    assert errors(images) == {"a": problem, "b": None}


def test_sparse_members_are_refused_and_the_rest_is_read(read):
    old = tar_header(b"s.jpg", 512, b"S", at_482=b"\x01") + bytes(512) + b"x" * 512
    new = tar_member(
        b"p", pax_record(b"GNU.sparse.major", b"1") + pax_record(b"GNU.sparse.name", b"n.jpg"), b"x"
    ) + tar_member(b"GNUSparseFile.0/n.jpg", b"x" * 512)
    images = read(old + new + tar_member(b"b.jpg", JPEGS[0]) + TAR_END)
    assert errors(images) == {"s": "tar sparse member", "n": "tar sparse member", "b": None}


def test_members_of_unknown_kind_are_named(read):
    images = read(tar_member(b"a.jpg", b"zz", b"Z") + tar_member(b"b.jpg", JPEGS[0]) + TAR_END)
    assert errors(images) == {"a": "tar member of unknown kind", "b": None}


def test_oversized_images_are_rows_with_an_error(read):
    members = [
        ("a.jpg", JPEGS[0] + bytes(5000)),
        ("b", JPEGS[1] + bytes(5000)),
        ("c.jpg", JPEGS[0]),
    ]
    images = read(tar_bytes(members), max_image_bytes=4000)
    assert errors(images) == {
        "a": "larger than max_image_bytes",
        "b": "larger than max_image_bytes",
        "c": None,
    }


def test_a_sample_larger_than_the_limit_keeps_its_first_image(read):
    members = [("a.jpg", JPEGS[0]), ("a.x.jpg", JPEGS[1]), ("b.jpg", JPEGS[2])]
    images = read(tar_bytes(members), max_member_bytes=max(map(len, JPEGS)) + 10)
    assert errors(images) == {
        "a": None,
        "a.x.jpg": "sample larger than max_member_bytes",
        "b": None,
    }


def test_empty_images_are_rows_with_an_error(read):
    assert errors(read(tar_bytes([("a.jpg", b"")]))) == {"a": "empty"}


def test_an_endless_sample_is_split_without_losing_a_member(read):
    data = tar_bytes([(f"a.{i}.txt", b"") for i in range(1500)] + [("a.jpg", JPEGS[0])])
    images = read(data)
    assert errors(images) == {"a": "no image in the sample", "a~2": None}
    assert sum(len(image.metadata) for image in images) == 1500


@pytest.mark.parametrize("kind", [b"x", b"L", b"g", b"K"])
def test_huge_headers_are_passed_over_in_little_memory(tmp_path, kind):
    body = pax_record(b"path", b"p" * 40_000_000)
    path = tmp_path / "x.tar"
    path.write_bytes(tar_member(b"h", body, kind) + tar_member(b"a.jpg", JPEGS[0]) + TAR_END)
    del body
    options = SourceOptions(block_bytes=65536)
    (unit,) = plan_units([str(path)], options=options)
    tracemalloc.start()
    images = list(read_unit(unit, options=options))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3_000_000
    assert errors(images) == {"a": "tar header too large"}


def test_many_small_headers_count_together(read):
    data = b"".join(tar_member(b"h", pax_record(b"comment", b"c" * 400), b"x") for _ in range(50))
    images = read(data + tar_member(b"a.jpg", JPEGS[0]) + TAR_END, max_header_bytes=10_000)
    assert errors(images) == {"a": "tar header too large"}


@pytest.mark.parametrize(
    "record",
    [b"garbage", b"99 path=a\n", b"5 pa\n", b"0 path=a\n", b"-5 path=a\n", b"10 pathab\n\n"],
)
def test_malformed_pax_records_end_the_reading_with_their_offset(read_until_error, record):
    good = tar_member(b"a.jpg", JPEGS[0])
    data = good + tar_member(b"p", record, b"x") + tar_member(b"b.jpg", JPEGS[1]) + TAR_END
    images, found = read_until_error(data)
    assert keys(images) == ["a"]
    assert f"byte {len(good) + 512}" in found


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (b"zzzzzzzzzzz\x00", "bad size"),
        (b"\x80" + b"\xff" * 11, "impossible size"),
        (b"\xff" * 12, "impossible size"),
        (b"77777777777\x00", "inside a member"),
        (b"\x80" + (10**12).to_bytes(11, "big"), "inside a member"),
    ],
)
def test_sizes_that_lie_are_errors_and_cost_no_memory(read_until_error, field, reason):
    data = tar_member(b"a.jpg", JPEGS[0]) + tar_header(b"b.jpg", size_field=field) + b"x" * 2000
    images, found = read_until_error(data)
    assert keys(images) == ["a"]
    assert reason in found


def test_a_tar_cut_anywhere_yields_what_was_whole_then_says_where(tmp_path):
    data = tar_bytes([(f"{i}.jpg", JPEGS[i]) for i in range(3)])
    ends = [data.index(image) + len(image) for image in JPEGS[:3]]
    path = tmp_path / "cut.tar"
    end_mark = ends[2] + -ends[2] % 512
    for length in [*range(0, end_mark, 97), end_mark]:
        path.write_bytes(data[:length])
        (unit,) = plan_units([str(path)])
        images = []
        with pytest.raises(SourceFormatError, match=r"cut off|ends at byte"):
            images.extend(read_unit(unit))
        assert [image.data for image in images] == [
            image for image, end in zip(JPEGS, ends, strict=False) if end <= length
        ]


def test_a_flipped_bit_in_a_header_is_found(read_until_error):
    data = bytearray(tar_bytes([("a.jpg", JPEGS[0]), ("b.jpg", JPEGS[1])]))
    second = data.index(b"b.jpg")
    data[second + 130] ^= 1
    images, found = read_until_error(bytes(data))
    assert keys(images) == ["a"]
    assert found == f"no tar header at byte {second}: a bad header checksum"


def test_zeroed_pages_in_the_middle_do_not_end_the_archive_in_silence(read_until_error):
    data = bytearray(tar_bytes([(f"{i}.jpg", JPEGS[i]) for i in range(4)]))
    second = data.index(b"1.jpg")
    data[second : second + 1024] = bytes(1024)
    images, found = read_until_error(bytes(data))
    assert keys(images) == ["0"]
    assert "after the end mark" in found


def test_members_after_the_end_mark_are_read(read):
    data = tar_bytes([("a.jpg", JPEGS[0])]) + tar_bytes([("b.jpg", JPEGS[1])])
    assert keys(read(data)) == ["a", "b"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_gzip_is_recognised_by_its_bytes(read, name):
    plain = tar_bytes([(f"{i}.jpg", JPEGS[i]) for i in range(4)])
    half = plain.index(b"2.jpg")
    packed = gzip.compress(plain[:half]) + gzip.compress(plain[half:]) + bytes(100)
    images = read(packed, name)
    assert [image.data for image in images] == JPEGS
    assert plain[images[2].source_offset :].startswith(JPEGS[2])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-200], "end early"),
        (lambda data: data[:50], "end early"),
        (lambda data: data[:900] + b"\x00\xff" * 50 + data[1000:], "damaged"),
        (lambda data: data + b"garbage", "damaged"),
        (lambda data: data[:10] + b"\xff" + data[11:], "damaged"),
    ],
)
def test_damaged_gzip_is_named(read_until_error, damage, reason):
    data = gzip.compress(tar_bytes([(f"{i}.jpg", JPEGS[i]) for i in range(4)]))
    images, found = read_until_error(damage(data), "x.tar.gz")
    assert reason in found
    assert all(image.data in JPEGS for image in images if not image.error)


def test_a_gzip_bomb_stops_early(tmp_path):
    path = tmp_path / "bomb.tar.gz"
    zeros = bytes(2**20)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(tar_header(b"a.jpg", 200 * 2**20))
        for _ in range(200):
            file.write(zeros)
    (unit,) = plan_units([str(path)])
    tracemalloc.start()
    with pytest.raises(SourceFormatError, match="decompression bomb"):
        list(read_unit(unit, options=SourceOptions(max_image_bytes=2**20, max_unpacked_ratio=20)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 40 * 2**20


@pytest.mark.parametrize("magic", [b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"])
def test_other_compressions_are_refused_by_name(read_until_error, magic):
    _, found = read_until_error(magic + bytes(600))
    assert found.startswith("is ")


def test_something_else_that_is_named_tar_is_refused(read_until_error):
    for data in (b"", b"hello", b"<html>" * 200):
        images, _ = read_until_error(data)
        assert images == []


@pytest.fixture
def weather():
    FaultyFileSystem.calm()
    yield FaultyFileSystem
    FaultyFileSystem.calm()


@pytest.fixture
def large_tar(tmp_path):
    """About 400 kB in 60 samples of uneven sizes."""
    noise = random.Random(7)
    members = []
    for i in range(60):
        members.append((f"{i:03d}.jpg", JPEGS[i % 4] + noise.randbytes(noise.randrange(9000))))
        members.append((f"{i:03d}.json", b'{"i": %d}' % i))
    path = tmp_path / "large.tar"
    path.write_bytes(tar_bytes(members))
    (tmp_path / "large.tar.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("is_seekable", [True, False])
def test_a_broken_connection_at_any_10_kib_loses_and_repeats_nothing(
    weather, large_tar, suffix, is_seekable
):
    (unit,) = plan_units([f"faulty://{large_tar}{suffix}"], options=FAST)
    expected = list(read_unit(unit, options=FAST))
    assert len(expected) == 60
    size = unit.num_bytes
    for offset in range(0, size, 10 * 1024):
        weather.calm()
        weather.is_seekable = is_seekable
        weather.break_at = [offset]
        assert list(read_unit(unit, options=FAST)) == expected
        assert weather.num_breaks == 1


def test_connections_that_break_everywhere_and_read_short_lose_nothing(weather, large_tar):
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    expected = list(read_unit(unit, options=FAST))
    weather.max_read_bytes = 1000
    weather.break_at = sorted(random.Random(1).sample(range(unit.num_bytes), 200))
    assert list(read_unit(unit, options=FAST)) == expected
    assert weather.num_breaks == 200


def test_a_reply_that_ends_early_without_an_error_is_taken_up_again(weather, large_tar):
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    expected = list(read_unit(unit, options=FAST))
    weather.breaks_silently = True
    weather.break_at = list(range(5000, unit.num_bytes, 50_000))
    assert list(read_unit(unit, options=FAST)) == expected


def test_a_store_that_stays_broken_raises_its_own_error_after_bounded_attempts(weather, large_tar):
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    weather.break_at, weather.is_permanent = [100_000], True
    images = []
    with pytest.raises(ConnectionResetError):
        images.extend(read_unit(unit, options=FAST))
    assert weather.num_breaks == FAST.num_retries + 1
    assert 0 < len(images) < 60


def test_errors_that_cannot_pass_are_not_retried(weather, large_tar):
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    weather.break_at, weather.error = [100_000], PermissionError("no")
    with pytest.raises(PermissionError):
        list(read_unit(unit, options=FAST))
    assert weather.num_breaks == 1


def test_errors_of_http_clients_that_are_no_oserror_are_retried(weather, large_tar):
    client_error = type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client"})
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    weather.break_at, weather.error = [100_000], client_error("payload")
    assert len(list(read_unit(unit, options=FAST))) == 60


def test_a_tar_replaced_while_it_is_read_is_not_mixed(weather, large_tar):
    (unit,) = plan_units([f"faulty://{large_tar}"], options=FAST)
    weather.break_at = [100_000]
    images = read_unit(unit, options=FAST)
    next(images)
    large_tar.write_bytes(large_tar.read_bytes() + bytes(512))
    with pytest.raises(SourceChangedError, match="changed while"):
        list(images)


def test_a_tar_replaced_after_the_plan_is_refused(large_tar):
    (unit,) = plan_units([str(large_tar)])
    large_tar.write_bytes(tar_bytes([("a.jpg", JPEGS[0])]))
    with pytest.raises(SourceChangedError, match="changed after"):
        list(read_unit(unit))
    large_tar.unlink()
    with pytest.raises(FileNotFoundError):
        list(read_unit(unit))


def test_reading_needs_far_less_memory_than_the_tar(tmp_path):
    path = tmp_path / "big.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(60):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(2**20)))
    options = SourceOptions(block_bytes=2**20)
    (unit,) = plan_units([str(path)], options=options)
    tracemalloc.start()
    assert sum(1 for _ in read_unit(unit, options=options)) == 60
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 12 * 2**20


def test_a_retrying_file_is_a_file(large_tar):
    data = large_tar.read_bytes()
    with RetryingFile(str(large_tar), FAST) as file:
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        assert file.read(5) == b""
        file.seek(100)
        file.seek(50, io.SEEK_CUR)
        assert (file.read(7), file.tell()) == (data[150:157], 157)
        buffer = bytearray(4)
        assert file.readinto(buffer) == 4
        assert buffer == data[157:161]


SEED_TAR = tar_bytes(
    [("a.jpg", JPEGS[0]), ("a.json", b'{"x": 1}'), ("é" * 120 + ".jpg", JPEGS[1])],
    tarfile.PAX_FORMAT,
)


@settings(max_examples=120, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SEED_TAR) - 1), st.binary(min_size=1, max_size=12))
    ),
    cut=st.integers(1, len(SEED_TAR)),
)
def test_damaged_tars_give_rows_or_a_format_error_and_nothing_else(tmp_path_factory, edits, cut):
    data = bytearray(SEED_TAR)
    for position, piece in edits:
        data[position : position + len(piece)] = piece
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    path.write_bytes(bytes(data[:cut]))
    (unit,) = plan_units([str(path)])
    images = []
    with contextlib.suppress(SourceFormatError):
        images.extend(read_unit(unit))
    for image in images:
        image.key.encode()
        json.dumps(image.metadata, allow_nan=False).encode()


def test_real_pixels_come_out(read):
    (image,) = read(tar_bytes([("a.jpg", JPEGS[0])]))
    assert load_pixels(image.data).image.shape == (24, 32, 3)
