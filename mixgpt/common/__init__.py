"""Utilities shared by all packages, independent of the method: errors, files, processes, timing, devices."""
