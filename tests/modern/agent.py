#!/usr/bin/python3
"""Runs inside the virtual machine: commands come in and results go out through a virtio-serial port.

A line each, JSON: {"command", "timeout"} in, {"status", "out", "seconds"} out. The first line out is {"boot"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time


def run(command: str, timeout: float) -> dict[str, object]:
    """Run it in a shell, standard error with the output; 124, as timeout(1) has it, when it takes too long.

    The output is a file, not a pipe: a daemon that the command leaves behind would keep a pipe open.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {"status": status, "out": text, "seconds": time.monotonic() - began}


def main(path: str) -> None:
    """Serve the port at `path` for ever."""
    port = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def say(message: dict[str, object]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(port, data) :]

    with open("/proc/sys/kernel/random/boot_id") as file:
        say({"boot": file.read().strip()})
    received = b""
    while True:
        chunk = os.read(port, 65536)
        if not chunk:  # nobody is connected
            time.sleep(0.1)
        received += chunk
        while b"\n" in received:
            line, received = received.split(b"\n", 1)
            request = json.loads(line)
            say(run(request["command"], request["timeout"]))


if __name__ == "__main__":
    os.environ.update(HOME="/root", PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    main(sys.argv[1])
