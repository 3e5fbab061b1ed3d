"""Drafting on vLLM's Model Runner V2, by one hook where it makes its speculator."""
