"""Measures trained models and uses them: held-out loss, embeddings, variants, probes, fine-tuning, benchmarks."""
