"""P3D: residual networks for video whose 3D convolutions are split into space and time."""

from gatewise.networks.video.p3d.network import COLOURS, P3D, PORT, WIRINGS, Bottleneck, P3DConfig, Pseudo3dConv

__all__ = ["COLOURS", "P3D", "PORT", "WIRINGS", "Bottleneck", "P3DConfig", "Pseudo3dConv"]
