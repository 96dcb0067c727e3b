"""From programs to compiled code, and running it."""
