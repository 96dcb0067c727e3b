"""Reuse of features over sampling steps: plans, searches and policies."""
