"""An instance that 0.1.0 stored and launched runs on with this version, and is managed by it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import Any

from insula.client import Client
from tests.support.daemon import Daemon


def as_0_1_0(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """An object as 0.1.0 stored it."""
    if key.startswith("/status/"):
        return {
            **{k: v for k, v in value.items() if k not in ("starts", "observed_generation")},
            "generation": value["starts"],
        }
    new = ("host", "ports", "root", "starts", "generation", "stop_timeout")
    old = {k: v for k, v in value.items() if k not in new}
    spec = {k: v for k, v in value["spec"].items() if k not in ("options", "mounts")}
    options = {k: v for k, v in value["spec"]["options"].items() if k != "kind"}
    tmpfs = [{k: v for k, v in mount.items() if k != "type"} for mount in value["spec"]["mounts"]]
    return {
        **old,
        "spec": {**spec, **options, "tmpfs": tmpfs},
        "port": value["ports"][0] if value["ports"] else None,
        "layers": value["root"]["layers"],
        "generation": value["starts"],
    }


def store_as_0_1_0(daemon: Daemon) -> int:
    """Rewrite what an insulad that was stopped has stored; how many objects that were."""
    with contextlib.closing(sqlite3.connect(daemon.root / "state.db")) as store, store:
        found = store.execute(
            "SELECT key, value FROM entries WHERE key LIKE '/instances/%' OR key LIKE '/status/%'"
        ).fetchall()
        for key, value in found:
            old = json.dumps(as_0_1_0(key, json.loads(value))).encode()
            store.execute("UPDATE entries SET value = ? WHERE key = ?", (old, key))
    (daemon.root / "host").unlink()
    return len(found)


def test_an_instance_of_0_1_0_runs_on(fresh: Daemon) -> None:
    cli = fresh.cli
    cli.ok("run", "-d", "--name", "web", "--tmpfs", "/t", "--init", "busybox", "sleep", "600")
    assert cli.run("run", "--name", "done", "busybox", "sh", "-c", "echo out; exit 3").status == 3
    before = cli.json("inspect", "web")[0]
    fresh.stop()
    assert store_as_0_1_0(fresh) == 4
    fresh.start()
    after = cli.json("inspect", "web")[0]
    assert after["status"]["state"] == "running" and after["status"]["pid"] == before["status"]["pid"]
    assert after["instance"]["ports"] == before["instance"]["ports"]
    assert after["instance"]["spec"] == before["instance"]["spec"]
    assert after["instance"]["host"] == (fresh.root / "host").read_text().strip() == before["instance"]["host"]
    assert cli.ok("exec", "web", "sh", "-c", "grep -c ' /t ' /proc/mounts") == "1"
    assert cli.json("inspect", "done")[0]["status"]["exit"]["exit_status"] == 3
    assert cli.ok("logs", "done") == "out"
    who = Client(str(fresh.run / "users.sock"))
    assert cli.ok("whoami") == "operator, by socket: operator of the host", "as before, without a login"
    assert who.identities.users() == [] == who.identities.bindings() == who.identities.bindings("default")
    cli.ok("restart", "-t", "0", "web")
    again = cli.json("inspect", "web")[0]
    assert again["status"]["pid"] != before["status"]["pid"] and again["instance"]["starts"] == 2
    cli.ok("rm", "-f", "web", "done")
