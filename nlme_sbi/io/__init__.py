"""Readers of long tables, wide sheets, event tables and vectors, which return :class:`nlme_sbi.types.Observations`."""

from nlme_sbi.io.description import describe
from nlme_sbi.io.event_tables.event_table import EventTable
from nlme_sbi.io.long_table import LongTable
from nlme_sbi.io.plans import PlannedDesigns, PlanReader
from nlme_sbi.io.tables import canonical_form
from nlme_sbi.io.vector_table import VectorTable
from nlme_sbi.io.wide_sheet import WideSheet

__all__ = [
    "EventTable",
    "LongTable",
    "PlanReader",
    "PlannedDesigns",
    "VectorTable",
    "WideSheet",
    "canonical_form",
    "describe",
]
