"""HTTPS: TLS 1.3 ends in a process of its own, the gate, which has no rights on the host.

- `gate` is that process. It accepts connections of the network, does the handshakes, and passes the plain bytes to
  insulad through a unix socket, behind a record that says whose connection it is.
- `record` is that record.
- `certificates` are Insula's own certificate authorities, one for servers and one for clients.
- `supervisor` starts the gate, and starts it again when it has ended.

So the code that reads what strangers send before they have proven anything (OpenSSL) runs without root, and a flood of
handshakes costs the gate's time and not that of insulad's event loop.
"""
