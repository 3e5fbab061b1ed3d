"""verl's reinforcement learning with a speculator: what its rollout needs beside the engine of the policy."""
