"""The model as `transformers` knows models. These modules also go, with what they import, into every export."""
