"""Download published data that are not bundled: python scripts/download_data.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.download:download_data", "download_data")

if __name__ == "__main__":
    main()
