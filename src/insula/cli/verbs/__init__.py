"""One file a verb, or a small family of them; each has a table `COMMANDS` of verb → `Command`."""
