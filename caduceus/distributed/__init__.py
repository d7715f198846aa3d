"""All code that knows about ranks. The model does not: parallelism is applied to it from outside."""
