"""DeepSpeed ZeRO: `strategy.py` drives its engine, `options.py` says what it is told, `package.py` imports it."""
