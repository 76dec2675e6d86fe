"""Models in, folders out: loading and checking, formats, and the folder that a run saves to and goes on from."""
