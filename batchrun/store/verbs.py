"""What all verbs of the store share: the connection's transactions, and this process's claim."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from batchrun.store.connection import Transactions


class Verbs:
    """Verbs are awaited and safe to call from many tasks; each is one transaction.

    Every verb raises StoreError or DiskError when the file cannot be used, and LeaseLost, changing nothing,
    when its row is not claimed by this process.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        #: This process's claim; 0 until begin_lease.
        self.lease = 0
        self._transactions = Transactions(connection, path)
        self._write = self._transactions.write
        self._read = self._transactions.run
