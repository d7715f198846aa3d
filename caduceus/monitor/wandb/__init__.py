"""Sends a run to Weights & Biases: a separate process brings W&B up to metrics.jsonl.

The trainer starts `sender` and writes metrics.jsonl. It has no other contact with W&B, so W&B can never delay it.
"""
