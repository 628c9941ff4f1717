"""What q itself says: its llc, control variates, importance weights."""
