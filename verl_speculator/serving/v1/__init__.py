"""Drafting on vLLM's first model runner, by its `custom_class` method: all there is in vLLM 0.28 to 0.31.

To be removed as a folder, with `compatibility.V2_FROM`, when the oldest supported vLLM has what `serving/v2` needs.
"""
