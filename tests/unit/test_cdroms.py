"""The CDs in the drives of a machine, after what is put in and taken out."""

from __future__ import annotations

import msgspec

from insula.model.disk_images import DiskRoot, InsertedCd

OWN = DiskRoot(digest="own", size=1, media="cdrom")
DISK = DiskRoot(digest="disk", size=1)
ONE, TWO = InsertedCd(image="image one", digest="one"), InsertedCd(image="image two", digest="two")


def test_what_is_in_the_drives() -> None:
    def cds(root: DiskRoot, **changes: object) -> list[str | None]:
        found = msgspec.structs.replace(root, **changes)
        assert len(found.cds) == found.drives
        return [cd.digest if cd else None for cd in found.cds]

    assert cds(DISK) == []
    assert cds(OWN) == ["own"]
    assert cds(OWN, ejected=True) == [None]
    assert cds(OWN, replacement=TWO) == cds(OWN, ejected=True, replacement=TWO) == ["two"]
    assert cds(DISK, inserted=[ONE]) == ["one"]
    assert cds(DISK, inserted=[ONE], ejected=True) == [None]
    assert cds(DISK, inserted=[ONE], replacement=TWO) == ["two"]
    assert cds(OWN, inserted=[ONE]) == ["own", "one"]
    assert cds(OWN, inserted=[ONE], replacement=TWO) == ["own", "two"]
    assert cds(OWN, inserted=[ONE], ejected=True, replacement=TWO) == [None, "two"]
