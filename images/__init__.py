"""Images in, batches out: the files of a folder, sets in memory, splits, augmentation, loaders."""
