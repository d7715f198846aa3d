"""Where people watch a run: metrics.jsonl, the terminal, Weights & Biases."""
