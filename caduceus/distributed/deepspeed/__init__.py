"""DeepSpeed ZeRO: `strategy.py` drives its engine, `settings.py` makes its settings, `package.py` imports it."""
