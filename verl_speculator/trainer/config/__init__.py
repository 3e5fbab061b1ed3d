"""A run's configuration: composed, checked before a model is loaded, and completed for the device."""
