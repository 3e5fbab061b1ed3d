"""How the serving tests sample, where a test without vLLM can read it."""

TOKENS = 4
SAMPLES = 700
TEMPERATURE = 0.9
TOP_K = 3
