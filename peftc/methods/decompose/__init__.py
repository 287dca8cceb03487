"""Matrix methods: weight (out, in) -> Spectrum."""
