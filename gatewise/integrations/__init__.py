"""Bridges to other libraries: timm's registry and torchvision's detectors. Each is imported only on request."""
