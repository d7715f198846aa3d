"""The model as classes of `transformers`. These modules, and those that they import, are also copied into
every export.
"""
