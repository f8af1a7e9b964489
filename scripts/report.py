"""One HTML file about a fit and its checks: python scripts/report.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.report:report", "report")

if __name__ == "__main__":
    main()
