"""Egress by DNS name, with real packets: a client, a router with a tenant's rules, and an internet of our own."""
