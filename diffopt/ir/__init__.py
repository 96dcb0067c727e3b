"""Programs of fx graphs, and what every rewrite needs."""
