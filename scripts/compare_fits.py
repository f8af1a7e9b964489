"""Fits of the same data side by side: python scripts/compare_fits.py RUN RUN ..."""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.compare_fits:compare_fits", "compare_fits", words="fits")

if __name__ == "__main__":
    main()
