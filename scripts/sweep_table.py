"""One table of a sweep (-m): python scripts/sweep_table.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.sweep_table:sweep_table", "sweep_table")

if __name__ == "__main__":
    main()
