"""The HTTP API: JSON under /v1 on a unix socket, described at /openapi.json.

daemon.py       insulad: lock, signals, graceful stop
    server.py       uvicorn
app.py          all resources in one application
peer.py         who is at the other end of a connection, and who may be
answers.py      JSON of any size
errors.py       exceptions as JSON {error, message, hint}
streams.py      bodies that flow: JSON lines, frames, archives, uploads
duplex.py       attach and exec: frames both ways at the same time
tenants.py, networks.py, images.py, instances.py, stats.py, host.py      one file a resource
"""
