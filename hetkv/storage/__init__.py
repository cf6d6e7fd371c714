"""Storage as a peer: KV of one pool kept in a file or an object, and read back into another pool.

The file is the one of `docs/wire-format.md`, section 8: it knows heads, tokens and dtypes, and no block, layout or
rank, so any pool of the same model reads what any other wrote (docs/storage.md). Imports kv, control and transport.
"""

from hetkv.storage.load import load
from hetkv.storage.save import Saved, save

__all__ = ["Saved", "load", "save"]
