"""Infer single individuals from few simulations, in rounds: python scripts/infer_individual.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.infer_individual:infer_individual", "infer_individual")

if __name__ == "__main__":
    main()
