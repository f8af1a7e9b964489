"""Draw parameters from the prior and simulate data for them: python scripts/simulate.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.simulate:simulate", "simulate")

if __name__ == "__main__":
    main()
