"""What tests and benchmarks measure against; nothing here is needed to search, to train or to run."""
