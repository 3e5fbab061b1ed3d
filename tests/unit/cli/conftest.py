from tests.unit.serving.conftest import make_speculator

__all__ = ["make_speculator"]
