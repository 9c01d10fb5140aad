"""The verbs of `insula-oci`, one a file: `run(arguments) -> int` does it and returns the exit status."""
