"""Checks of a trained network, over its prior and at your data: python scripts/diagnose.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.diagnose:diagnose", "diagnose")

if __name__ == "__main__":
    main()
