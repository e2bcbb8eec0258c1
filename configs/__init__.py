"""The gin files that travel with the package."""
