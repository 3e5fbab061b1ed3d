"""Reinforcement learning that changes how a policy writes, and a speculator that follows."""
