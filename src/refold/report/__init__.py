"""Plans, certificates and timings as tables in the terminal and as one HTML page."""
