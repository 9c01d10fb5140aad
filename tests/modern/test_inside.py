"""The most important tests, run once more on the modern host by pytest inside of the virtual machine.

They are those of tests/system, unchanged; only their patience is greater, for an emulated processor
(tests/support/wait.py). They run once, all together; then each file is a test here, which fails as it did there.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from tests.support.guest import CHECKOUT, Guest

PYTHON = "/opt/insula-tests/bin/python"
PATIENCE = 16
FILES = (
    "system/test_cgroups.py",
    "system/test_cgroups_devices.py",
    "system/test_floors.py",
    "system/test_uncharged.py",
    "system/test_volume.py",
    "system/test_disk_quotas.py",
    "system/oci/test_checkpoint.py",
    "system/network_names/test_leases.py",
)
"""What depends on the version of control groups, on quotas, on how sets of nftables keep time, or on other features of
the kernel."""

PARTS = {
    "system/test_runtime.py": (
        "pid_1_inside_and_another_outside",
        "killed_helpers_cost_no_output_and_no_exit_status",
        "created_containers_die_with_the_zygote",
        "limits_hold",
    ),
    "system/test_security.py": (
        "kernel_guards_are_on",
        "masked_paths_are_empty",
        "read_only_paths",
        "huge_pages_that_the_host_has_set_aside",
        "devices",
        "the_root_cannot_be_left",
        "the_instance_is_in_its_tenants_control_groups",
    ),
    "system/test_two_tenants.py": (
        "the_outside_sees_the_host_only",
        "the_outside_cannot_come_in",
        "a_stolen_address_is_dropped",
    ),
}
"""The tests of a file that see the kernel's /proc, cgroups, ends of processes or packet filter. Others of these files
show nothing here that they don't show on any host, and an emulated processor is ten times slower. That names and
addresses of two tenants don't cross, and the proof of it, are claims of the tour that test_debian.py sees."""

EXCEPT = "not nobody_attached and not order2 and not order3"
"""Left out: a flood of output, for which an emulated processor is too slow; and two orders in which helpers may be
killed: how what they leave ends is told by Linux 6.15 and later only (docs/architecture.md)."""

ON_THE_HOST_ITSELF = ("modern/inside/test_systemd.py", "modern/inside/test_insula_oci.py")
"""Outside of the namespaces that tests.support.machine makes: systemd knows no PIDs but its own."""

TIMEOUT = 300


@dataclass
class Outcome:
    """The results of the tests of one file."""

    passed: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run(guest: Guest, *files: str) -> tuple[dict[str, Outcome], str]:
    """The outcome of each file, or of some tests of it, and what pytest printed."""
    paths = " ".join(f"tests/{name}" for name in files)
    select = f"-k '{EXCEPT}' --durations=20"
    command = f"cd {CHECKOUT} && INSULA_TEST_INSIDE=1 INSULA_TEST_PATIENCE={PATIENCE} {PYTHON} -m pytest -q {select}"
    done = guest.run(
        f"{command} -p no:cacheprovider -o junit_family=xunit1 --junitxml=/tmp/report.xml {paths}", timeout=TIMEOUT
    )
    report = guest.run("cat /tmp/report.xml; rm -f /tmp/report.xml")
    assert report.status == 0, f"no report; pytest ended with {done.status}:\n{done.out}"
    found: dict[str, Outcome] = defaultdict(Outcome)
    for case in ElementTree.fromstring(report.out).iter("testcase"):
        outcome = found[str(case.get("file")).removeprefix("tests/")]
        bad = [*case.iter("failure"), *case.iter("error")]
        if bad:
            outcome.failed += [f"{case.get('name')}\n{each.text or each.get('message')}" for each in bad]
        elif (skip := case.find("skipped")) is not None:
            outcome.skipped.append(f"{case.get('name')}: {skip.get('message')}")
        else:
            outcome.passed += 1
    print(done.out)
    return found, done.out


@pytest.fixture(scope="module")
def outcomes(guest: Guest) -> tuple[dict[str, Outcome], str]:
    parts = [f"{file}::test_{name}" for file, names in PARTS.items() for name in names]
    system, said = run(guest, *FILES, *parts)
    host, said_too = run(guest, *ON_THE_HOST_ITSELF)
    return system | host, said + said_too


@pytest.mark.parametrize("file", [*FILES, *PARTS, *ON_THE_HOST_ITSELF])
def test_inside(outcomes: tuple[dict[str, Outcome], str], file: str) -> None:
    found, said = outcomes
    assert file in found, f"nothing was run; pytest said:\n{said}"
    outcome = found[file]
    assert not outcome.failed, "\n\n".join([f"{len(outcome.failed)} failed inside:", *outcome.failed])
    assert outcome.passed > len(outcome.skipped), f"most are skipped: {outcome.skipped}"
