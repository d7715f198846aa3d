"""A run's counterpart at Weights & Biases, brought up to metrics.jsonl by a process of its own.

The trainer starts `sender` and writes metrics.jsonl; nothing else of it touches W&B, so nothing of W&B can hold it up.
"""
