# For habit: each target is the script of that name.
up down purge test bench:
	@scripts/$@

lint:
	@scripts/test lint

.PHONY: up down purge test bench lint
