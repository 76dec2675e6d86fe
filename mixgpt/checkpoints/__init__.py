"""Load and check models, save formats, and the output directory that a run saves to and resumes from."""
