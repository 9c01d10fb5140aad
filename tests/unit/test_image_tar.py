"""The tar reader agrees with tar(1) on good archives, and refuses bad ones instead of guessing."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.image.tar import Member, Reader
from insula.model.errors import Invalid
from tests.support.images import member, tar


def read(data: bytes) -> list[tuple[Member, bytes]]:
    """All members with their content, holes filled."""
    reader = Reader(io.BytesIO(data).read)
    found = []
    for entry in reader:
        content = b""
        for offset, chunk in reader.data(entry):
            content = content.ljust(offset, b"\0") + chunk
        found.append((entry, content.ljust(entry.size, b"\0")))
    return found


def refused(data: bytes, why: str) -> None:
    with pytest.raises(Invalid, match=why) as e:
        read(data)
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with everything that the formats treat specially."""
    top = tmp_path_factory.mktemp("sample")
    (top / "empty").touch()
    (top / ("d" * 200)).mkdir()
    (top / ("d" * 200) / ("f" * 200)).write_bytes(b"long path")
    (top / "ünïcode").write_bytes(b"x" * 513)
    os.symlink("t" * 200 + "/" + "u" * 200, top / "link")
    os.link(top / "empty", top / "hard")
    os.mkfifo(top / "fifo")
    with open(top / "sparse", "wb") as file:
        for at in range(40):  # more pieces than one GNU header holds
            file.seek(at * 65536 * 2)
            file.write(bytes([at + 1]) * 4096)
        file.truncate(40 * 65536 * 2 + 777)
    with open(top / "hole", "wb") as file:
        file.truncate(1 << 20)
    os.utime(top / "empty", ns=(1, 1_234_567_890_123_456_789))
    return top


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=gnu", "--sparse"],
        ["--format=pax"],
        ["--format=pax", "--sparse", "--sparse-version=0.0"],
        ["--format=pax", "--sparse", "--sparse-version=0.1"],
        ["--format=pax", "--sparse", "--sparse-version=1.0"],
    ],
    ids=" ".join,
)
def test_archives_of_gnu_tar_are_read(sample: Path, options: list[str]) -> None:
    command = ["tar", *options, "--sort=name", "-C", str(sample), "-cf", "-", "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    names = {"."}
    for entry, content in read(data):
        name = os.fsdecode(entry.name).strip("/")
        path = sample / name
        names.add(name.removeprefix("./"))
        status = path.lstat()
        assert (entry.mode, entry.uid, entry.gid) == (status.st_mode & 0o7777, status.st_uid, status.st_gid)
        assert abs(entry.mtime_ns - status.st_mtime_ns) < (10**9 if "--format=gnu" in options else 1)
        if entry.kind == tarfile.REGTYPE:
            assert content == path.read_bytes()
        elif entry.kind == tarfile.SYMTYPE:
            assert os.fsdecode(entry.link) == os.readlink(path)
    assert names == {"."} | {str(path.relative_to(sample)) for path in sample.rglob("*")}


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_python_are_read(style: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        info, data = member("a/" * 50 + "file", b"content", mtime=7, uid=12, gid=34, mode=0o4755)
        archive.addfile(info, io.BytesIO(data))
    [(entry, content)] = read(buffer.getvalue())
    assert entry.name == b"a/" * 50 + b"file"
    assert (entry.uid, entry.gid, entry.mode, entry.mtime_ns, content) == (12, 34, 0o4755, 7 * 10**9, b"content")


def test_the_end_marker_is_noticed() -> None:
    for end in (True, False):
        reader = Reader(io.BytesIO(tar(member("a", b"x"), end=end)).read)
        assert [entry.name for entry in reader] == [b"a"]
        assert reader.finished is end


def test_archives_that_are_cut_off_are_refused() -> None:
    data = tar(member("a", b"x" * 1000), member("b", b"y"))
    for length in (1, 511, 513, 1000, 1535, 2047):
        refused(data[:length], "cut off")


def header(**changes: bytes) -> bytes:
    """A ustar header of a file, some of its fields replaced, with the checksum that it then needs."""
    places = {"name": 0, "mode": 100, "uid": 108, "size": 124, "mtime": 136, "kind": 156, "link": 157, "magic": 257}
    block = bytearray(member("file", b"")[0].tobuf(tarfile.USTAR_FORMAT))
    for field, value in changes.items():
        at = places[field]
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: bytes) -> bytes:
    return tar(member("pax", b"".join(records), kind=tarfile.XHDTYPE), end=False, format=0)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d" % length + rest


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"not a tar archive" * 100, "broken|checksum"),
        (header()[:148] + b"0000000\0" + header()[156:], "checksum"),
        (header(size=b"0000000000x"), "broken size"),
        (header(size=b"\xff" * 12), "invalid size"),
        (header(size=b"\x80" + b"\xff" * 11), "invalid size"),
        (header(size=b"00000000001\0", kind=b"5"), "invalid size"),
        (header(size=b"77777777777\0"), "cut off"),
        (header(mtime=b"\x80" + b"\xff" * 11), "time"),
        (header(kind=b"V"), "type"),
        (header(kind=b"M"), "type"),
        (header(name=b"\0"), "empty"),
        (header(kind=b"x", size=b"77777777777\0"), "extended header"),
        (header(kind=b"L", size=b"00000100000\0"), "extended header"),
        (pax(b"3 a"), "pax header"),
        (pax(b"0 a=b\n"), "pax header"),
        (pax(b"99 a=b\n"), "pax header"),
        (pax(b"6 a=bc"), "pax header"),
        (pax(b"-6 a=b\n"), "number"),
        (pax(b"99999999999999999999999 a=b\n"), "number|pax header"),
        (pax(record(b"path", b"a\0b")) + header(), "NUL"),
        (pax(record(b"size", b"-1")) + header(), "number"),
        (pax(record(b"size", b"9" * 19)) + header(), "invalid size|cut off"),
        (pax(record(b"path", b"x" * 5000)) + header(), "overlong"),
        (pax(record(b"mtime", b"1e9")) + header(), "number"),
        (pax(record(b"mtime", b"1.x")) + header(), "time"),
        (pax() + pax() + header(), "two pax headers"),
        (pax(record(b"path", b"a")) + bytes(1024), "after an extended header"),
        (pax(record(b"GNU.sparse.map", b"0,5"), record(b"GNU.sparse.size", b"9")) + header(), "broken map"),
        (pax(record(b"GNU.sparse.map", b"5,0,0,0"), record(b"GNU.sparse.size", b"9")) + header(), "broken map"),
        (pax(record(b"GNU.sparse.map", b"0,3,2,2"), record(b"GNU.sparse.size", b"9")) + header(), "broken map"),
        (pax(record(b"GNU.sparse.map", b"4,1,0,4"), record(b"GNU.sparse.size", b"9")) + header(), "broken map"),
        (pax(record(b"GNU.sparse.map", b"0"), record(b"GNU.sparse.size", b"9")) + header(), "broken map"),
        (pax(record(b"GNU.sparse.major", b"2"), record(b"GNU.sparse.minor", b"0")) + header(), "unknown format"),
        (tar(member("g", record(b"path", b"x"), kind=tarfile.XGLTYPE), end=False, format=0) + header(), "all members"),
    ],
)
def test_archives_against_the_standards_are_refused(data: bytes, why: str) -> None:
    refused(data, why)


def test_pieces_of_a_sparse_file_may_touch_but_not_overlap() -> None:
    def sparse(places: bytes) -> bytes:
        return pax(record(b"GNU.sparse.map", places), record(b"GNU.sparse.size", b"9")) + tar(member("s", b"12345"))

    assert read(sparse(b"0,3,3,2"))[0][1] == b"12345\0\0\0\0"
    assert read(sparse(b"1,0,1,3,7,2"))[0][1] == b"\x00123\0\0\x0045"
    for overlapping in (b"0,3,2,2", b"0,4,3,1", b"3,2,0,3", b"0,3,0,2"):
        refused(sparse(overlapping), "broken map")


def one(data: bytes) -> Member:
    """The only member, in an archive that ends after it."""
    [(entry, _)] = read(data + bytes(1024))
    return entry


def gnu_name(kind: bytes, name: bytes) -> bytes:
    """GNU's member with a long name (L) or link (K), and its NUL."""
    return tar(member("././@LongLink", name + b"\0", kind=kind), end=False, format=1)


def test_the_longest_names() -> None:
    """PATH_MAX (limits.h) less its NUL, in either form, as a name and as a link's target."""
    for size in (1, 100, 4095):
        name = b"n" * size
        assert one(pax(record(b"path", name)) + header()).name == name
        assert one(pax(record(b"linkpath", name)) + header(kind=b"2")).link == name
        assert one(gnu_name(b"L", name) + header()).name == name
        assert one(gnu_name(b"K", name) + header(kind=b"2")).link == name
    longer = b"n" * 4096
    refused(pax(record(b"path", longer)) + header(), "overlong")
    refused(pax(record(b"linkpath", longer)) + header(kind=b"2"), "overlong")
    for kind in (b"L", b"K"):
        refused(gnu_name(kind, longer) + header(), "at most 4096|extended header of 4097")
        refused(gnu_name(kind, b"a") + gnu_name(kind, b"b") + header(), "two long names")
        refused(gnu_name(kind, b"a") + bytes(1024), "after an extended header")


def test_a_pax_name_wins_over_gnus_and_both_over_the_headers() -> None:
    assert one(gnu_name(b"L", b"gnu") + pax(record(b"path", b"pax")) + header()).name == b"pax"
    assert one(pax(record(b"path", b"pax")) + gnu_name(b"L", b"gnu") + header()).name == b"pax"
    assert one(pax(record(b"path", b"")) + header()).name == b"file", "an empty value: as if it was not said"


def test_an_extended_header_has_a_megabyte_at_most() -> None:
    def padded(size: int) -> bytes:
        value = b"x" * (size - len(record(b"comment", b"x" * 10**6)) + 10**6)
        return pax(record(b"comment", value))

    data = padded(1 << 20)
    assert one(data + header()).name == b"file"
    refused(padded((1 << 20) + 1) + header(), "extended header of 1048577 bytes")


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        *((b"0", 0), (b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"1.000000001", 1_000_000_001)),
        *((b"7.", 7 * 10**9), (b"1.1234567899", 1_123_456_789), (b"-2147483648", -(1 << 31) * 10**9)),
        *((b"17179869184", (1 << 34) * 10**9), (b"17179869184.999999999", ((1 << 34) + 1) * 10**9 - 1)),
        (b"", 0),
    ],
)
def test_times(text: bytes, nanoseconds: int) -> None:
    assert one(pax(record(b"mtime", text)) + header(mtime=b"00000000000\0")).mtime_ns == nanoseconds


@pytest.mark.parametrize("text", [b"-2147483648.5", b"-2147483649", b"17179869185", b"9" * 19])
def test_times_that_no_file_system_has(text: bytes) -> None:
    refused(pax(record(b"mtime", text)) + header() + bytes(1024), "time out of range")


_KEYS = st.binary(min_size=1, max_size=12).filter(lambda key: b"=" not in key and b"\n" not in key)


@given(st.dictionaries(_KEYS, st.binary(max_size=120), max_size=4))
def test_any_extended_attributes_come_back(attributes: dict[bytes, bytes]) -> None:
    """The value is whatever the length says, also with newlines, NULs and '=' in it."""
    records = [record(b"SCHILY.xattr." + key, value) for key, value in attributes.items()]
    assert one(pax(*records, record(b"comment", b"none")) + header()).xattrs == attributes


def test_checksums_of_old_tars() -> None:
    """Some of them added signed characters."""
    block = bytearray(header(name="ünïcödé".encode().ljust(100, b"\0")))
    block[148:156] = b" " * 8
    right, signed = sum(block), sum(byte - 256 if byte > 127 else byte for byte in block)
    assert right != signed, "the positive control"
    for total in (right, signed):
        assert one(bytes(block[:148] + b"%06o\0 " % total + block[156:])).name == "ünïcödé".encode()
    for total in (right + 1, right - 1, signed + 1, signed - 1):
        refused(bytes(block[:148] + b"%06o\0 " % total + block[156:]), "checksum")


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (b"5 a=\n", None),
        (b"6 a=b\n", None),
        (b"4 =\n", "pax header"),
        (b"6 ab=\n", None),
        (b"6  =b\n", None),
        (b"5 abc\n", "pax header"),
        (b"6 abc\n", "pax header"),
        (b" 6 a=b\n", "pax header"),
        (b"6 a=b\n6 a=b", "pax header"),
        (b"6 a=b\n\n", "pax header"),
        (b"2 ", "pax header"),
        (b"3 \n", "pax header"),
        (b"0000000000000000006 a=b\n", "pax header|number"),
    ],
)
def test_records_of_a_pax_header(data: bytes, length: str | None) -> None:
    if length:
        refused(pax(data) + header(), length)
    else:
        assert one(pax(data) + header()).name == b"file"


@pytest.mark.parametrize("blank", [b" ", b"\0"])
def test_a_number_that_is_blank_is_nothing(blank: bytes) -> None:
    """As old archives have them in fields that mean nothing to a file."""
    found = one(header(mode=blank * 8, uid=blank * 8, size=blank * 12, mtime=blank * 12))
    assert (found.mode, found.uid, found.size, found.mtime_ns) == (0, 0, 0, 0)


def test_a_sparse_file_may_be_empty() -> None:
    empty = pax(record(b"GNU.sparse.map", b"0,0"), record(b"GNU.sparse.size", b"0")) + header()
    assert (one(empty).size, one(empty).segments) == (0, [(0, 0)])


def test_a_sparse_file_has_a_bounded_number_of_pieces() -> None:
    def sparse(pieces: int) -> bytes:
        places = b",".join(b"%d,0" % (at % 10) for at in sorted(n * 9 // pieces for n in range(pieces)))
        return pax(record(b"GNU.sparse.map", places), record(b"GNU.sparse.size", b"9")) + header()

    assert len(one(sparse(1 << 16)).segments or ()) == 1 << 16
    refused(sparse((1 << 16) + 1), "broken map")


def test_the_map_of_a_sparse_file_is_a_part_of_its_data() -> None:
    """Format 1.0: decimal lines, padded to a block; the stored size counts them."""

    def sparse(table: bytes, data: bytes, realsize: bytes = b"9") -> bytes:
        records = [record(b"GNU.sparse.major", b"1"), record(b"GNU.sparse.minor", b"0")]
        records.append(record(b"GNU.sparse.realsize", realsize))
        padded = table.ljust(-(-len(table) // 512) * 512, b"\0")
        return pax(*records) + tar(member("s", padded + data))

    assert read(sparse(b"2\n0\n2\n5\n3\n", b"abcde"))[0][1] == b"ab\0\0\0cde\0"
    assert read(sparse(b"0\n", b""))[0][1] == bytes(9)
    many = b"300\n" + b"".join(b"%d\n0\n" % n for n in range(300))
    assert len(many) > 512, "the positive control: a map of several blocks"
    assert len(read(sparse(many, b"", b"300"))[0][0].segments or ()) == 300
    for table in (b"1\n0\n2\n", b"1\n0\n4\n", b"1\n7\n3\n", b"2\n3\n1\n0\n2\n"):
        refused(sparse(table, b"abc"), "broken map")
    refused(sparse(b"1\n-1\n3\n", b"abc"), "number")
    refused(sparse(b"65537\n", b""), "too many pieces")
    refused(sparse(b"1" * 512 * 2, b""), "exceeds its data")


def test_global_headers_hold_for_all_that_follow_until_the_next() -> None:
    """pax(1): a global record is a default, an own one wins, and a later global one replaces it."""

    def everyone(*records: bytes) -> bytes:
        return tar(member("g", b"".join(records), kind=tarfile.XGLTYPE), end=False, format=0)

    def some(name: str) -> bytes:
        return tar(member(name, b"", uid=1, gid=2, mtime=3), end=False, format=0)

    data = (
        some("before")
        + everyone(record(b"uid", b"7"), record(b"comment", b"of git-archive"), record(b"mtime", b"5.5"))
        + some("all")
        + pax(record(b"uid", b"8"))
        + some("own")
        + everyone(record(b"uid", b"9"))
        + some("last")
    )
    found = [(entry.name, entry.uid, entry.gid, entry.mtime_ns) for entry, _ in read(data + bytes(1024))]
    assert found == [
        (b"before", 1, 2, 3 * 10**9),
        (b"all", 7, 2, 5_500_000_000),
        (b"own", 8, 2, 5_500_000_000),
        (b"last", 9, 2, 5_500_000_000),
    ]


def test_global_headers_keep_nothing_that_is_not_used() -> None:
    """Hostile: a megabyte of records that would be copied for each of a million members."""
    many = b"".join(record(b"key%d" % number, b"x") for number in range(10_000))
    reader = Reader(io.BytesIO(tar(member("g", many, kind=tarfile.XGLTYPE), end=False, format=0) + header()).read)
    assert [entry.name for entry in reader] == [b"file"]
    assert reader._globals == {}


@pytest.mark.parametrize("kind", [b"\0", b"0", b"7"])
def test_files_of_all_times(kind: bytes) -> None:
    """The seventh edition's tar knew no kinds, no magic and no prefix; 7 was for files that lie in one piece."""
    old = bytearray(header(kind=kind, magic=b"\0" * 8, name=b"old".ljust(100, b"\0")))
    old[345:350] = b"ghost"  # where ustar has its prefix
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    [(entry, content)] = read(bytes(old) + bytes(1024))
    assert (entry.kind, entry.name, content) == (tarfile.REGTYPE, b"old", b"")
    assert read(header(kind=kind, name=b"new".ljust(100, b"\0")) + bytes(1024))[0][0].kind == tarfile.REGTYPE


def test_a_directory_of_the_seventh_edition_is_a_name_with_a_slash() -> None:
    old = header(kind=b"\0", magic=b"\0" * 8, name=b"dir/".ljust(100, b"\0"))
    assert read(old + bytes(1024))[0][0].kind == tarfile.DIRTYPE


def test_numbers_beyond_the_octal_digits() -> None:
    """GNU's base-256: the first bit is the mark, and the next one the sign of a number in two's complement."""

    def big(value: int, width: int = 12) -> bytes:
        field = bytearray(value.to_bytes(width, signed=True))
        field[0] |= 0x80
        return bytes(field)

    def only(data: bytes) -> Member:
        [(entry, _)] = read(data + bytes(1024))
        return entry

    assert only(header(uid=big(3_000_000, 8))).uid == 3_000_000
    assert only(header(uid=big(-2, 8))).uid == -2
    assert only(header(mtime=big(1 << 33))).mtime_ns == (1 << 33) * 10**9
    assert only(header(mtime=big(-86400))).mtime_ns == -86400 * 10**9
    [(entry, content)] = read(header(size=big(5)) + b"12345".ljust(512, b"\0") + bytes(1024))
    assert (entry.size, content) == (5, b"12345")
    refused(header(size=big(-5)) + bytes(1024), "invalid size")


@given(st.integers(-(1 << 62), (1 << 62) - 1))
def test_any_number_in_base_256(value: int) -> None:
    field = bytearray(value.to_bytes(8, "big", signed=True))
    field[0] |= 0x80
    assert one(header(uid=bytes(field))).uid == value


def test_a_wrong_field_in_a_later_header_is_no_end() -> None:
    good = tar(member("a", b"x"), end=False)
    refused(good + b"garbage".ljust(512, b"!") + bytes(1024), "broken")


@settings(max_examples=300)
@given(st.data())
def test_any_damage_is_read_or_refused(data: st.DataObject) -> None:
    original = bytearray(
        pax(record(b"GNU.sparse.map", b"0,2,4,2"), record(b"GNU.sparse.size", b"9"), record(b"mtime", b"1.5"))
        + tar(member("s", b"1234"), member("n" * 150, b"x" * 600), member("l", linkname="y" * 200), format=1)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # get past the checksums
        for at in range(0, len(original) - 511, 512):
            block = original[at : at + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b" " * 8
                original[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    reader = Reader(io.BytesIO(bytes(original)).read)
    try:
        for entry in reader:
            assert entry.size >= 0
            assert sum(len(chunk) for _, chunk in reader.data(entry)) <= len(original)
    except Invalid as e:
        assert "\n" not in str(e)
