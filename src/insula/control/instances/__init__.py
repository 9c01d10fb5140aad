"""Instances: what tenants run. Verbs commit what is wanted, drivers do it."""
