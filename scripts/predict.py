"""Predictions for individuals of a fit and for new ones: python scripts/predict.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.predict:predict", "predict")

if __name__ == "__main__":
    main()
