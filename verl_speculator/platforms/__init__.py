"""Devices that verl does not know of."""

# verl loads our plugin while it is being imported, and the plugin needs `platforms.cpu` whole. Were that module the one
# that imports verl first, it would still be half-way through itself then.
import verl  # noqa: F401
