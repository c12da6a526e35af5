"""Image classification data: files, tables and shards, augmentation, loading."""
