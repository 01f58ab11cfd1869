"""People judge answers on a page: what they are asked, what they said, and what is made of it."""

from trl_ext.rating.agreement import Agreement, Agreements, agreements
from trl_ext.rating.exporting import Export, export
from trl_ext.rating.modes import MODES
from trl_ext.rating.records import Compared, Judgement
from trl_ext.rating.store import Store, StoreError

__all__ = [
    "MODES",
    "Agreement",
    "Agreements",
    "Compared",
    "Export",
    "Judgement",
    "Store",
    "StoreError",
    "agreements",
    "export",
]
