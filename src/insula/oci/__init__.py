"""`insula-oci`: the container runtime as a command, with the command line that Podman, Docker and containerd expect.

The OCI runtime-spec (runtime.md) has five operations on a container: state, create, start, kill, delete. Engines call
more, as runc has them: run, exec, list, ps, pause, resume, update, events, spec, features.

main.py           finds the verb, and turns errors into lines and exit statuses
commands.py       the options and arguments of each verb, as tables; options.py parses by them
verbs/            one file a verb, each with `run(arguments) -> int`
state.py          a container's directory below --root, which outlives the command that made it
log.py            errors and warnings, for people and for engines
notifications.py  sd_notify(3), where a supervisor has set NOTIFY_SOCKET
preload.py        the modules of a verb in one file, made by scripts/up

There is no daemon: `create` leaves a process that waits for `start`, and every later command finds it in the state.
A command lives for milliseconds, so each file imports only what its verb needs, and nothing that is slow to import.
"""
