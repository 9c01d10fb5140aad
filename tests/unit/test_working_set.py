"""Copying pages before they are written to: measured by the page faults of the writes."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import mmap, os, resource
from insula.container.service.working_set import WorkingSet
PAGES, SET = 400, 100
memory = mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

def write(pages):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in pages:
        memory[page * mmap.PAGESIZE] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fork():
    if os.fork() == 0:
        os.read(hold, 1)
        os._exit(0)
    known.forked()

hold, release = os.pipe()
known = WorkingSet()
write(range(PAGES))
known.launched()
fork()
assert not known.is_shared, "nothing is known yet"
write(range(SET))  # a launch
known.launched()
fork()
assert known.is_shared
known.copy()
assert not known.is_shared
print(write(range(SET)), write(range(SET, PAGES)))
for _ in range(70):
    known.launched()
    fork()
    known.copy()
os.write(release, bytes(300))
"""


def test_writes_to_the_pages_of_the_last_launch_cost_no_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    known, others = map(int, done.stdout.split())
    assert others >= 300, "the other pages were shared, and each write to one is a fault"
    assert known <= 20, "writes to the pages of the set are none, but for those of the test itself"
