"""The strategies behind `strategy=`: names to Lightning strategies."""
