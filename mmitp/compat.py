"""Makes the OpenMMLab stack importable where compiled operators are missing."""


def install() -> None:
    """Install the import hooks (idempotent)."""
