"""The runtime as a service for a daemon: its client, the monitor, and the zygote that forks containers."""
