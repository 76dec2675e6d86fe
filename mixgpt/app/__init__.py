"""One run of a command line, from flags to the table at its end, and many runs side by side."""
