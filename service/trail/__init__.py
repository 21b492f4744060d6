"""The audit trail: who read or wrote what about which episode, and when. Append-only."""
