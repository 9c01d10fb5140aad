"""The one source of truth: a small protocol (`protocol`), its embedded form (`sqlite`) and typed keys (`typed`)."""
