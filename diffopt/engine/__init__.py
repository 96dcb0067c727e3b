"""Engines: the one file that is deployed, and the object that runs it."""
