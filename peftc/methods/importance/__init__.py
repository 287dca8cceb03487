"""Importance scores: what of a layer a score names -> one number, larger = keep."""
