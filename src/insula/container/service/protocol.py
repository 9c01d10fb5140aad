"""The names of the files by which the processes of the service find each other, below the run directory.

They are a format: the names are those of version 0.1.0, so that any build finds the processes of any other.
"""

from __future__ import annotations

MONITOR_SOCKET, MONITOR_LOCK, MONITOR_PID = "keeper.sock", "keeper.lock", "keeper.pid"
ZYGOTE_SOCKET, ZYGOTE_PID = "spawner.sock", "spawner.pid"
"""A .pid file has the PID and the start time (field 22 of proc_pid_stat(5)), separated by a space."""
WARM_RECORDS = "spares"
"""A directory with a file for each warm container, which has the path of its control group."""
