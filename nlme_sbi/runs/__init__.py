"""Runs on disk: a directory for each command, resumed where it stopped, finished by a manifest, checked when read."""

from nlme_sbi.runs.csv_files import csv_text, read_csv, records_text
from nlme_sbi.runs.directory import RunDirectory, open_run
from nlme_sbi.runs.files import (
    load_array,
    load_json,
    save_array,
    save_bytes,
    save_json,
    save_text,
    sha256_of_file,
    sha256_of_plain,
    write_atomically,
)
from nlme_sbi.runs.finished import FinishedRun, find_run, load_run
from nlme_sbi.runs.sources import ChangedSources, Sources, require_same_sources, require_unedited, sources_of
from nlme_sbi.runs.stored_designs import StoredDesign, load_design, save_design, sha256_of_design
from nlme_sbi.runs.stored_observations import load_observations, save_observations

__all__ = [
    "ChangedSources",
    "FinishedRun",
    "RunDirectory",
    "Sources",
    "StoredDesign",
    "csv_text",
    "find_run",
    "load_array",
    "load_design",
    "load_json",
    "load_observations",
    "load_run",
    "open_run",
    "read_csv",
    "records_text",
    "require_same_sources",
    "require_unedited",
    "save_array",
    "save_bytes",
    "save_design",
    "save_json",
    "save_observations",
    "save_text",
    "sha256_of_design",
    "sha256_of_file",
    "sha256_of_plain",
    "sources_of",
    "write_atomically",
]
