"""From a gin file to running processes: on this machine, and through the engines of pods."""
