"""What a fit gives: estimates, tables, intervals, comparisons, most probable individual parameters."""
