"""Containers as instances: the cloud's defaults and policy over the OCI runtime `insula.container`."""
