"""What is given out once: names and numbers, and parts of what a tenant may use.

reservations.py   names and numbers that only one owner may have
quotas.py         the sums of what a tenant's instances have, within its limits
transaction.py    the retry loop around the transaction that takes them
"""
