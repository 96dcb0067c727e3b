"""Engines behind HTTP: OpenAI's image API, requests batched as they come."""
