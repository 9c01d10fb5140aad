"""Making a container's processes: what is prepared outside, and what a child does until it executes the program."""
