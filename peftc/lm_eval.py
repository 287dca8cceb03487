"""`python -m peftc.lm_eval ...` is lm-eval's own command line, with the model `peftc` and with factors for `hf`."""

from peftc.runtimes import harness

if __name__ == "__main__":
    harness.main()
else:
    harness.register()
