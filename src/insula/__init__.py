"""Insula: a cloud for many tenants on the Linux machines that you already have."""

__version__ = "0.1.0"
