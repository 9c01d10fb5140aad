"""Measurements of Insula beside its peers, interleaved in one run: `make bench` writes docs/benchmarks.md."""
