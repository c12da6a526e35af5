"""Video networks: (B, C, T, H, W) in, logits, features or a pyramid out."""
