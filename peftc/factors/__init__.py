"""From spectra and a budget to ranks, factors and predictions."""
