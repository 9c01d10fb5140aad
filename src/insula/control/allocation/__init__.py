"""Allocation: reservations of names and numbers, and quotas of tenants.

reservations.py   names and numbers that only one owner may have
transaction.py    the retry loop around the transaction that takes them
quotas.py         sums over a tenant's stored objects, within the tenant's limits
recount.py        compares these sums with the objects
limits.py         the limits of all tenants in memory
in_flight.py      what open requests hold
rates.py          token buckets
"""
