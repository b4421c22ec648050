from qat_lightning.equalization.equalize import Equalizer, equalize

__all__ = ["Equalizer", "equalize"]
