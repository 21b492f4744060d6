"""The Medical Event Data Standard: data sets read, and stores, labels and predictions written."""
