"""A guest of Xen whose processor is virtualized by hardware: PVH, by Insula's driver.

QEMU emulates a processor of AMD with SVM and nested page tables, of which Xen makes use. So the guest's instructions
run as on such a processor, until one has to be intercepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.guest import CHECKOUT
from tests.support.xen import Domain0
from tests.xen.conftest import booted
from tests.xen.inside import MARK

START_LIBVIRTD = """
cd /usr/share/libvirt/cpu_map
cat >x86_emulated.xml <<MODEL
<cpus>
  <model name='emulated'>
    <decode host='on' guest='on'/>
    <feature name='lm'/>
  </model>
</cpus>
MODEL
sed -i "s|<include filename='x86_486.xml'/>|<include filename='x86_emulated.xml'/>&|" index.xml
libvirtd -d
until [ -S /run/libvirt/libvirt-sock ]; do sleep 1; done
"""
"""libvirt 9.0 does not start where it knows no model that is like the processor. All that it knows of AMD have vme,
which QEMU does not emulate."""


class WithSvm(Domain0):
    """Without RDTSCP: QEMU 7.2 reports it to the hypervisor as RDTSC, which Xen takes for a mistake."""

    def _options(self, agent: int) -> str:
        before, after = super()._options(agent).split("-cpu Nehalem")
        return f"{before}-cpu Opteron_G3,+svm,+npt,-rdtscp{after}"


@pytest.fixture(scope="module")
def with_svm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domain0]:
    with booted(WithSvm, tmp_path_factory.mktemp("with-svm")) as made:
        made.ok(START_LIBVIRTD)
        yield made


def test_a_guest_by_hardware_virtualization_answers_and_lives_as_others_do(with_svm: Domain0) -> None:
    assert " hvm " in with_svm.ok("xl info | grep virt_caps"), "the control: Xen has found SVM"
    command = f"cd {CHECKOUT} && PYTHONPATH=src:. python3 -m tests.xen.inside pvh"
    seen: dict[str, Any] = json.loads(with_svm.ok(command, timeout=240).splitlines()[-1])
    hypervisor, kind, *rest = seen["answer"].splitlines(keepends=True)
    assert (hypervisor, kind) == ("xen\n", "PVH\n"), "as its own kernel says"
    assert rest[0] == MARK and "-cloud-amd64" in rest[1], "it has read its disk, and was reached over its network"
    assert (seen["started"], seen["paused"], seen["resumed"]) == ("running", ["paused", None], ["running", True])
    assert seen["off"] == ["off", None] and seen["killed"] == "off"
