"""Elements of a listing of rules that name one instance."""

from __future__ import annotations

from insula.cli.elements import concerning

LISTING = """
table bridge insula {
    set ipv4 {
        typeof iifname . ether saddr . ip saddr
        elements = { "p7" . 02:00:00:00:00:04 . 10.0.0.4,
                 "p70" . 02:00:00:00:00:40 . 10.0.0.40 }
    }

    set sent {
        typeof iifname
        counter
        elements = { "p7" counter packets 72 bytes 4180 comment "778b", "p70" counter packets 1 bytes 2 comment "9" }
    }

    chain prerouting {
        iifname "p7" drop
    }
}
table inet insula-outside {
    map places4 {
        type classid . mark : ipv4_addr . inet_service
        elements = { 0:1 . 0x1 : 10.0.0.4 . 80, 0:1 . 0x2 : 10.0.0.4 . 80,
                 0:1 . 0x3 : 10.0.0.4 . 80, 0:1 . 0x4 : 10.0.0.4 . 80 }
    }
}
"""


def test_elements_with_a_name_as_a_whole_are_listed_by_set() -> None:
    assert [line.split(maxsplit=3) for line in concerning(LISTING, ["p7", "10.0.0.4", "02:00:00:00:00:04"])] == [
        ["bridge", "insula", "ipv4", '"p7" . 02:00:00:00:00:04 . 10.0.0.4'],
        ["bridge", "insula", "sent", '"p7"'],
        ["inet", "insula-outside", "places4", "4 elements"],
    ]


def test_a_part_of_a_name_is_none() -> None:
    assert concerning(LISTING, ["10.0.0", "p", "02:00:00:00:00"]) == []
