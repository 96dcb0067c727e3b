"""The mechanisms of rewrites that keep results, which passes put in order."""
