"""The one file that is deployed."""
