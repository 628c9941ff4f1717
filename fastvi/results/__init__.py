"""What comes out of a run, as values, files and pages."""
