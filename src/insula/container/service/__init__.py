"""Containers for a daemon: the client, and the processes that hold containers and their streams for it."""
