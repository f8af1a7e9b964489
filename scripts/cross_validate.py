"""Hold out folds or levels of a group in turn, and table the predictions: python scripts/cross_validate.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.cross_validate:cross_validate", "cross_validate")

if __name__ == "__main__":
    main()
