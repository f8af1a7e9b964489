"""Posterior of population parameters: python scripts/sample_theta.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.sample_theta:sample_theta", "sample_theta")

if __name__ == "__main__":
    main()
