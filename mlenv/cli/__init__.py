"""The command line: a module for each command, `main` with their table, `render` that prints."""
