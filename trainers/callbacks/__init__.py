"""Lightning callbacks, one concern a file."""
