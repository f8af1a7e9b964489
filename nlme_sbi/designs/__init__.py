"""Where the designs of simulated individuals come from, and which designs of real data they cover.

Every class here is a :class:`nlme_sbi.types.DesignSource`, but for :class:`Schedule`, which says what to predict:
``sample`` gives designs in float32 on the generator's device, ``covers`` gives for each row that simulated designs do
not cover the reason in words.
"""

from nlme_sbi.designs.fixed_grid import FixedGrid
from nlme_sbi.designs.random_times import RandomTimes
from nlme_sbi.designs.resampled import DesignsOfData, Reader, ResampledDesigns
from nlme_sbi.designs.schedule import Schedule

__all__ = ["DesignsOfData", "FixedGrid", "RandomTimes", "Reader", "ResampledDesigns", "Schedule"]
