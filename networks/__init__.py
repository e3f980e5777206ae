"""All systems' networks: the published tables' rows, what a network is built from, and what it costs."""
