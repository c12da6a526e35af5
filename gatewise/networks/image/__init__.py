"""Image networks: (B, C, H, W) in, logits, features or a pyramid out."""
