"""Bridges to other libraries: timm's registry, torchvision's detectors. Each is imported by whoever wants it."""
