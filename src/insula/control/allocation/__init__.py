"""Allocation: reservations of names and numbers, and quotas of tenants.

reservations.py   names and numbers that only one owner may have
quotas.py         the sums of the limits of a tenant's instances, within the tenant's limits
transaction.py    the retry loop around the transaction that takes them
"""
