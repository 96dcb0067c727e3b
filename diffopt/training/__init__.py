"""Training a rewritten program to do what it did before."""
