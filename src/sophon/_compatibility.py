"""Where scripts of earlier versions find `prepare_torchvision`."""

from sophon._base.torchvision_patch import prepare_torchvision

__all__ = ["prepare_torchvision"]
