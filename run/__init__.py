"""A run on disk and among processes: its folder, checkpoints, images, signals; without what trains."""
