"""Image data: the data directory, reading a set, splits, augmentation, and foreign images."""
