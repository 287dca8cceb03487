"""Convolution methods: weight (out, in, kh, kw) -> Spectrum."""
