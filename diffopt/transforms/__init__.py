"""The rewrites that passes put in order."""
