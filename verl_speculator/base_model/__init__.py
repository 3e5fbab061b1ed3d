"""A Hugging Face base model: what its folder holds, and loading it for decoding."""
