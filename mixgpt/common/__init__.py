"""What every room uses and nothing of the method: errors, files, processes, seconds, devices."""
