"""One run of the command line, from flags to the final tables."""
