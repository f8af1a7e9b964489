"""Sources of designs for simulated individuals, and which designs of real data they cover.

Every class here is a :class:`nlme_sbi.types.DesignSource`, except :class:`Schedule`, the design of predictions:
``sample`` returns designs in float32 on the generator's device, ``covers`` returns a sentence with the reason for each
row that simulated designs do not cover.
"""

from nlme_sbi.designs.fixed_grid import FixedGrid
from nlme_sbi.designs.points import Points
from nlme_sbi.designs.random_times import RandomTimes
from nlme_sbi.designs.resampled import DesignsOfData, Reader, ResampledDesigns
from nlme_sbi.designs.schedule import Schedule

__all__ = ["DesignsOfData", "FixedGrid", "Points", "RandomTimes", "Reader", "ResampledDesigns", "Schedule"]
