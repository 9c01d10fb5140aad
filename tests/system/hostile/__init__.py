"""Hostile instances: what they send stays at their port or in their tenant, and neighbours go on as before."""
