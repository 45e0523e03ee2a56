from tests.conformance.conftest import program_cache, shared_folder

__all__ = ["program_cache", "shared_folder"]
