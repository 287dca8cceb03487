"""The command line: options in, a report out; nothing here computes."""
