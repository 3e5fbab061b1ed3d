"""Speculators in vLLM, and in the files that other engines read. Nothing is loaded here: vLLM imports the plugin."""
