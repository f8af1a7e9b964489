"""Fit parameters at the levels global, group and individual: python scripts/train_hierarchical.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.train_hierarchical:train_hierarchical", "train_hierarchical")

if __name__ == "__main__":
    main()
