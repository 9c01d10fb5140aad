"""What the runtime is asked for: the config of the check is that of the launch unless something has changed."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from insula.control.instances.drivers.container.request import _MOST_CHECKED, Requests
from insula.model.objects import Instance, InstanceSpec, Tenant
from insula.volume.quota import ReservationOnly
from tests.support import objects

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="files are given to users")

TENANT = Tenant(name="acme", index=0, id_base=1 << 20, created=0.0)


class Counting(Requests):
    """Counts the configs that are made."""

    made = 0

    def oci(self, *arguments: Any) -> Any:
        self.made += 1
        return super().oci(*arguments)


@pytest.fixture
def requests(tmp_path: Path) -> Counting:
    layer, instances = tmp_path / "layer", tmp_path / "instances"
    for directory in (layer, instances):
        directory.mkdir()
    images: Any = SimpleNamespace(lower=lambda layers: [layer])
    settings: Any = SimpleNamespace(prefix="insula", root=tmp_path, instances=instances)
    return Counting(settings, images, ReservationOnly(instances, "none here"))


def instance(name: str = "web", **spec: Any) -> Instance:
    made = objects.instance(spec=InstanceSpec(image="x", name=name, command=["true"], **spec))
    return msgspec.structs.replace(made, name=name, wanted="running", starts=1)


def launch(requests: Requests, wanted: Instance) -> dict[str, Any]:
    return asyncio.run(requests.launch(TENANT, wanted, [])).config


def test_the_config_of_the_check_is_that_of_the_first_launch(requests: Counting) -> None:
    expected = launch(requests, instance())
    assert requests.made == 1, "the control"
    asyncio.run(requests.check(TENANT, instance()))
    assert launch(requests, instance()) == expected and requests.made == 2
    assert launch(requests, instance()) == expected and requests.made == 3, "it is given out once"


@pytest.mark.parametrize(
    "changed",
    [instance("other"), instance(env={"A": "b"}), msgspec.structs.replace(instance(), starts=2)],
    ids=["name", "spec", "start"],
)
def test_a_config_is_made_again_if_the_instance_has_changed(requests: Counting, changed: Instance) -> None:
    asyncio.run(requests.check(TENANT, instance()))
    found = launch(requests, changed)
    assert requests.made == 2
    assert found == launch(requests, changed)


def test_a_config_is_made_again_if_the_instance_has_files(requests: Counting) -> None:
    """Its own /etc/passwd may say who its user is."""
    launch(requests, instance())
    asyncio.run(requests.check(TENANT, instance()))
    (requests.directory(instance().id).upper / "file").touch()
    launch(requests, instance())
    assert requests.made == 3


def test_few_configs_are_kept(requests: Counting) -> None:
    for number in range(2 * _MOST_CHECKED):
        asyncio.run(requests.check(TENANT, msgspec.structs.replace(instance(), id=f"{number:032x}")))
    assert len(requests._checked) == _MOST_CHECKED


def test_what_is_in_the_way_of_the_directories_is_removed(requests: Counting) -> None:
    directory = requests.directory(instance().id)
    expected = launch(requests, instance())
    for wrong in (directory.path, directory.upper, directory.work, directory.log, directory.etc):
        shutil.rmtree(wrong)
        wrong.symlink_to("/nowhere")
        assert launch(requests, instance()) == expected
        assert wrong.is_dir() and not wrong.is_symlink()
    modes = {path.name: path.stat().st_mode & 0o777 for path in directory.path.iterdir() if path.is_dir()}
    assert modes == {"upper": 0o755, "work": 0o700, "log": 0o700, "etc": 0o755}
    assert directory.upper.stat().st_uid == TENANT.id_base
    assert (directory.etc / "hostname").read_text() == "web\n"
