"""Speculators that are no chain of heads, a folder each. Nothing imports them: a name leads to them."""
