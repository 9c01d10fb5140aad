"""What the system tests are made with: a private machine, private daemons, the command line, snapshots."""
