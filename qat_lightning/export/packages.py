"""Packages of extras that exports build on."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import torch

from qat_lightning.deprecation import silence
from qat_lightning.errors import ConfigurationError


@contextmanager
def importing(package: str, extra: str, purpose: str, fitting: str) -> Iterator[None]:
    """Import from a package in the block, without what it says on import.

    Args:
        package: its name.
        extra: of this package that installs it.
        purpose: what needs it, for the message.
        fitting: where it tells which versions of it and of torch fit each other.

    Raises:
        ConfigurationError: it is missing, or does not fit this torch.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ConfigurationError(f'{purpose} needs the package {package}: pip install "qat-lightning[{extra}]".') from None
    try:
        with silence():
            yield
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(
            f"{package} {found} cannot be imported with torch {torch.__version__} ({error}): install the versions that fit each other, see "
            f"{fitting}."
        ) from error
