"""From gin files to a running pod: what is launched, and the commands of engines that exist."""
