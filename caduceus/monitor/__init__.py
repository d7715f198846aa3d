"""Ways to watch a run: metrics.jsonl, the terminal, reports, Weights & Biases."""
