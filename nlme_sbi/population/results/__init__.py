"""Results of a fit: estimates, tables, intervals, comparisons, most probable individual parameters."""
