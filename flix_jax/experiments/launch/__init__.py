"""From gin files to running processes: on this machine, or on a pod by engines that exist."""
