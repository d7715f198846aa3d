"""DeepSpeed ZeRO: `strategy.py` drives its engine, `settings.py` says what it is told, `package.py` imports it."""
