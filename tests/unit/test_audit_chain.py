"""The chain of the audit log: any edit of its files is found, and what the writer itself does is no edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insula.audit import files
from insula.audit.chain import Chain, ChainHead, begin, evolve, parse
from insula.audit.keys import KeyFile, VerificationKey, parse_keys
from insula.audit.reader import read, read_raw, timestamp
from insula.audit.verification import Result, lines_of_files, lines_of_pieces, verify
from insula.audit.witness import heads
from insula.audit.writer import UNKNOWN, AuditLog


def entry(n: int, **more: Any) -> dict[str, Any]:
    return {"time": timestamp(1000.0 + n), "id": f"{n:016x}", "n": n, **more}


def new_key(log: AuditLog) -> VerificationKey:
    told: list[VerificationKey | OSError] = []
    log.new_key({"user": "operator"}, told.append)
    log.flush()
    [key] = told
    assert isinstance(key, VerificationKey)
    return key


class Log:
    """An audit log in a directory, with the files of its key and its witness."""

    def __init__(self, directory: Path, **options: Any) -> None:
        self.path = directory / "log" / "audit.log"
        self.key = directory / "audit.key"
        self.witness = directory / "witness"
        self.options = options
        self.told: list[str | None] = []
        self.keys: list[VerificationKey] = []

    def open(self, **more: Any) -> AuditLog:
        options = {"size": 4000, "files": 9, "told": self.told.append, "key": self.key, "seen_by": self.witness}
        return AuditLog(self.path, **{**options, **self.options, **more})

    def write(self, numbers: range, **more: Any) -> AuditLog:
        log = self.open(**more)
        for n in numbers:
            log.record(entry(n))
            if n % 5 == 0:
                log.flush()
        return log

    @property
    def head(self) -> ChainHead:
        """What is kept elsewhere."""
        chain = KeyFile(self.key).load()
        assert chain
        return chain.head

    def verify(self, *known: ChainHead, keys: bool = True) -> Result:
        return verify(lines_of_files(self.path), known, self.keys if keys else ())


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Three files of a log whose first line is known, with the key of all but the first."""
    log = Log(tmp_path_factory.mktemp("audit"), size=3000)
    writer = log.open()
    log.keys.append(new_key(writer))
    for n in range(20):
        writer.record(entry(n))
        writer.flush()
    writer.close()
    assert 3 <= len(list(log.path.parent.iterdir())) <= 6
    return log


def test_what_was_written_is_verified(original: Log) -> None:
    result = original.verify(original.head)
    assert (result.wrong, result.heads, result.first) == (0, 1, 1), result
    assert result.sealed == result.lines - 2, "all but those before the key"
    assert result.last == original.head
    assert not result.notes
    raw = verify(lines_of_pieces(read_raw(original.path, 9)), [original.head], original.keys)
    assert raw == result, "the same by the bytes of the API"


def flip(log: Log, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(rotated(log)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)


def edit_lines(change: Callable[[list[bytes], int], None]) -> Callable[[Log, st.DataObject], None]:
    def edit(log: Log, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(rotated(log)))
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines, data.draw(st.integers(0, len(lines) - 2)))
        path.write_bytes(b"".join(lines))

    return edit


def drop(lines: list[bytes], at: int) -> None:
    del lines[at]


def repeat(lines: list[bytes], at: int) -> None:
    lines.insert(at, lines[at])


def swap(lines: list[bytes], at: int) -> None:
    lines[at], lines[at + 1] = lines[at + 1], lines[at]


def insert(lines: list[bytes], at: int) -> None:
    lines.insert(at, b'{"time":"2026","verb":"POST /x"}\n')


def truncate(log: Log, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(rotated(log)))
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))


def remove(log: Log, data: st.DataObject) -> None:
    data.draw(st.sampled_from(rotated(log))).unlink()


def exchange(log: Log, data: st.DataObject) -> None:
    one, two = data.draw(st.permutations(rotated(log)))[:2]
    one.rename(log.path.with_name("x"))
    two.rename(one)
    log.path.with_name("x").rename(two)


def rotated(log: Log) -> list[Path]:
    return sorted(log.path.parent.iterdir())


EDITS: list[Callable[[Log, st.DataObject], None]] = [
    flip,
    *map(edit_lines, (drop, repeat, swap, insert)),
    truncate,
    remove,
    exchange,
]


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_edit_is_found(original: Log, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    copy = Log(tmp_path_factory.mktemp("edited"))
    shutil.copytree(original.path.parent, copy.path.parent)
    data.draw(st.sampled_from(EDITS))(copy, data)
    result = copy.verify(original.head)
    assert result.wrong and result.findings, result
    copy.keys = original.keys
    assert copy.verify(original.head).wrong


def forged(log: Log, at: int, key: bytes) -> None:
    """Change the line `at`, and seal it and all after it again, with a key of one's own."""
    lines = [raw for _, raw in lines_of_files(log.path)]
    before = parse(lines[at])
    assert before
    chain = Chain(ChainHead(before.seq - 1, before.prev), before.prev, key)
    out = lines[:at]
    for number, raw in enumerate(lines[at:]):
        made = json.loads(raw)
        for name in ("seq", "prev", "mac"):
            del made[name]
        if number == 0:
            made["n"] = 4711
        line, chain = chain.seal(json.dumps(made, separators=(",", ":")).encode())
        out.append(line)
    for path in rotated(log):
        path.unlink()
    log.path.write_bytes(b"".join(out))


def test_a_whole_new_chain_is_found_by_a_head_and_by_the_key_and_by_nothing_else(original: Log, tmp_path: Path) -> None:
    copy = Log(tmp_path)
    shutil.copytree(original.path.parent, copy.path.parent)
    forged(copy, 7, begin().key)
    assert copy.verify().wrong == 0, "hashes alone prove nothing against who can compute them"
    assert "another line than the head" in str(copy.verify(original.head).findings)
    copy.keys = original.keys
    assert copy.verify().findings[0].seq == 8


def test_who_finds_the_key_of_now_can_not_change_what_was_before(original: Log, tmp_path: Path) -> None:
    copy = Log(tmp_path)
    shutil.copytree(original.path.parent, copy.path.parent)
    copy.keys = original.keys
    chain = KeyFile(original.key).load()
    assert chain
    forged(copy, 7, chain.key)
    assert copy.verify().findings[0].seq == 8
    assert evolve(original.keys[0].key, chain.head.seq + 1 - original.keys[0].seq) == chain.key, "the control"


def test_findings_say_where(original: Log, tmp_path: Path) -> None:
    copy = Log(tmp_path)
    shutil.copytree(original.path.parent, copy.path.parent)
    oldest = rotated(copy)[-1]
    lines = oldest.read_bytes().splitlines(keepends=True)
    changed = lines[2].replace(b'"n":', b'"m":')
    assert changed != lines[2]
    oldest.write_bytes(b"".join([*lines[:2], changed, *lines[3:]]))
    [found] = copy.verify().findings
    assert (found.seq, found.where) == (3, f"{oldest.name}:3") and "was changed" in found.what
    copy.path.unlink()
    last = copy.verify(original.head).findings[-1]
    assert last.where == "the end" and f"to {original.head.seq} are missing" in last.what


def test_retention_is_no_loss_and_removal_is_one(log: Log) -> None:
    writer = log.write(range(100), size=3000, files=3)
    writer.close()
    result = log.verify(log.head)
    assert result.first > 20 and result.wrong == 0, result
    files.numbered(log.path, 3).unlink()
    assert "missing at the beginning" in log.verify(log.head).findings[0].what


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_retention_of_few_files(log: Log, kept: int) -> None:
    log.write(range(100), size=3000, files=kept).close()
    result = log.verify(log.head)
    assert result.first > 20 and result.wrong == 0, result


def test_each_start_goes_on(log: Log) -> None:
    for begun in range(0, 30, 10):
        log.write(range(begun, begun + 10)).close()
    assert [e["n"] for e in read(log.path, 9)] == list(range(30))
    result = log.verify(log.head)
    assert (result.wrong, result.last) == (0, log.head)


PROGRAM = """
import sys, time
from pathlib import Path
from insula.audit.writer import AuditLog
from insula.audit.reader import timestamp
log = AuditLog(Path(sys.argv[1]), 4000, 99, key=Path(sys.argv[2]))
n = int(sys.argv[3])
while True:
    log.record({"time": timestamp(time.time()), "id": f"{n:016x}", "n": n})
    n += 1
    if n % 50 == 0:
        log.flush()
        print(n, flush=True)
"""


def test_kills_break_no_chain(log: Log) -> None:
    """SIGKILL at any moment: during a write, a rotation, between the log and its key."""
    log.options = {"files": 99}
    writer = log.open()
    log.keys.append(new_key(writer))
    writer.close()
    n = 0
    for _ in range(6):
        command = [sys.executable, "-c", PROGRAM, str(log.path), str(log.key), str(n)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for _ in range(3):
                n = int(process.stdout.readline())
            process.kill()
            n += 1000
    log.open().close()
    result = log.verify(log.head)
    assert (result.wrong, result.notes) == (0, []), result
    assert result.sealed > 6 * 100


def test_remains_of_a_write_are_part_of_the_chain(log: Log) -> None:
    """As a kill in the middle of a write leaves them; whoever changes them later is found."""
    log.write(range(3)).close()
    with log.path.open("ab") as file:
        file.write(b'{"time":"2026-')
    assert log.verify(log.head).notes == ["the last 14 bytes are a line that was not finished"]
    log.write(range(3, 6)).close()
    assert log.verify(log.head).wrong == 0
    log.path.write_bytes(log.path.read_bytes().replace(b'{"time":"2026-\n', b'{"time":"2027-\n'))
    assert log.verify(log.head).wrong == 1


def test_a_full_disk_breaks_no_chain(tmp_path: Path) -> None:
    """A limit of the file's size stands in for the disk: a write up to it is short, and the next one fails."""
    program = f"""
import os, resource, signal
from pathlib import Path
from insula.audit.writer import AuditLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told = []
root = Path({str(tmp_path)!r})
log = AuditLog(root / "log" / "audit.log", told=told.append, key=root / "audit.key")
for size in range(3001, 6001, 211):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))
    for n in range(5):
        log.record({{"time": "2026", "n": n, "size": size, "x": "y" * 30}})
    log.flush()
assert told and "File too large" in told[0], told
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
log.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    log = Log(tmp_path)
    assert log.verify(log.head).wrong == 0
    assert len(list(read(log.path, 9))) == 15 * 5


def test_verification_beside_a_rotating_writer_finds_nothing(log: Log) -> None:
    """While files are renamed and the oldest removed again and again."""
    stop = threading.Event()
    results: list[Result] = []
    writer = log.open(size=3000, files=3)

    def look() -> None:
        while not stop.is_set() or len(results) < 20:
            head = writer.head
            results.append(verify(lines_of_pieces(read_raw(log.path, 3)), [head] if head.hash else []))

    reader = threading.Thread(target=look)
    reader.start()
    for n in range(600):
        writer.record(entry(n))
        if n % 6 == 0:
            writer.flush()
    stop.set()
    reader.join()
    writer.close()
    assert [result for result in results if result.wrong] == []
    assert results[-1].first > 100, "the control: files were removed"


def test_logs_that_are_moved_away_are_missed_by_number(log: Log) -> None:
    """As logrotate(8) does it with names of its own: nothing breaks, and verification says which lines are gone."""
    writer = log.write(range(5))
    writer.flush()
    moved = log.path.with_name("audit.log-20260131")
    log.path.rename(moved)
    writer.record(entry(5))
    writer.close()
    [found] = log.verify(log.head).findings
    assert found.what == "lines 1 to 6 are missing at the beginning"
    moved.rename(log.path.with_name("audit.log.1"))
    assert log.verify(log.head).wrong == 0


def test_lines_that_are_gone_at_a_start_stay_known(log: Log) -> None:
    """The chain goes on after the number that the key or the store has, and a problem says what is missing."""
    log.write(range(10)).close()
    head = log.head
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:-2]))
    log.write(range(10, 12)).close()
    assert any("are missing from" in (trouble or "") for trouble in log.told)
    [found] = log.verify(log.head).findings
    assert found.what.startswith(f"lines {head.seq - 1} to {head.seq} are missing")
    log.key.unlink()
    stored = ChainHead(head.seq + 50, "a" * 64)
    log.write(range(12, 14), stored=stored).close()
    found = log.verify(log.head).findings[-1]
    assert f"to {stored.seq} are missing" in found.what


def test_the_key_goes_on_over_lines_that_are_gone(log: Log) -> None:
    """The store knows of lines that neither the files nor the file of the key have: after a restored backup."""
    writer = log.write(range(3))
    log.keys.append(new_key(writer))
    writer.close()
    stored = ChainHead(log.head.seq + 3, "a" * 64)
    log.write(range(3, 6), stored=stored).close()
    [found] = (result := log.verify(log.head)).findings
    assert found.what.startswith(f"lines {stored.seq - 2} to {stored.seq} are missing"), "and no HMAC is wrong"
    assert result.sealed >= 3 + 1, "the lines after the gap, and the record of it"


def test_a_lost_key_is_said(log: Log) -> None:
    writer = log.write(range(3))
    log.keys.append(new_key(writer))
    writer.close()
    log.key.unlink()
    log.write(range(3, 5)).close()
    assert log.verify(keys=False).wrong == 0
    assert "the key of the chain was lost" in log.verify().findings[-1].what


def test_a_new_key_that_was_not_given_is_found(log: Log) -> None:
    writer = log.write(range(3))
    one = new_key(writer)
    writer.record(entry(3))
    two = new_key(writer)
    writer.record(entry(4))
    writer.close()
    log.keys = [one]
    assert two.fingerprint in log.verify().findings[0].what
    log.keys = [one, two]
    assert log.verify().wrong == 0
    assert parse_keys(f"# ours\n{two}\n\n{one}\n") == [one, two]
    for path in (log.key, *rotated(log)):
        data = path.read_bytes()
        assert one.key.hex().encode() not in data and two.key.hex().encode() not in data, path
        assert one.key not in data


def test_begun_requests_are_closed_after_a_kill(log: Log) -> None:
    """Also if the files were rotated since, and intents of which the log has nothing."""
    options = {"size": 3000, "files": 9}
    writer = log.open(**options)
    writer.record(entry(1, phase="begun", verb="POST /exec", user="ann", tenant="acme", name="web"))
    writer.record(entry(2, phase="begun", verb="GET /logs"))
    writer.record(entry(2, phase="ended", verb="GET /logs", status=200))
    for n in range(10, 40):
        writer.record(entry(n))
    writer.flush()  # and no end: the process is killed here
    intents = [entry(39), entry(50, verb="POST /stop")]
    done = threading.Event()
    again = log.open(**options, intents=intents, recovered=done.set)
    again.flush()
    assert done.wait(30)
    found = {e["n"] if "n" in e else int(e["id"], 16): e for e in read(log.path, 9) if e.get("error") == UNKNOWN}
    assert set(found) == {1, 50}
    assert (found[1]["phase"], found[1]["name"], found[1]["status"]) == ("ended", "web", None)
    assert "phase" not in found[50]
    nothing_left = threading.Event()
    third = log.open(**options, intents=intents, recovered=nothing_left.set)
    third.flush()
    assert nothing_left.wait(30), "it is told also if there was nothing to close"
    assert len([e for e in read(log.path, 9) if e.get("error") == UNKNOWN]) == 2, "once"
    for each in (writer, again, third):
        each.close()


def test_a_log_that_was_not_sealed_goes_on_in_a_new_file(log: Log) -> None:
    log.path.parent.mkdir()
    log.path.write_text('{"time":"2026","n":1}\n')
    log.write(range(2, 4)).close()
    assert [e["n"] for e in read(log.path, 9)] == [1, 2, 3]
    result = log.verify(log.head)
    assert (result.wrong, result.first) == (0, 1)
    assert "not sealed" in result.notes[0]


def test_a_witness_has_heads_of_the_log(log: Log) -> None:
    log.write(range(60)).close()
    kept = heads(log.witness.read_text())
    assert len(kept) > 3 and kept[-1] == log.head
    result = log.verify(*kept)
    assert (result.wrong, result.heads) == (0, len(kept))
    wrong = kept[2]._replace(hash="0" * 64)
    assert log.verify(wrong).findings[0].seq == wrong.seq


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_a_witness_that_can_not_be_written_is_a_problem(log: Log, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "directory":
            log.witness.mkdir()
        elif kind == "link":
            log.witness.symlink_to("target")
        else:
            os.mkfifo(log.witness)  # with a reader: without one it can't be opened anyway
            stack.callback(os.close, os.open(log.witness, os.O_RDONLY | os.O_NONBLOCK))
        log.write(range(3)).close()
    assert any("the witness" in (trouble or "") for trouble in log.told)
    assert not log.witness.with_name("target").exists()
    assert log.verify(log.head).wrong == 0


@pytest.mark.parametrize("damage", [b"", b"x", b"0" * 168])
def test_a_damaged_key_file_is_a_lost_one(log: Log, damage: bytes) -> None:
    log.write(range(3)).close()
    assert log.key.stat().st_mode & 0o777 == 0o600
    log.key.write_bytes(damage)
    assert KeyFile(log.key).load() is None
    log.write(range(3, 5)).close()
    assert log.verify().wrong == 0
