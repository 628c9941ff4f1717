"""The loop that fits q, and what surrounds it: schedule, stages, driver."""
