"""The report: one HTML file that a person reads, made of findings, tables and figures of a finished fit."""
