"""The HTTP API: JSON under /v1 on a unix socket, described at /openapi.json.

daemon.py       insulad: lock, signals, graceful stop
    server.py       uvicorn
app.py          all resources in one application
peer.py         credentials of the client, and access to the socket
gate.py         refuses other clients, and ends requests when the daemon stops
audit.py        entries of the audit log
answers.py      JSON responses of any size
errors.py       exceptions as JSON {error, message, hint}
streams.py      streamed bodies: JSON lines, frames, archives, uploads
duplex.py       attach and exec: frames in both directions at the same time
tenants.py, networks.py, images.py, instances.py, stats.py, host.py      a file for each resource
"""
