"""Networks of tenants.

`fabric` is the protocol of what makes them on a host, with one implementation in each package below (`linux`).
`reachability` says who may reach whom, `probe` finds out with packets who does, and `verify` compares. `addresses` is
arithmetic.
"""
