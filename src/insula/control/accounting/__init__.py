"""Accounting: what tenants and instances have used and reserved over time.

Everything is stored as totals that only grow, never as differences. A counter of the kernel is stored with its last
reading and its *incarnation*, which tells when it began anew. So reading twice, or again after a crash, adds nothing.

    meters.py     a counter with incarnations, samples of memory, and reservations over time; pure functions
    ledger.py     reservations over time, written in the transactions that change them
    accounts.py   reading the counters, periodically and when an instance ends
    history.py    a snapshot of a tenant's totals every hour
    usage.py      `insula usage`

    /accounting/instances/TENANT/ID   Account
    /accounting/ledgers/TENANT        Ledger: reservations, and the sums of removed instances
    /accounting/groups/TENANT/HOST    UsageMeter: the processor time of the tenant's control group
    /accounting/history/TENANT/DAY    History
    /accounting/removed/TIME/TENANT   TenantUsage: the last totals of a removed tenant
    /accounting/checkpoints/HOST      Checkpoint: when the counters were last read
"""
