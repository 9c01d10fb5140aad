"""Insula: a cloud for many tenants on the Linux machines that you already have."""
