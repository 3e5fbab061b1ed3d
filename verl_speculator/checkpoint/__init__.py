"""Checkpoints of a run: `layout` is light, `training_state` costs seconds to import."""
