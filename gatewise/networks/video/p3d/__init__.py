"""P3D: residual networks for video whose 3D convolutions are split into space and time."""

from gatewise.networks.video.p3d.network import COLORS, P3D, PORT, WIRINGS, Bottleneck, P3DConfig, Pseudo3dConv

__all__ = ["COLORS", "P3D", "PORT", "WIRINGS", "Bottleneck", "P3DConfig", "Pseudo3dConv"]
