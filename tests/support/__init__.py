"""Tools of the system tests: a private machine, private daemons, the command line, snapshots."""
