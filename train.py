"""Trains, quantizes and tests what the configs under conf/ describe: ``python train.py --help``."""

import hydra
from omegaconf import DictConfig

from qat_lightning.app import errors_as_messages, run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the composed config."""
    with errors_as_messages():
        return run(cfg)


if __name__ == "__main__":
    main()
