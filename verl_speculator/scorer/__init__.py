"""A scorer of draft/target mismatches: which differences leave the answer right. Decoding with one is lossy."""
