"""The driver of containers: defaults and policy of the cloud on top of the OCI runtime `insula.container`."""
