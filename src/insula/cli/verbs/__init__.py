"""The verbs: a file for each verb or small family of verbs, with a table `COMMANDS` of verb → `Command`."""
