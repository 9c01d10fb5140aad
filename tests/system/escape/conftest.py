"""Fixtures of the escape suite.

cells     makes cells: `cells(cli)` or `cells(cli, "--cap-add", "ALL")`; removed at the end of the module
cell      one in a tenant of the module's own
neighbour one in another tenant
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.system.conftest import TenantFactory, remove_instances
from tests.system.escape.cell import Cell, archive

CellFactory = Callable[..., Cell]


@pytest.fixture(scope="session")
def image_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("escape") / "attack.tar"
    path.write_bytes(archive())
    return path


@pytest.fixture(scope="module")
def cells(image_archive: Path, tenants: TenantFactory) -> Iterator[CellFactory]:
    made: list[Cell] = []
    loaded: set[str | None] = set()

    def make(cli: Cli, *options: str) -> Cell:
        if cli.tenant not in loaded:
            cli.ok("image", "load", image_archive)
            loaded.add(cli.tenant)
        made.append(Cell(cli, f"cell{len(made)}", options))
        return made[-1]

    yield make
    for cell in made:
        remove_instances(cell.cli)


@pytest.fixture(scope="module")
def cell(cells: CellFactory, tenant: Cli) -> Cell:
    return cells(tenant)


@pytest.fixture(scope="module")
def neighbour(cells: CellFactory, tenants: TenantFactory) -> Cell:
    return cells(tenants())
