"""Running parts of programs while compiling."""
