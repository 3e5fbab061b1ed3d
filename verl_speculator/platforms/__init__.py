"""Devices that verl does not know of. Import the submodule you need: each imports verl."""
