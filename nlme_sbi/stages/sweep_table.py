"""After a sweep: one table of its jobs, printed and stored beside them."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from nlme_sbi.config.conversion import convert
from nlme_sbi.runs import csv_text, save_text, sweeps

log = logging.getLogger(__name__)


def sweep_table(cfg: DictConfig) -> None:
    """Print and write ``table.csv`` and ``table.txt`` in the sweep's directory.

    Args:
        cfg: composed configuration with ``sweep`` (a directory or latest) and ``output_root``.

    Raises:
        ValueError: where there is no such sweep, or one of its runs was edited.
    """
    directory = sweeps.find_sweep(convert(cfg.sweep, str, "sweep"), Path(cfg.output_root))
    table = sweeps.sweep_table(directory)
    text = table.to_string(index=False, float_format="{:.5g}".format, na_rep="") + "\n"
    for name, content in (("table.csv", csv_text(table)), ("table.txt", text)):
        save_text(directory / name, content)
    log.info("%s\nWritten: %s (table.csv, table.txt)", text, directory)
