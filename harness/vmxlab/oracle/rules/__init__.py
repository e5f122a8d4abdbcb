"""Which instructions exit, when, and what is recorded: a module for each family, with section numbers."""
