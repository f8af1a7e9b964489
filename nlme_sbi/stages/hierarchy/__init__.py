"""What predict, check_fit and report do with runs of ``train_hierarchical``."""
