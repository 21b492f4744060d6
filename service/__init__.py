"""The service: takes observations as they come, answers with the risk of every hour of a stay."""
