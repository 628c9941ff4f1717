"""Pages and figures of a result."""
