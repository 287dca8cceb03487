"""One file for each format of an export, with the tracing and the checks behind them."""
