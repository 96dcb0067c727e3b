"""Features of one step reused in another."""
