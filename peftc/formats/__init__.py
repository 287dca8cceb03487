"""One file for each format of an export, with the tracing and the checks behind them.

A format is a function `(model, example, folder, *, settings) -> Exported`: a model as stored, random inputs of two
samples by name, the folder to write to.
"""
