"""Convolution methods: weight (out, in, kh, kw) -> Spectrum or Tucker."""
