"""`make demo`: a draft head trained and measured on a laptop, from nothing but the Python standard library."""
