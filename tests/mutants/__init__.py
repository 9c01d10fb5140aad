"""Mutation testing: counts the small faults that the tests detect.

A *mutant* is the program with one small change, such as `<` for `<=`. If the tests of that module fail, the mutant is
killed; if they pass, it survives, and shows what no test asserts. See docs/testing.md. Run it as

    scripts/test mutants [--count N] [--seed S] [MODULE…]

A program of our own, since the tests start daemons and containers from the checkout: tools like mutmut change the
program inside the process of the tests only.
"""
