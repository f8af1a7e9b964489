"""Reading data: long tables, wide sheets and event tables become :class:`nlme_sbi.types.Observations`."""

from nlme_sbi.io.description import describe
from nlme_sbi.io.event_tables.event_table import EventTable
from nlme_sbi.io.long_table import LongTable
from nlme_sbi.io.plans import PlannedDesigns, PlanReader
from nlme_sbi.io.tables import same_form
from nlme_sbi.io.wide_sheet import WideSheet

__all__ = ["EventTable", "LongTable", "PlanReader", "PlannedDesigns", "WideSheet", "describe", "same_form"]
