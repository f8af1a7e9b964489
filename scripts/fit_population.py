"""Population parameters of a data set: python scripts/fit_population.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.fit_population:fit_population", "fit_population")

if __name__ == "__main__":
    main()
