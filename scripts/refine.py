"""Simulate where the population lies, train there, fit, and so on: python scripts/refine.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.refine:refine", "refine")

if __name__ == "__main__":
    main()
