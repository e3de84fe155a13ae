"""Speed, memory and coverage of merged models: each one command that prints a table and keeps its numbers as JSON."""
