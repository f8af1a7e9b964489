"""Checks of a fitted model against its data: python scripts/check_fit.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.check_fit:check_fit", "check_fit")

if __name__ == "__main__":
    main()
