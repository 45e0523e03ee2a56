"""Importing a library without the heavy part that it loads only because it happens to be installed.

`httpx` loads its command line (rich, pygments, click), and `onnxruntime` loads its deprecated training front end, which
loads all of torch: 240 MiB that a device does not have. Both libraries treat these parts as optional and do without them
when their import fails, so the import is made to fail for as long as the library is being imported.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(module: str) -> Iterator[None]:
    """Inside the block `import module` raises ImportError, unless it had been imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # this is Python's own way to say: not importable
    try:
        yield
    finally:
        del sys.modules[module]
