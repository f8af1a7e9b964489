"""The report of a finished fit: one HTML file with findings, tables and figures."""
