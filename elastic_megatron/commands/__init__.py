"""The commands of the console script, one module each. Nothing heavy is imported before a command runs."""
