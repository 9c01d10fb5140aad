"""Benchmarks of Insula and its peers, interleaved in one run: `make bench` writes docs/benchmarks.md."""
