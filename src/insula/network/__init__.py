"""Networks of tenants.

`intent` is what a tenant wants, as data. `fabric` is the protocol of what makes it so on a host, with one
implementation in each package below (`linux`).
`reachability` says who may reach whom, `probe` finds out with packets who does, and `verify` compares. `addresses` is
arithmetic.
"""
