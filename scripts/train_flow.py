"""Train a network that gives every individual's posterior: python scripts/train_flow.py --help"""

from nlme_sbi.entry import entry_point

main = entry_point("nlme_sbi.stages.train_flow:train_flow", "train_flow")

if __name__ == "__main__":
    main()
