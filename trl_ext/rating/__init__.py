"""People judge answers on a page: what they are asked, what they said, and what is made of it."""

from trl_ext.rating.agreement import Agreements, ObservedAgreement, agreements
from trl_ext.rating.exporting import Export, export
from trl_ext.rating.modes import MODES
from trl_ext.rating.records import Annotation, Compared
from trl_ext.rating.store import Store, StoreError

__all__ = [
    "MODES",
    "Agreements",
    "Annotation",
    "Compared",
    "Export",
    "ObservedAgreement",
    "Store",
    "StoreError",
    "agreements",
    "export",
]
