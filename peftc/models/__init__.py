"""From a source to a network with its weights."""
