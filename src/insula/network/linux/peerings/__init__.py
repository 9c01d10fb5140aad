"""Peerings of tenants: their devices and routes on one host and between hosts, and service endpoints."""
