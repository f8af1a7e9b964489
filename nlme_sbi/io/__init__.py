"""Readers of long tables, wide sheets, event tables and vectors, which return :class:`nlme_sbi.types.Observations`."""

from nlme_sbi.io.description import describe
from nlme_sbi.io.event_tables.event_table import EventTable
from nlme_sbi.io.plain_tables.long_table import LongTable
from nlme_sbi.io.plain_tables.vector_table import VectorTable
from nlme_sbi.io.plain_tables.wide_sheet import WideSheet
from nlme_sbi.io.plans import PlannedDesigns, PlanReader
from nlme_sbi.io.tables import canonical_form

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
